"""The settings: every one a flag, its default, and what must hold of it."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from data import InputError
from run import CHECKPOINTS, saved_config

HERE = Path(__file__).parent
REWARDS = ("attention", "format", "accuracy")


def flag(default, help, least=None, choices=None):
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass
class Config:
    """Every setting is a flag of the same name. Where TRL has the setting, it has TRL's name."""

    model_name_or_path: str = flag("Qwen/Qwen3-VL-2B-Instruct", "Qwen2.5-VL or Qwen3-VL: a hub name or a folder")
    dataset: str = flag("scenes", "scenes (drawn here), a .jsonl of your own, gqa, refocus, or several joined by +")
    data_dir: str = flag("", "the folder of GQA: questions, scene graphs and images/")
    mix: str = flag("", "the shares of several data sets, e.g. 0.8,0.2 for gqa+refocus as in the paper")
    skip_bad_examples: bool = flag(False, "leave out and count examples that cannot be used, instead of stopping")
    allow_absolute_paths: bool = flag(False, "let a data set name images outside its folder")
    output_dir: str = flag("runs/sayo", "one run: config, metrics, samples, checkpoint, adapter, picture")
    max_steps: int = flag(200, "optimiser steps", least=0)
    num_generations: int = flag(8, "G, answers sampled to each question; the paper's code has 16", least=2)
    prompts_per_step: int = flag(4, "questions a step; each is a group and a micro-batch", least=1)
    max_completion_length: int = flag(110, "tokens of an answer at most", least=1)
    temperature: float = flag(1.0, "of sampling and scoring alike; there is no top-p", least=0.01)
    learning_rate: float = flag(5e-6, "of AdamW")
    lr_scheduler_type: str = flag("cosine", "cosine or constant, after the warm-up", choices=["cosine", "constant"])
    warmup_steps: int = flag(5, "steps of linear warm-up")
    weight_decay: float = flag(0.01, "of AdamW")
    max_grad_norm: float = flag(0.8, "gradients are clipped to this norm")
    beta: float = flag(0.001, "weight of the KL divergence from the model before training; 0 saves a forward")
    epsilon: float = flag(0.2, "the clip of GRPO's ratio; it binds only if num_iterations > 1")
    num_iterations: int = flag(1, "updates made of each batch of samples", least=1)
    lora_r: int = flag(16, "rank of the adapter", least=1)
    lora_alpha: int = flag(32, "its scale: LoRA adds alpha / r times its product")
    adapter: str = flag("", "begin from this adapter of an earlier run; KL is still to the model without any")
    load_in_4bit: bool = flag(True, "NF4 with double quantisation for the language model")
    max_pixels: int = flag(2**18, "larger images are scaled down to this (Qwen3-VL: 1024 an image token)", least=1)
    completions_per_forward: int = flag(0, "answers in one forward: fewer need less memory; 0 is all", least=0)
    gradient_checkpointing: bool = flag(True, "compute activations twice instead of storing them")
    reward_weights: str = flag("attention=1,format=1,accuracy=0", "the paper's own; all three are logged anyhow")
    token_fraction: float = flag(0.3, "the share of tokens, of highest entropy, whose attention counts", least=1e-6)
    alignment: str = flag("query", "a token's own attention, or its predictor's", choices=["query", "predict"])
    layers: str = flag("-1", "whose attention counts, e.g. 2,3; -1 is the last; or all")
    heads: str = flag("all", "of those layers, e.g. 0,3; or all")
    format_lengths: str = flag("60,100", "answers shorter or longer than this, in tokens, lose format reward")
    instruction: str = flag("Say first where in the image the answer is to be found and what you see there. Then give "
                            "the answer alone, as <answer>...</answer>.", "added to every question")  # fmt: skip
    eval_examples: int = flag(64, "held-out questions asked before and after; 0: none", least=0)
    save_steps: int = flag(20, "steps between checkpoints", least=1)
    resume: bool = flag(False, "go on from the last checkpoint in output_dir, with that run's settings")
    probe: bool = flag(False, "no training: a table of how well each layer and head finds the region")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto is cuda if there is any, else cpu", choices=["auto", "cuda", "cpu"])


