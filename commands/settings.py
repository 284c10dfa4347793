"""The rules for settings: their ranges, how config.json holds them, and what may change when a run
is resumed. No torch here, so that a mistake is answered before it loads."""

import json
import math
import operator
from dataclasses import asdict, fields
from pathlib import Path

from commands.run_folder import CHECKPOINTS, checkpoint_settings, holds_run
from config import ROOT, Config, InputError, parse_ints, parse_weights

FIELDS = {f.name: f for f in fields(Config)}
IGNORED = ("probe", "made_with")  # what config.json holds that is no setting; probe: in the past
LIMITS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


# --- ranges ---


def check_settings(settings):
    """Args: settings, a dict of some or all of them. Raises: InputError naming the flag that cannot
    work, and what would."""
    for name, value in settings.items():
        if name in FIELDS:
            check_range(name, value)
    parsers = dict(
        reward_weights=parse_weights, layers=parse_ints, heads=parse_ints, format_lengths=parse_ints
    )
    parsed = {}
    for name in [name for name in parsers if name in settings]:
        try:
            parsed[name] = parsers[name](settings[name])
        except ValueError:
            raise InputError(f"--{name} {settings[name]}: see --help for its form") from None
    if "format_lengths" in parsed:
        lengths = parsed["format_lengths"] or []
        if len(lengths) != 2 or not 0 <= lengths[0] <= lengths[1]:
            advice = "give two, shortest,longest, as in 60,100"
            raise InputError(f"--format_lengths {settings['format_lengths']}: {advice}")
    if "reward_weights" in parsed:
        check_weights(settings["reward_weights"], parsed["reward_weights"])
    check_mix(settings)


def check_range(name, value):
    metadata, flag = FIELDS[name].metadata, f"--{name} {value}"
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{flag}: must be a finite number")
    if not all(LIMITS[kind][0](value, limit) for kind, limit in metadata["limits"].items()):
        words = (f"{LIMITS[kind][1]} {limit}" for kind, limit in metadata["limits"].items())
        raise InputError(f"{flag}: must be {' and '.join(words)}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise InputError(f"{flag}: must be one of {', '.join(metadata['choices'])}")


def check_weights(text, weights):
    if text.count("=") != len(weights):
        raise InputError(f"--reward_weights {text}: give each reward once")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise InputError(f"--reward_weights {text}: weights must be finite numbers")
    if not any(weights.values()):
        raise InputError(f"--reward_weights {text}: all are 0, so there is nothing to learn from")


def check_mix(settings):
    dataset = settings.get("dataset", Config.dataset)
    single = "+" not in dataset or Path(dataset).exists()
    if settings.get("mix") and single and not settings.get("resume"):
        advice = (
            f"--dataset {dataset} is a single data set; join several with +, or leave out --mix"
        )
        raise InputError(f"--mix {settings['mix']}: {advice}")


# --- config.json ---


def stored_settings(cfg):
    """The settings of a run as config.json and its checkpoints hold them. The model of this
    checkout is just "tiny" there, so that a checkout can be moved."""
    settings = asdict(cfg) | {"resume": False}
    return settings | {"model_name_or_path": stored_model(cfg.model_name_or_path)}


def stored_model(name):
    path = Path(name)
    if path.name != "tiny" or not path.is_dir():
        return name
    return "tiny" if path.resolve() == ROOT / "tiny" else str(path.resolve())


def local_model(name):
    """The model that a stored name means here. Earlier versions stored an absolute path to tiny/,
    which is gone if the checkout was moved."""
    path = Path(name)
    moved = path.is_absolute() and path.name == "tiny" and not path.exists()
    return str(ROOT / "tiny") if name == "tiny" or moved else name


def load_saved(folder):
    """The settings that a run left in its folder: those in config.json or, if it is damaged or
    missing, in a checkpoint. Returns: None if it is missing and no checkpoint holds any. Raises:
    InputError if it is damaged and no checkpoint holds any."""
    path = folder / "config.json"
    try:
        return read_settings(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError) as error:
        problem = f"is damaged ({error})"
    for name in CHECKPOINTS:
        try:
            settings = read_settings(checkpoint_settings(folder / name))
        except ValueError:
            continue
        if settings:
            print(f"{path} {problem}: using the settings in {name}")
            return settings
    if problem == "is missing":
        return None
    advice = "remove it, and give the run's flags again"
    raise InputError(f"{path} {problem}: {advice}" + " with --resume" * holds_run(folder))


def read_settings(saved):
    """Check the types of stored settings. Returns: a dict. Raises: ValueError."""
    if not isinstance(saved, dict):
        raise ValueError("it is no JSON object")
    settings = {name: value for name, value in saved.items() if name not in IGNORED}
    for name, value in settings.items():
        if name not in FIELDS:
            raise ValueError(f"{name} is no setting")
        kind = FIELDS[name].type
        if kind is float and type(value) is int:
            settings[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{name} is {value!r}, which is no {kind.__name__}")
    if name := settings.get("model_name_or_path"):
        settings["model_name_or_path"] = local_model(name)
        if Path(name).is_absolute() and local_model(name) != name:
            print(f"{name} is gone: using the model in {local_model(name)}")
    return settings


# --- resuming ---


def changes(saved, settings):
    """{name: (value in saved, value in settings)} of what differs, both as dicts. What `saved` does
    not have came with a later version of the program."""
    saved, settings = dict(saved), dict(settings)
    for each in (saved, settings):
        if name := each.get("model_name_or_path"):
            each["model_name_or_path"] = stored_model(local_model(name))
    common = saved.keys() & settings.keys() - {"output_dir", "resume"}
    names = [name for name in FIELDS if name in common]
    return {n: (saved[n], settings[n]) for n in names if saved[n] != settings[n]}


def fixed_changes(saved, settings):
    """Those `changes` that a resumed run must not make."""
    found = changes(saved, settings).items()
    return {name: pair for name, pair in found if not FIELDS[name].metadata["may_change"]}


def check_checkpoint(path, settings):
    """Raises: InputError if a checkpoint is of other settings than those of the resumed run."""
    for name, (old, new) in fixed_changes(checkpoint_settings(path), settings).items():
        problem = f"{name} is {new} in config.json, but {old} in {path.name}"
        advice = "remove config.json, and --resume takes the checkpoint's settings"
        raise InputError(f"{path.parent}: {problem}: is it of another run? {advice}")


def check_resumed(saved, given, folder):
    """Announce the flags beside --resume that change a setting of the run, `saved`. Raises:
    InputError for a change that would make the steps already made wrong."""
    advice = "leave it out, or start another --output_dir"
    if not holds_run(folder):
        advice = "no step was made yet, so leave out --resume to start with other settings"
    for name, (old, new) in fixed_changes(saved, given).items():
        raise InputError(f"--{name} {new}: the run in {folder} has {old}; {advice}")
    found = changes(saved, given)
    old, new = found.get("max_steps", (0, 0))
    if new < old:
        raise InputError(f"--max_steps {new}: the run in {folder} has {old}, and can only grow")
    schedule = saved.get("lr_scheduler_type", Config.lr_scheduler_type)
    rate = f"from here on the learning rate is that of a {schedule} over {new} steps, so it jumps"
    if schedule == "constant":
        rate = "the learning rate stays constant"
    consequence = {
        "max_steps": rate,
        "device": "the bits will differ",
        "completions_per_forward": "the bits will differ",
    }
    for name, (old, new) in found.items():
        note = f": {consequence[name]}" if name in consequence else ""
        print(f"{name} {old} -> {new}{note}")
