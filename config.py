"""Every setting of a run is a flag. Only the standard library is imported here, so that `--help`
and mistyped flags are answered before torch loads."""

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """A user's mistake. The message is one line that names it; the program prints it and exits."""


def flag(default, help, may_change=False, choices=None, **limits):
    """A setting. `may_change`: also in a resumed run, because it leaves the steps made valid.
    `limits`: minimum and maximum, or above and below, which are not allowed themselves."""
    metadata = dict(help=help, may_change=may_change, choices=choices, limits=limits)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Each field is a flag of the same name. Where TRL has the setting, the name is TRL's."""

    # model
    model_name_or_path: str = flag(
        "Qwen/Qwen3-VL-2B-Instruct", "Qwen2.5-VL or Qwen3-VL: hub name, folder"
    )
    load_in_4bit: bool = flag(True, "quantize the language model to NF4 with double quantization")
    lora_r: int = flag(16, "rank of the LoRA adapter", minimum=1)
    lora_alpha: int = flag(
        32, "LoRA scale: the adapter's output is multiplied by alpha / r", minimum=1
    )
    adapter: str = flag("", "start from this adapter; KL is still measured to the base model")
    gradient_checkpointing: bool = flag(
        True, "recompute activations in backward to save memory", may_change=True
    )
    max_pixels: int = flag(2**18, "larger images are scaled down to this area", minimum=1)
    device: str = flag(
        "auto", "auto is cuda if available", may_change=True, choices=["auto", "cuda", "cpu"]
    )
    deterministic: bool = flag(
        False, "deterministic CUDA kernels: a GPU run resumes to the bit, and is slower"
    )
    # data
    dataset: str = flag("scenes", "scenes (generated), a .jsonl, gqa, refocus; join several with +")
    data_dir: str = flag("", "the GQA folder: questions, scene graphs and images/", may_change=True)
    mix: str = flag("", "shares of the joined data sets; the paper's gqa+refocus is 0.8,0.2")
    skip_bad_examples: bool = flag(
        False, "skip and count unusable examples instead of stopping", may_change=True
    )
    allow_absolute_paths: bool = flag(
        False, "allow images outside the data set's folder", may_change=True
    )
    instruction: str = flag(
        "First say where in the image the answer is and what you see there. "
        "Then give the answer alone, as <answer>...</answer>.",
        "appended to every question",
    )
    # training
    max_steps: int = flag(200, "optimizer steps", may_change=True, minimum=0)
    num_generations: int = flag(8, "G, completions per question (official code: 16)", minimum=2)
    prompts_per_step: int = flag(4, "questions per optimizer step", minimum=1)
    completions_per_forward: int = flag(
        0, "micro-batch: fewer take less memory; 0: all G", may_change=True, minimum=0
    )
    max_completion_length: int = flag(110, "maximum tokens in a completion", minimum=1)
    temperature: float = flag(
        1.0, "for sampling and scoring alike; there is no top-p", minimum=0.01
    )
    learning_rate: float = flag(5e-6, "peak learning rate of AdamW", minimum=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up", choices=["cosine", "constant"])
    warmup_steps: int = flag(5, "steps of linear warm-up", minimum=0)
    weight_decay: float = flag(0.01, "weight decay of AdamW", minimum=0)
    max_grad_norm: float = flag(0.8, "clip the gradient to this norm; 0 or less: never")
    beta: float = flag(0.001, "weight of the KL penalty; 0 saves the reference forward", minimum=0)
    epsilon: float = flag(
        0.2, "clip range of the ratio; matters only if num_iterations > 1", above=0, below=1
    )
    num_iterations: int = flag(1, "optimizer updates per batch of completions", minimum=1)
    seed: int = flag(0, "the seed of all randomness", minimum=0, maximum=2**63 - 1)
    # reward
    reward_weights: str = flag("attention=1,format=1,accuracy=0", "weights; all rewards are logged")
    token_fraction: float = flag(
        0.3, "fraction of tokens, by entropy, that count", above=0, maximum=1
    )
    alignment: str = flag("query", "see reward.align_attention", choices=["query", "predict"])
    layers: str = flag("-1", "layers whose attention counts: 2,3; -1 is the last; or all")
    heads: str = flag("all", "heads of those layers whose attention counts: 0,3; or all")
    format_lengths: str = flag(
        "60,100", "shortest,longest completion with full format reward, tokens"
    )
    # evaluation
    eval_examples: int = flag(64, "held-out questions asked before and after; 0: none", minimum=0)
    # run
    output_dir: str = flag(
        "runs/sayo", "folder of the run: logs, checkpoints, adapter, report", may_change=True
    )
    save_steps: int = flag(20, "steps between checkpoints", may_change=True, minimum=1)
    resume: bool = flag(False, "continue the run in output_dir with its settings", may_change=True)


# What differs for the model in tiny/: it is small, knows its format and learns fast. Learning rate
# and head were chosen on validation scenes, see docs/evidence.md.
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
    eval_examples=256,
)


def is_tiny(model):
    """Whether the folder `model` is tiny/, of this checkout or of another."""
    try:
        mine, given = (Path(x, "config.json").read_bytes() for x in (ROOT / "tiny", model))
    except (OSError, ValueError):
        return False
    return mine == given


def parse_ints(text):
    """[0, 3] from "0,3"; None from "all"."""
    return None if text == "all" else [int(number) for number in text.split(",")]


def parse_weights(text):
    """{"attention": 1.0, "format": 0.5} from "attention=1,format=0.5"."""
    pairs = (item.split("=") for item in text.split(","))
    return {name.strip(): float(weight) for name, weight in pairs}