# What differs for the model of 1.6 M parameters in tiny/: small, sure of its format, learning fast. Learning rate
# and head were chosen on validation scenes, see bench/README.md.
TINY = dict(model_name_or_path=str(HERE / "tiny"), max_steps=60, prompts_per_step=8, max_completion_length=20,
            learning_rate=4e-4, alignment="predict", layers="3", heads="2", gradient_checkpointing=False,
            format_lengths="10,18", instruction="", max_pixels=112 * 112, eval_examples=256)  # fmt: skip


def numbers(text):
    """The list [0, 3] of "0,3"; None of "all"."""
    return None if text == "all" else [int(number) for number in text.split(",")]


def weights(text):
    """The dict of "attention=1,format=0.5"."""
    return {name.strip(): float(weight) for name, weight in (item.split("=") for item in text.split(","))}


def refuse(message):  # argparse itself would print its usage as well; here a mistake is one line
    raise InputError(f"{message} (--help explains all flags)")


def flags(argv, about=None):
    """The flags that were given, as a dict."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sayo_mini.py [train]", description=about, formatter_class=layout, allow_abbrev=False,
        epilog="sayo_mini.py look --help: ask about a picture of your own, and see where the model looks.",
    )  # fmt: skip
    parser.error = refuse
    for f in fields(Config):
        tiny = f"; tiny model: {TINY[f.name] or 'none'}" if f.name in TINY and f.name != "model_name_or_path" else ""
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "X"}
        if f.metadata["choices"]:
            how = {"choices": f.metadata["choices"]}
        help = f"{f.metadata['help']} (default: {f.default}{tiny})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **how)
    return vars(parser.parse_args(argv))


def parse(argv, about=None):
    """The command line of a run as a Config. Raises: InputError, before anything is loaded or written."""
    given = flags(argv, about)
    folder = Path(given.get("output_dir", Config.output_dir))
    if given.get("resume") and (folder / "config.json").exists():
        return settings(given, saved(folder))
    if any((folder / name).exists() for name in ("metrics.jsonl", *CHECKPOINTS)) and not given.get("probe"):
        raise InputError(f"{folder} holds a run already: go on with it (--resume) or choose another --output_dir")
    return settings(given)


def saved(folder):
    """The settings that an earlier run has left in its folder."""
    return saved_config(folder / "config.json", {f.name: f.type for f in fields(Config)})


def settings(given, base=None):
    """A Config: defaults, over them `base`, an earlier run's, or the tiny model's; over them the flags `given`.
    Raises: InputError naming the flag that cannot work."""
    if base is None:
        base = {}
        if "model_name_or_path" in given:
            base = TINY if Path(given["model_name_or_path"]).resolve() == HERE / "tiny" else {}
        elif not torch.cuda.is_available() or given.get("device") == "cpu":
            print("no CUDA: taking the tiny model that ships in tiny/ (--model_name_or_path chooses another)")
            base = TINY
    cfg = Config(**(base | given))
    for f in fields(cfg):
        if f.metadata["least"] is not None and not getattr(cfg, f.name) >= f.metadata["least"]:
            raise InputError(f"--{f.name} {getattr(cfg, f.name)}: must be at least {f.metadata['least']}")
    read = {}
    readers = {"reward_weights": weights, "layers": numbers, "heads": numbers, "format_lengths": numbers}
    for name, reader in readers.items():
        try:
            read[name] = reader(getattr(cfg, name))
        except ValueError:
            raise InputError(f"--{name} {getattr(cfg, name)}: see --help for its form") from None
    if unknown := set(read["reward_weights"]) - set(REWARDS):
        raise InputError(f"--reward_weights: no reward {unknown.pop()!r}; there are {', '.join(REWARDS)}")
    if len(read["format_lengths"] or []) != 2:
        raise InputError(f"--format_lengths {cfg.format_lengths}: give two, shortest,longest")
    return cfg
