"""The command line: subcommands, a flag for every setting, and the Config made from them.
`parse_command_line` does not load torch."""

import argparse
import signal
import sys
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from config import TINY, Config, InputError, is_tiny, parse_weights
from runtime.run_folder import check_folder, holds_run
from runtime.settings import FIELDS, check_resumed, check_settings, load_saved
from runtime.signals import leave_quietly_on_ctrl_c

PROGRAM = "python sayo_mini.py"
GROUPS = {  # groups of --help: title -> first setting; a group ends where the next one begins
    "data": "dataset",
    "model": "model_name_or_path",
    "training": "max_steps",
    "reward": "reward_weights",
    "evaluation": "eval_examples",
    "run": "output_dir",
}
USUAL = "dataset model_name_or_path max_steps num_generations learning_rate reward_weights layers"
USUAL = f"{USUAL} heads eval_examples output_dir resume".split()  # what most users change
EXAMPLES = {
    "train": (
        "",
        "--dataset mine.jsonl --output_dir runs/mine",
        "--resume --output_dir runs/mine",
    ),
    "look": (
        "look --image photo.jpg --question 'What color is the mug?' --box 310,120,402,233",
        "look --image example/two.png --question 'What color is the dot on the orange card?' "
        "--adapter runs/sayo/adapter",
    ),
    "probe": ("probe --dataset mine.jsonl --output_dir runs/probe",),
    "check": ("check mine.jsonl",),
    "fit": ("fit --model_name_or_path Qwen/Qwen3-VL-4B-Instruct --num_generations 16",),
    "compare": ("compare runs/a runs/b runs/c --output compare.html",),
}
COMMANDS = {
    "train": "train, and evaluate before and after (the default)",
    "look": "ask about one image and draw where the model looks",
    "probe": "measure how well each layer and head finds the region, without training",
    "check": "validate a .jsonl data set and draw its boxes; loads no model",
    "fit": "predict the GPU memory of a run, and which cards it fits on; needs no GPU",
    "compare": "draw the curves, results and settings of several runs on one page",
}
MODEL = "model_name_or_path load_in_4bit lora_r lora_alpha adapter max_pixels device"
ANSWER = "instruction max_completion_length token_fraction alignment"
DATA = "dataset data_dir mix skip_bad_examples allow_absolute_paths"
USED = {  # the settings that a command uses; train and fit use all, check and compare have none
    "look": f"{MODEL} {ANSWER} layers heads".split(),
    "probe": f"{DATA} {MODEL} {ANSWER} seed eval_examples output_dir resume".split(),
}
POSITIONAL = {"check": " dataset", "compare": " run run ..."}  # in the usage
HELP = {  # (command, setting) -> help and default that differ from those of training
    ("look", "adapter"): ("compare the model before training and with this adapter", "none"),
    ("look", "layers"): ("layers whose mean attention is drawn: all, or as 2,3", "-1; tiny: 3"),
    ("look", "heads"): ("heads of those layers: all, or as 0,3", "all; tiny: 2"),
    ("look", "token_fraction"): ("fraction of tokens in the map, highest entropy first", "0.3"),
    ("probe", "adapter"): ("probe the model with this adapter", "none"),
    ("probe", "token_fraction"): ("fraction of tokens in a map, highest entropy first", "0.3"),
    ("probe", "eval_examples"): ("training questions to measure on", "64"),
    ("probe", "output_dir"): ("folder for probe.png", "runs/probe"),
    ("probe", "resume"): ("use the settings of the run in output_dir", "False"),
}


def parse_command_line(argv, program=PROGRAM):
    """Parse the command line. Returns: (command, a dict of the flags that were passed, a notice for
    the user or None). Raises: InputError, before anything is loaded or written."""
    argv, notice = list(argv), None
    if argv[:1] == ["--check_dataset"]:  # the forms of the last release
        argv[0], notice = "check", "--check_dataset is deprecated: use `python sayo_mini.py check`"
    elif "--probe" in argv:
        argv.remove("--probe")
        argv, notice = ["probe", *argv], "--probe is deprecated: use `python sayo_mini.py probe`"
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "train"
    parser = make_parser(command, program)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [*parser._option_string_actions, *COMMANDS]
        nearest = get_close_matches(unknown[0].split("=")[0], known, 1)
        question = f": did you mean {nearest[0]}?" if nearest else ""
        refuse(f"unrecognized arguments: {' '.join(unknown)}{question}")
    check_settings(vars(given))
    unused = [f"--{name}" for name in vars(given) if name in FIELDS and not is_used(command, name)]
    if unused:
        notice = "\n".join(filter(None, [notice, f"{command} does not use {', '.join(unused)}"]))
    return command, vars(given), notice


def is_used(command, name):
    return name in USED.get(command, FIELDS)


