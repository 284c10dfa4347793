"""Every setting of a run is a flag. Only the standard library is imported at the top, so that
`--help` and mistyped flags are answered before torch loads."""

import argparse
import io
import math
import operator
import os
import re
import runpy
import signal
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """An error caused by user input. The program prints its message, one line, and exits with 2."""


def flag(default, help, may_change=False, choices=None, **limits):
    """A setting. `may_change`: a resumed run may change it; the earlier steps stay as they are.
    `limits`: minimum and maximum (inclusive), above and below (exclusive). A count is at most 10^6,
    unless it has a maximum of its own."""
    if type(default) is int:
        limits = limits | {"maximum": limits.get("maximum", 10**6)}
    metadata = dict(help=help, may_change=may_change, choices=choices, limits=limits)
    return field(default=default, metadata=metadata)


@dataclass
class Config:
    """Each field is a flag of the same name. Settings that TRL has use TRL's name."""

    # data
    dataset: str = flag("scenes", "scenes (generated), or a .jsonl file, see docs/data.md")
    skip_bad_examples: bool = flag(False, "skip and count unusable examples", may_change=True)
    allow_absolute_paths: bool = flag(False, "allow images in other folders", may_change=True)
    boxes: str = flag(
        "",
        "unit of the boxes; by default pixels, but refused if they look like another unit",
        choices=["pixels", "0-1", "0-100", "0-1000", "xywh"],
    )
    instruction: str = flag(
        "First say where in the image the answer is and what you see there. "
        "Then give the answer alone, as <answer>...</answer>.",
        "text appended to every question",
    )
    # model
    model_name_or_path: str = flag(
        "Qwen/Qwen3-VL-2B-Instruct", "hub name or folder of a Qwen2.5-VL, Qwen3-VL or InternVL3.5"
    )
    load_in_4bit: bool = flag(True, "quantize the language model to NF4 with double quantization")
    lora_r: int = flag(16, "rank of the LoRA adapter", minimum=1, maximum=1024)
    lora_alpha: int = flag(32, "LoRA's output is multiplied by alpha / r", minimum=1)
    adapter: str = flag("", "start from this adapter; KL is still measured against the base model")
    gradient_checkpointing: bool = flag(
        True, "recompute activations in the backward pass to save memory", may_change=True
    )
    max_pixels: int = flag(2**18, "downscale larger images to this area", minimum=1, maximum=2**24)
    device: str = flag(
        "auto", "auto: CUDA if found, else CPU", may_change=True, choices=["auto", "cuda", "cpu"]
    )
    deterministic: bool = flag(False, "use slower, deterministic CUDA kernels, for exact resume")
    cuda_graph: bool = flag(False, "sample with a CUDA graph; untested on a GPU", may_change=True)
    # training
    max_steps: int = flag(200, "optimizer steps", may_change=True, minimum=0)
    num_generations: int = flag(8, "G, completions per question", minimum=2, maximum=1024)
    prompts_per_step: int = flag(4, "questions per optimizer step", minimum=1, maximum=1024)
    completions_per_forward: int = flag(
        0, "0: one group; below G saves memory; from 2 G, groups share", may_change=True, minimum=0
    )
    max_completion_length: int = flag(
        110, "maximum tokens of a completion", minimum=1, maximum=2**14
    )
    temperature: float = flag(1.0, "used for sampling and scoring (no top-p)", minimum=0.01)
    learning_rate: float = flag(5e-6, "peak learning rate of AdamW", minimum=0)
    lr_scheduler_type: str = flag("cosine", "after the warm-up", choices=["cosine", "constant"])
    warmup_steps: int = flag(5, "steps of linear warm-up", minimum=0)
    weight_decay: float = flag(0.01, "weight decay of AdamW", minimum=0)
    max_grad_norm: float = flag(0.8, "clip the gradient to this norm; 0 or less disables clipping")
    beta: float = flag(0.001, "weight of the KL penalty; 0 saves a forward pass", minimum=0)
    epsilon: float = flag(0.2, "clip range of the ratio if num_iterations > 1", above=0, below=1)
    num_iterations: int = flag(1, "optimizer updates per batch of completions", minimum=1)
    seed: int = flag(0, "seed of LoRA, samples and training scenes", minimum=0, maximum=2**63 - 1)
    # reward
    reward_weights: str = flag(
        "attention=1,format=1,accuracy=0", "name=weight pairs; all rewards are logged"
    )
    reward: str = flag("", "your own: file.py:function or file.py:one,two, see docs/extending.md")
    token_fraction: float = flag(
        0.3, "fraction of tokens that the attention reward uses", above=0, maximum=1
    )
    alignment: str = flag(
        "query",
        "attention row of a token: its own, or the one that predicts it",
        choices=["query", "predict"],
    )
    region: str = flag(
        "boxes",
        "what to look at; rolled, a placebo, moves the boxes by half the image",
        choices=["boxes", "rolled"],
    )
    layers: str = flag("-1", "layers to average: all, or 2,3, or --layers=-2,-1")
    heads: str = flag("all", "heads of those layers: all, or 0,3")
    format_lengths: str = flag("60,100", "min,max tokens that earn the full format reward")
    # evaluation
    eval_examples: int = flag(
        -1, "held-out questions to evaluate; -1 is all, 0 holds out none", minimum=-1
    )
    eval_dataset: str = flag("", "evaluate on this .jsonl file, and train on all of --dataset")
    # run
    output_dir: str = flag("runs/sayo", "folder of everything a run writes", may_change=True)
    save_steps: int = flag(20, "steps between checkpoints", may_change=True, minimum=1)
    keep_best: bool = flag(
        False, "end with the adapter after the save_steps steps with the most right samples"
    )
    report_to: str = flag(
        "none",
        "also log to this tracker, which must be installed",
        may_change=True,
        choices=["none", "tensorboard", "wandb", "trackio"],
    )
    resume: bool = flag(False, "continue the run in output_dir with its settings", may_change=True)

    @cached_property
    def rewards(self):
        """Name -> function from RewardInputs to G floats: `reward.REWARDS`, and those of --reward.
        Raises: InputError."""
        from reward import REWARDS

        return REWARDS | load_rewards(self.reward)


