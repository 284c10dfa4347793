"""The command line: the subcommands, a flag for every setting, and the Config they make.
`parse_command_line` loads no torch."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from config import ROOT, TINY, Config, InputError, parse_ints, parse_weights

REMOVED = ("probe",)  # settings that config.json of an earlier version may hold
COMMANDS = {
    "train": "train, and evaluate before and after (the default)",
    "look": "ask about one image and draw where the model looks",
    "probe": "measure how well each layer and head finds the region, without training",
    "check": "validate a .jsonl data set and draw its boxes; loads no model",
}


def parse_command_line(argv, program="sayo_mini.py"):
    """Split the command line. Returns: (command, the flags that were given as a dict, a notice for
    the user or None). Raises: InputError, before anything is loaded or written."""
    argv, notice = list(argv), None
    if argv[:1] == ["--check_dataset"]:  # the forms of the last release
        argv[0], notice = "check", "--check_dataset is now `python sayo_mini.py check`"
    elif "--probe" in argv:
        argv.remove("--probe")
        argv, notice = ["probe", *argv], "--probe is now `python sayo_mini.py probe`"
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "train"
    return command, vars(make_parser(command, program).parse_args(argv)), notice


def make_parser(command, program):
    about = COMMANDS[command]
    if command == "train":
        others = "\n".join(f"  {program} {name:6} {text}" for name, text in COMMANDS.items())
        about = f"Commands, each with its own --help:\n{others}"
    parser = argparse.ArgumentParser(
        f"{program} {command}",
        usage="%(prog)s [--flag value ...]" + " dataset" * (command == "check"),
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = refuse
    if command == "check":
        parser.add_argument("dataset", help="the .jsonl file")
        parser.add_argument("--allow_absolute_paths", action="store_true")
        return parser
    if command == "look":
        parser.add_argument("--image", required=True, help="any image that Pillow reads")
        parser.add_argument("--question", required=True)
        parser.add_argument("--box", metavar="x1,y1,x2,y2", help="pixels; drawn, and scored")
        parser.add_argument("--output", default="look.png", help="the picture (default: look.png)")
    for f in fields(Config):
        how = dict(type=f.type, metavar="X", choices=f.metadata["choices"])
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        default = f"default: {f.default}"
        if f.name in TINY and f.name != "model_name_or_path":
            default += f"; tiny: {TINY[f.name] or 'none'}"
        help = f"{f.metadata['help']} ({default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", help=help, **how)
    return parser


def check_command_line(argv, program="sayo_mini.py"):
    """Answer --help, and end the program here if a flag is wrong."""
    try:
        parse_command_line(argv)
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)


def refuse(message):  # argparse would print its usage as well; here a mistake is one line
    raise InputError(f"{message} (--help explains every flag)")


def parse_config(argv):
    """The Config of a run, new or resumed, from the flags of `train`."""
    return run_config(parse_command_line(argv)[1])


def run_config(given):
    """The Config of a run, new or resumed, from the flags `given`.
    Raises: InputError if the folder holds another run."""
    folder = Path(given.get("output_dir", Config.output_dir))
    if given.get("resume") and (folder / "config.json").exists():
        return build_config(given, load_saved(folder))
    if (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoint*.safetensors")):
        raise InputError(
            f"{folder} holds a run: give --resume to continue, or another --output_dir"
        )
    return build_config(given)


def load_saved(folder):
    """The settings that a run left in its folder. Raises: InputError if they are damaged."""
    path, types = folder / "config.json", {f.name: f.type for f in fields(Config)}
    try:
        saved = json.loads(path.read_text())
        settings = {name: value for name, value in saved.items() if name not in REMOVED}
        if all(type(value) is types[name] for name, value in settings.items()):
            return settings
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise InputError(f"{path} is damaged: remove it, and give the run's flags again with --resume")


def build_config(given, base=None):
    """A Config from the flags `given`, over `base` (a saved run's settings, else the tiny preset
    where it applies), over the defaults. Raises: InputError naming the flag that cannot work."""
    if base is None:
        base = TINY if uses_tiny_model(given) else {}
    cfg = Config(**(base | given))
    for f in fields(cfg):
        if f.metadata["minimum"] is not None and not getattr(cfg, f.name) >= f.metadata["minimum"]:
            value = f"--{f.name} {getattr(cfg, f.name)}"
            raise InputError(f"{value}: must be at least {f.metadata['minimum']}")
    parsers = dict(
        reward_weights=parse_weights, layers=parse_ints, heads=parse_ints, format_lengths=parse_ints
    )
    parsed = {}
    for name, parse in parsers.items():
        try:
            parsed[name] = parse(getattr(cfg, name))
        except ValueError:
            raise InputError(f"--{name} {getattr(cfg, name)}: see --help for its form") from None
    from reward import REWARDS  # here, because it loads torch

    if unknown := set(parsed["reward_weights"]) - set(REWARDS):
        raise InputError(
            f"--reward_weights: no reward {unknown.pop()!r}; known: {', '.join(REWARDS)}"
        )
    if len(parsed["format_lengths"] or []) != 2:
        raise InputError(f"--format_lengths {cfg.format_lengths}: give two, shortest,longest")
    return cfg


def uses_tiny_model(given):
    if "model_name_or_path" in given:
        return Path(given["model_name_or_path"]).resolve() == ROOT / "tiny"
    import torch

    if given.get("device") != "cpu" and torch.cuda.is_available():
        return False
    print("no CUDA: using the tiny model in tiny/ (--model_name_or_path selects another)")
    return True