def make_parser(command, program):
    parser = argparse.ArgumentParser(
        program if command == "train" else f"{program} {command}",
        usage="%(prog)s [--flag value ...]" + POSITIONAL.get(command, ""),
        description=describe(command, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse
    if command == "check":
        parser.add_argument("dataset", help="the .jsonl file")
        parser.add_argument("--allow_absolute_paths", action="store_true")
        return parser
    if command == "compare":
        parser.add_argument("runs", nargs="+", help="the folders of the runs")
        page_help = "output page (default: compare.html)"
        parser.add_argument("--output", default="compare.html", help=page_help)
        return parser
    if command == "look":
        parser.add_argument("--image", required=True, help="any image file that Pillow can read")
        parser.add_argument("--question", required=True, help="question about the image")
        box_help = "region in pixels, drawn and scored; can be repeated (--box=-9,... if negative)"
        parser.add_argument("--box", action="append", metavar="x1,y1,x2,y2", help=box_help)
        output_help = "output image; .gif makes an animation (default: look.png)"
        parser.add_argument("--output", default="look.png", help=output_help)
    if command == "fit":
        tokens_help = "tokens of the question, instruction and chat template (default: 128)"
        parser.add_argument("--prompt_tokens", type=whole_number, metavar="X", help=tokens_help)
    names = list(FIELDS)
    starts = sorted(map(names.index, GROUPS.values())) + [len(names)]
    for title, first in GROUPS.items():
        group, start = parser.add_argument_group(title), names.index(first)
        for name in names[start : starts[starts.index(start) + 1]]:
            add_flag(group, FIELDS[name], command)
    return parser


def describe(command, program):
    """The text of --help above the flags."""
    lines = ["examples:", *(f"  {program} {flags}".rstrip() for flags in EXAMPLES[command])]
    if program != PROGRAM:
        lines = ["train on several GPUs with TRL's GRPOTrainer; see docs/scaling.md", "", *lines]
    elif command == "train":
        lines += ["", "commands, each with its own --help:"]
        lines += [f"  {program} {name:7} {text}" for name, text in COMMANDS.items()]
    else:
        lines = [COMMANDS[command], "", *lines]
    return "\n".join(
        lines + ["", "* marks the flags that most users change"] * (command in ("train", "fit"))
    )


def add_flag(group, field, command):
    choices, name = field.metadata["choices"], field.name
    how = dict(type=TYPES.get(field.type, str), metavar=None if choices else "X", choices=choices)
    if field.type is bool:
        how = dict(action=argparse.BooleanOptionalAction)
    usual = "none" if field.default == "" else field.default
    text, default = HELP.get((command, name), (field.metadata["help"], usual))
    if name in TINY and name != "model_name_or_path" and (command, name) not in HELP:
        default = f"{default}; tiny: {'none' if TINY[name] == '' else TINY[name]}"
    mark = "* " * (name in USUAL and command in ("train", "fit"))
    help = f"{mark}{text} (default: {default})".replace("%", "%%")
    group.add_argument(
        f"--{name}", help=help if is_used(command, name) else argparse.SUPPRESS, **how
    )


def whole_number(text):
    """An int, also from "1e6". Raises: argparse.ArgumentTypeError."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = 0.5
    if not number.is_integer() or abs(number) > 2**53:  # above, floats leave out whole numbers
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(number)


TYPES = {int: whole_number, float: float}


def check_command_line(argv, program=PROGRAM):
    """Before torch loads, answer --help, refuse wrong flags and run `compare`. Until `main` runs,
    Ctrl-C ends the program without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        leave_quietly_on_ctrl_c()
    try:
        command, given, _ = parse_command_line(argv, program)
        if command == "compare":  # needs no torch
            from commands.compare import compare_runs

            sys.exit(compare_runs(**given))
        from sources.packages import check_packages  # here, because it loads torch

        check_packages()
    except InputError as error:
        print(f"{program.split()[-1]}: {error}", file=sys.stderr)
        sys.exit(2)


def refuse(message):  # argparse would print its usage as well
    raise InputError(f"{message} (see --help)")


def parse_config(argv):
    """The Config of a new or resumed run, from the flags of `train`."""
    return run_config(parse_command_line(argv)[1])


def run_config(given):
    """The Config of a new or resumed run, from the flags `given`. Raises: InputError if the folder
    already contains a run, or if the run cannot be resumed with these flags."""
    folder = Path(given.get("output_dir", Config.output_dir))
    check_folder(folder)
    if given.get("resume"):
        saved = load_saved(folder)
        if saved is None:
            return build_config(given)
        check_resumed(saved, given, folder)
        return build_config(given | {"output_dir": str(folder)}, saved)
    if holds_run(folder):
        raise InputError(
            f"{folder} already contains a run: --resume continues it, or choose a new --output_dir"
        )
    return build_config(given)


def build_config(given, base=None):
    """A Config from the flags `given`, then `base` (a saved run's settings, or the tiny preset),
    then the defaults. Raises: InputError that names the flag that cannot work."""
    if base is None:
        base = TINY if uses_tiny_model(given) else {}
    if given.get("adapter"):  # rank and alpha come from the adapter
        from sources.pretrained import adapter_settings

        base = base | adapter_settings(given["adapter"], given)
    cfg = Config(**(base | given))
    check_settings(asdict(cfg))
    from reward import REWARDS  # here, because it loads torch

    if unknown := set(parse_weights(cfg.reward_weights)) - set(REWARDS):
        raise InputError(
            f"--reward_weights: no reward {unknown.pop()!r}; known: {', '.join(REWARDS)}"
        )
    return cfg


def uses_tiny_model(given):
    if "model_name_or_path" in given:
        return is_tiny(given["model_name_or_path"])
    from sources.pretrained import choose_device

    if choose_device(given.get("device"))[0].type == "cuda":
        return False
    print("running on the CPU: using the tiny model in tiny/ (--model_name_or_path overrides it)")
    return True