FIELDS = {f.name: f for f in fields(Config)}

# Defaults for the model in tiny/, which is small, already knows the format and learns fast. The
# learning rate was chosen on validation scenes, see docs/evidence.md.
TINY = dict(
    model_name_or_path="tiny",
    gradient_checkpointing=False,
    max_pixels=112 * 112,
    instruction="",
    max_steps=60,
    prompts_per_step=8,
    max_completion_length=34,
    learning_rate=2e-4,
    format_lengths="10,19",
    completions_per_forward=64,
)


def model_path(name):
    """Where to load a model from; "tiny" is the model that ships here, wherever that is."""
    return str(ROOT / "tiny") if name == "tiny" else name


def is_tiny(model):
    return Path(model_path(model)).resolve() == ROOT / "tiny"


def parse_ints(text):
    """[0, 3] from "0,3"; None from "all"."""
    return None if text == "all" else [int(number) for number in text.split(",")]


def parse_lengths(text):
    """(60, 100) from "60,100". Raises: ValueError."""
    shortest, longest = (int(number) for number in text.split(","))
    if not 0 <= shortest <= longest or longest == 0:
        raise ValueError
    return shortest, longest


def parse_weights(text):
    """{"attention": 1.0, "format": 0.5} from "attention=1,format=0.5". Raises: ValueError."""
    pairs = [item.split("=") for item in text.split(",")]
    weights = {name.strip(): float(weight) for name, weight in pairs}
    finite = all(map(math.isfinite, weights.values()))
    if len(weights) < len(pairs) or not finite or not any(weights.values()):
        raise ValueError
    return weights


