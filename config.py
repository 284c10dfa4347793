"""Every setting of a run is a flag. Only the standard library is imported here, so that `--help`
and mistyped flags are answered before torch loads."""

import json
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """An error caused by user input. The program prints its message, one line, and exits with 2."""


def flag(default, help, may_change=False, choices=None, **limits):
    """A setting. `may_change`: a resumed run may change it, because the earlier steps stay valid.
    `limits`: minimum and maximum (inclusive), above and below (exclusive)."""
    metadata = dict(help=help, may_change=may_change, choices=choices, limits=limits)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Each field is a flag of the same name. Settings that TRL has use TRL's name."""

    # model
    model_name_or_path: str = flag(
        "Qwen/Qwen3-VL-2B-Instruct", "hub name or local folder of a Qwen2.5-VL or Qwen3-VL"
    )
    load_in_4bit: bool = flag(True, "quantize the language model to NF4 with double quantization")
    lora_r: int = flag(16, "rank of the LoRA adapter", minimum=1)
    lora_alpha: int = flag(
        32, "LoRA scale: the adapter's output is multiplied by alpha / r", minimum=1
    )
    adapter: str = flag("", "start from this adapter; KL is still measured against the base model")
    gradient_checkpointing: bool = flag(
        True, "recompute activations in the backward pass to save memory", may_change=True
    )
    max_pixels: int = flag(2**18, "downscale larger images to this many pixels", minimum=1)
    device: str = flag(
        "auto", "auto: CUDA if found, else CPU", may_change=True, choices=["auto", "cuda", "cpu"]
    )
    deterministic: bool = flag(False, "use slower, deterministic CUDA kernels, for exact resume")
    cuda_graph: bool = flag(False, "sample with a CUDA graph; untested on a GPU", may_change=True)
    # data
    dataset: str = flag(
        "scenes", "scenes (generated), a .jsonl file, gqa, refocus; + joins several"
    )
    data_dir: str = flag("", "folder of GQA: questions, scene graphs, images/", may_change=True)
    mix: str = flag("", "share of each joined data set; the paper's gqa+refocus: 0.8,0.2")
    skip_bad_examples: bool = flag(
        False, "skip and count unusable examples instead of stopping", may_change=True
    )
    allow_absolute_paths: bool = flag(
        False, "allow images outside the data set's folder", may_change=True
    )
    instruction: str = flag(
        "First say where in the image the answer is and what you see there. "
        "Then give the answer alone, as <answer>...</answer>.",
        "text appended to every question",
    )
    # training
    max_steps: int = flag(200, "optimizer steps", may_change=True, minimum=0)
    num_generations: int = flag(8, "G, completions per question (official code: 16)", minimum=2)
    prompts_per_step: int = flag(4, "questions per optimizer step", minimum=1)
    completions_per_forward: int = flag(
        0,
        "micro-batch: below G saves memory, above G packs groups; 0 means G",
        may_change=True,
        minimum=0,
    )
    max_completion_length: int = flag(110, "maximum tokens in a completion", minimum=1)
    temperature: float = flag(1.0, "used for sampling and scoring (no top-p)", minimum=0.01)
    learning_rate: float = flag(5e-6, "peak learning rate of AdamW", minimum=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up", choices=["cosine", "constant"])
    warmup_steps: int = flag(5, "steps of linear warm-up", minimum=0)
    weight_decay: float = flag(0.01, "weight decay of AdamW", minimum=0)
    max_grad_norm: float = flag(0.8, "clip the gradient to this norm; 0 or less disables clipping")
    beta: float = flag(0.001, "weight of the KL penalty; 0 saves a forward pass", minimum=0)
    epsilon: float = flag(
        0.2, "clip range of the ratio; only used if num_iterations > 1", above=0, below=1
    )
    num_iterations: int = flag(1, "optimizer updates per batch of completions", minimum=1)
    seed: int = flag(0, "seed of all randomness", minimum=0, maximum=2**63 - 1)
    # reward
    reward_weights: str = flag(
        "attention=1,format=1,accuracy=0", "name=weight pairs; all rewards are logged"
    )
    token_fraction: float = flag(
        0.3, "fraction of tokens that count, highest entropy first", above=0, maximum=1
    )
    alignment: str = flag(
        "query",
        "attention row of a token: its own, or the predicting one",
        choices=["query", "predict"],
    )
    layers: str = flag("-1", "layers whose attention counts: all, 2,3 or --layers=-2,-1")
    heads: str = flag("all", "heads of those layers: all, or 0,3")
    format_lengths: str = flag("60,100", "min,max tokens that earn the full format reward")
    # evaluation
    eval_examples: int = flag(64, "held-out questions of each evaluation; 0 skips it", minimum=0)
    # run
    output_dir: str = flag(
        "runs/sayo", "folder for logs, checkpoints, adapter and report", may_change=True
    )
    save_steps: int = flag(20, "steps between checkpoints", may_change=True, minimum=1)
    keep_best: bool = flag(False, "end with the adapter of the steps with the most right samples")
    resume: bool = flag(False, "continue the run in output_dir with its settings", may_change=True)


# Defaults for the model in tiny/, which is small, already knows the format and learns fast. The
# learning rate and the head were chosen on validation scenes, see docs/evidence.md.
TINY = dict(
    model_name_or_path=str(ROOT / "tiny"),
    gradient_checkpointing=False,
    max_pixels=112 * 112,
    instruction="",
    max_steps=60,
    prompts_per_step=8,
    max_completion_length=20,
    learning_rate=4e-4,
    alignment="predict",
    layers="3",
    heads="2",
    format_lengths="10,18",
    completions_per_forward=64,
    eval_examples=256,
)


def is_tiny(model):
    """Whether the folder `model` holds the model in tiny/, or one trained further from it."""
    try:
        files = (Path(x, "config.json").read_text("utf-8") for x in (ROOT / "tiny", model))
        mine, given = (json.loads(text) | {"transformers_version": None} for text in files)
    except (OSError, ValueError, TypeError):
        return False
    return mine == given


def parse_ints(text):
    """[0, 3] from "0,3"; None from "all"."""
    return None if text == "all" else [int(number) for number in text.split(",")]


def parse_weights(text):
    """{"attention": 1.0, "format": 0.5} from "attention=1,format=0.5"."""
    pairs = (item.split("=") for item in text.split(","))
    return {name.strip(): float(weight) for name, weight in pairs}