def parse_reward(text):
    """("mine.py", ["iou", "judge"]) from "mine.py:iou,judge". Raises: ValueError."""
    path, _, names = text.rpartition(":")
    names = names.split(",") if text else []
    if not all(path and name.isidentifier() for name in names):
        raise ValueError
    return path, names


def load_rewards(text):
    """The functions that --reward names, as {name: function}. Raises: InputError."""
    path, names = parse_reward(text)
    if names:
        sys.path.append(str(Path(path).resolve().parent))  # for modules next to the file
    functions = runpy.run_path(path) if names else {}
    for name in names:
        if not callable(functions.get(name)):
            raise InputError(f"--reward: {path} has no function {name}")
    return {name: functions[name] for name in names}


FORMS = {  # settings that are text with a form of its own: (parser, what it expects)
    "reward_weights": (
        parse_weights,
        "name=weight pairs such as attention=1,format=1: each reward once, not all 0",
    ),
    "reward": (parse_reward, "file.py:function, or file.py:one,two"),
    "layers": (parse_ints, "all, or integers such as 2,3"),
    "heads": (parse_ints, "all, or integers such as 0,3"),
    "format_lengths": (parse_lengths, "two integers min,max such as 60,100"),
}


# --- the command line ---

COMMANDS = {
    "train": "train, and evaluate before and after (the default)",
    "look": "ask about one image and draw where the model looks",
    "probe": "measure how well each layer and head finds the region, without training",
    "check": "validate a .jsonl data set and draw its boxes; loads no model",
    "fit": "predict the GPU memory of a run, and which cards it fits on; needs no GPU",
}
OTHER_FLAGS = {  # flags of other programs that difflib would not find -> what they are here
    "lr": "--learning_rate",
    "iters max_iters steps": "--max_steps",
    "group_size n_generations": "--num_generations",
    "num_train_epochs num_epochs epochs": "--max_steps (an epoch: questions / --prompts_per_step)",
    "per_device_train_batch_size batch_size": "--prompts_per_step",
    "model": "--model_name_or_path",
    "max_new_tokens": "--max_completion_length",
    "resume_from_checkpoint": "--resume",
}
GROUPS = {  # the first flag of each group in --help -> its title
    "dataset": "data",
    "model_name_or_path": "model",
    "max_steps": "training",
    "reward_weights": "reward",
    "eval_examples": "evaluation",
    "output_dir": "run",
}


def parse_command_line(argv):
    """Parse the command line. Returns: (command, a dict of the flags that were passed).
    Raises: InputError for a flag that is unknown, not used by the command, or out of range."""
    command, argv = (argv[0], argv[1:]) if argv and argv[0] in COMMANDS else ("train", argv)
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {command} [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse  # argparse would print its usage as well
    if command == "train":
        lines = [f"  {name:7} {text}" for name, text in COMMANDS.items()]
        parser.description = "\n".join(["commands, each with its own --help:", *lines])
        parser.add_argument("--version", action="version", version=f"sayo-mini {VERSION}")
        add_all_flags(parser)
    else:
        from extras.commands import add_arguments  # here, because a training run needs no command

        add_arguments(parser, command)
    for text in argv:
        if re.search("[\ud800-\udfff]", text):  # safetensors could not open such a path
            refuse(f"{text!r} is not UTF-8: rename the file or folder")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if name.removeprefix("--") in FIELDS:
            refuse(f"{command} does not use {name}")
        meant = likely_meant(name, command, parser)
        question = f": did you mean {meant[0]}?" if meant else ""
        refuse(f"unrecognized arguments: {' '.join(unknown)}{question}")
    check_settings(vars(given))
    return command, vars(given)


def likely_meant(name, command, parser):
    """What an unknown argument may stand for, a list, the most likely first."""
    bare = name.strip("-").replace("-", "_")
    if bare == name and Path(name).suffix:  # a file
        return [f"--image {name}" if command == "look" else f"--dataset {name}"]
    known = [flag for names, flag in OTHER_FLAGS.items() if bare in names.split()]
    return known + get_close_matches(name, [*parser._option_string_actions, *COMMANDS], 1)


def add_all_flags(parser, without=""):
    group = parser
    for name in [name for name in FIELDS if name != without]:
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        add_flag(group, name)


def add_flag(group, name):
    setting = FIELDS[name]
    choices, default = setting.metadata["choices"], shown(setting.default)
    if name in TINY and name != "model_name_or_path":
        default = f"{default}; tiny: {shown(TINY[name])}"
    help = f"{setting.metadata['help']} (default: {default})".replace("%", "%%")
    if setting.type is bool:
        how = dict(action=argparse.BooleanOptionalAction)
    else:
        how = dict(type=setting.type, choices=choices, metavar=None if choices else "X")
    group.add_argument(f"--{name}", help=help, **how)


def shown(value):
    return "none" if value == "" else value


def refuse(message):
    raise InputError(f"{message} (see --help)")


def check_command_line(argv):
    """Before torch loads, answer --help and refuse mistakes. While it loads, Ctrl-C kills the
    program: a KeyboardInterrupt inside the import of a C extension can be lost."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if stream := getattr(sys, name):  # None if it was closed
            file = io.BufferedWriter(Output(number, "w", closefd=False))
            settings = stream.encoding, "backslashreplace"  # escape what a terminal cannot show
            setattr(sys, name, io.TextIOWrapper(file, *settings, line_buffering=True))
    try:
        check_versions()
        check_paths(parse_command_line(argv)[1])
    except (InputError, OSError) as error:  # such as a path that may not be read
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


REQUIRED = {  # library -> the lowest version that works, and the first one that was not tested
    "torch": ("2.11", None),
    "transformers": ("5.23", "5.25"),
    "bitsandbytes": ("0.50", "0.51"),
    "peft": ("0.21", "0.22"),
}


def check_versions():
    """Before torch loads, refuse libraries that this program does not, or might not, work with.
    Raises: InputError."""

    def numbers(text):
        return [int(number) for number in re.findall(r"\d+", text)[:2]]

    for name, (lowest, above) in REQUIRED.items():
        wanted = f"{name}>={lowest}" + (f",<{above}" if above else "")
        try:
            found = version(name)
        except PackageNotFoundError:
            raise InputError(f"{name} is not installed: pip install '{wanted}'") from None
        if numbers(found) < numbers(lowest) or above and numbers(found) >= numbers(above):
            raise InputError(f"{name} {found} is not supported: pip install '{wanted}'")


class Output(io.FileIO):
    """Standard output or error. If nobody reads it any more (`| head -1`, a lost terminal, a full
    disk), the text is dropped, and training goes on."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def one_line(error, folder=None):
    """An error as one line. The traceback of an unexpected one goes to a file, in the folder of the
    run if there is one."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which may not be loaded yet
        resumed = "lower --completions_per_forward, which a resumed run may change (0 is G)"
        return f"out of GPU memory: {resumed}; `fit` says what helps a new run"
    text = str(error).strip().split("\n")[0]
    if isinstance(error, OSError):  # a full disk, a missing file
        return text
    text = f"{type(error).__name__}: {text[:300]}"
    try:
        if not folder or not Path(folder, "config.json").exists():
            folder = tempfile.mkdtemp(prefix="sayo-mini-")
        path = Path(folder, "traceback.txt")
        path.write_text("".join(traceback.format_exception(error)), "utf-8", "backslashreplace")
    except OSError:  # a full disk
        return text
    return f"{text}; traceback: {path}"


def check_paths(given):
    """Before torch loads, refuse paths that do not exist. Raises: InputError."""
    missing = "No such file or directory"
    own = parse_reward(given.get("reward", ""))[0] or None
    names = ("data set", "dataset"), ("data set", "eval_dataset"), ("image", "image")
    for what, path in [*((what, given.get(name)) for what, name in names), ("reward", own)]:
        if path not in (None, "scenes") and (Path(path).is_dir() or not Path(path).exists()):
            reason = "it is a folder" if Path(path).is_dir() else missing
            raise InputError(f"cannot read the {what} {path}: {reason}")
    adapter, file = given.get("adapter"), "adapter_config.json"
    if adapter and not Path(adapter, file).is_file():
        inner = Path(adapter, "adapter")
        hint = f"did you mean --adapter {inner}?" if inner.is_dir() else f"{file}: {missing}"
        raise InputError(f"no adapter in {adapter}: {hint}")
    model = given.get("model_name_or_path", "tiny")
    if re.match(r"[./~]|.*\\|.*/.*/", model) and not Path(model).is_dir():
        raise InputError(f"cannot load {model}: {missing}")
    folder = Path(given.get("output_dir", Config.output_dir))
    if given.get("resume") and not (folder / "config.json").exists():
        raise InputError(f"no run in {folder}: cannot read config.json: {missing}")
    if folder.is_file():
        raise InputError(f"--output_dir {folder}: it is a file, not a folder")
    if not (parent := Path(given.get("output", "look.png")).parent).is_dir():
        raise InputError(f"--output {given['output']}: the folder {parent} does not exist")
    if "image" in given and os.path.realpath(given["image"]) == os.path.realpath(given["output"]):
        raise InputError(f"--output {given['output']}: it would replace --image")


# --- from flags to a Config ---


def check_settings(settings):
    """Raises: InputError that names the first flag that cannot work, and values that can."""
    for name, value in settings.items():
        if name in FORMS:
            parse, form = FORMS[name]
            try:
                parse(value)
            except ValueError:
                raise InputError(f"--{name} {value}: expected {form}") from None
        elif name in FIELDS:
            check_range(name, value)


LIMITS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def check_range(name, value):
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--{name} {value}: must be a finite number")
    limits = FIELDS[name].metadata["limits"]
    if not all(LIMITS[kind][0](value, limit) for kind, limit in limits.items()):
        allowed = " and ".join(f"{LIMITS[kind][1]} {limit}" for kind, limit in limits.items())
        raise InputError(f"--{name} {value}: must be {allowed}")


def build_config(given, base=None):
    """A Config from the flags `given`, then `base` (a saved run's settings, or the tiny preset),
    then the defaults. Raises: InputError that names the flag that cannot work."""
    if base is None:
        base = TINY if uses_tiny_model(given) else {}
    if given.get("adapter"):  # rank and alpha come from the adapter
        from model import adapter_settings  # here, because it loads torch

        base = base | adapter_settings(given["adapter"], given)
    cfg = Config(**(base | given))
    check_settings(asdict(cfg))
    from reward import REWARDS

    weighted, own = parse_weights(cfg.reward_weights), parse_reward(cfg.reward)[1]
    if unknown := set(weighted) - set(REWARDS) - set(own):
        known = ", ".join([*REWARDS, *own])
        raise InputError(f"--reward_weights: no reward {unknown.pop()!r}; known: {known}")
    if taken := {*REWARDS, "step", "id", "question", "answer", "text", "advantage"} & set(own):
        name = taken.pop()
        raise InputError(
            f"--reward: samples.jsonl has a column {name} already: rename the function"
        )
    if unused := set(own) - set(weighted):
        name = unused.pop()
        advice = f"--reward_weights {cfg.reward_weights},{name}=1"
        raise InputError(f"--reward: {name} has no weight: pass {advice}")
    return cfg


def uses_tiny_model(given):
    if "model_name_or_path" in given:
        return is_tiny(given["model_name_or_path"])
    from model import choose_device

    if choose_device(given.get("device"))[0].type == "cuda":
        return False
    print("running on the CPU: using the tiny model in tiny/ (--model_name_or_path overrides it)")
    return True
