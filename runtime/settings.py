"""The rules for settings: ranges, how config.json stores them, and what a resumed run may change.
torch is not imported here, so that mistakes are reported before it loads."""

import json
import math
import operator
from dataclasses import asdict, fields
from pathlib import Path

from config import ROOT, Config, InputError, parse_ints, parse_weights
from runtime.run_folder import CHECKPOINTS, checkpoint_settings, holds_run

FIELDS = {f.name: f for f in fields(Config)}
IGNORED = ("probe", "made_with")  # keys of config.json that are no settings; probe: of old versions
FORMS = {  # settings that are parsed: (parser, the form it expects)
    "reward_weights": (parse_weights, "name=weight pairs such as attention=1,format=1"),
    "layers": (parse_ints, "all, or integers such as 2,3"),
    "heads": (parse_ints, "all, or integers such as 0,3"),
    "format_lengths": (parse_ints, "two integers min,max such as 60,100"),
}
LIMITS = {
    "minimum": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "maximum": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


# --- ranges ---


def check_settings(settings):
    """Args: settings, a dict of some or all settings. Raises: InputError that names the flag that
    cannot work, and values that can."""
    for name, value in settings.items():
        if name in FIELDS:
            check_range(name, value)
    parsed = {name: parse(name, settings[name]) for name in FORMS if name in settings}
    if "format_lengths" in parsed:
        lengths = parsed["format_lengths"] or []
        if len(lengths) != 2 or not 0 <= lengths[0] <= lengths[1] or lengths[1] == 0:
            raise wrong_form("format_lengths", settings["format_lengths"])
    if "reward_weights" in parsed:
        check_weights(settings["reward_weights"], parsed["reward_weights"])
    check_mix(settings)


def parse(name, text):
    try:
        return FORMS[name][0](text)
    except ValueError:
        raise wrong_form(name, text) from None


def wrong_form(name, text):
    return InputError(f"--{name} {text}: expected {FORMS[name][1]}")


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
        raise InputError(f"--reward_weights {text}: each reward must occur once")
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise InputError(f"--reward_weights {text}: weights must be finite numbers")
    if not any(weights.values()):
        raise InputError(f"--reward_weights {text}: all are 0, so there is nothing to learn from")


def check_mix(settings):
    dataset = settings.get("dataset", Config.dataset)
    single = "+" not in dataset or Path(dataset).exists()
    if settings.get("mix") and single and not settings.get("resume"):
        advice = f"--dataset {dataset} is a single data set; join several with +, or omit --mix"
        raise InputError(f"--mix {settings['mix']}: {advice}")


# --- config.json ---


def stored_settings(cfg):
    """The settings of a run as config.json and checkpoints store them. This checkout's tiny/ is
    stored as "tiny", so that a checkout can be moved."""
    settings = asdict(cfg) | {"resume": False}
    return settings | {"model_name_or_path": stored_model(cfg.model_name_or_path)}


def stored_model(name):
    path = Path(name)
    if path.name != "tiny" or not path.is_dir():
        return name
    return "tiny" if path.resolve() == ROOT / "tiny" else str(path.resolve())


def local_model(name):
    """The model that a stored name refers to here. Earlier versions stored an absolute path to
    tiny/, which no longer exists if the checkout was moved."""
    path = Path(name)
    moved = path.is_absolute() and path.name == "tiny" and not path.exists()
    return str(ROOT / "tiny") if name == "tiny" or moved else name


def load_saved(folder):
    """The settings stored in a run's folder: in config.json or, if it is damaged or missing, in a
    checkpoint. Returns: a dict, or None if config.json is missing and no checkpoint has settings.
    Raises: InputError if config.json is damaged and no checkpoint has settings."""
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
    advice = "delete it and run again with the run's own flags"
    raise InputError(f"{path} {problem}: {advice}" + " and --resume" * holds_run(folder))


def read_settings(saved):
    """Check the types of stored settings. Returns: a dict. Raises: ValueError."""
    if not isinstance(saved, dict):
        raise ValueError("it is not a JSON object")
    settings = {name: value for name, value in saved.items() if name not in IGNORED}
    for name, value in settings.items():
        if name not in FIELDS:
            raise ValueError(f"{name} is not a setting")
        kind = FIELDS[name].type
        if kind is float and type(value) is int:
            settings[name] = float(value)
        elif type(value) is not kind:
            raise ValueError(f"{name} is {value!r}, not of type {kind.__name__}")
    if name := settings.get("model_name_or_path"):
        settings["model_name_or_path"] = local_model(name)
        if Path(name).is_absolute() and local_model(name) != name:
            print(f"{name} does not exist: using the model in {local_model(name)}")
    return settings


# --- resuming ---


def changes(saved, settings):
    """{name: (old, new)} of the settings that differ between two dicts. Settings that `saved` lacks
    were added by a later version of the program."""
    saved, settings = dict(saved), dict(settings)
    for each in (saved, settings):
        if name := each.get("model_name_or_path"):
            each["model_name_or_path"] = stored_model(local_model(name))
    common = saved.keys() & settings.keys() - {"output_dir", "resume"}
    names = [name for name in FIELDS if name in common]
    return {n: (saved[n], settings[n]) for n in names if saved[n] != settings[n]}


def fixed_changes(saved, settings):
    """The `changes` that a resumed run must not make."""
    found = changes(saved, settings).items()
    return {name: pair for name, pair in found if not FIELDS[name].metadata["may_change"]}


def check_checkpoint(path, settings):
    """Raises: InputError if a checkpoint was made with settings that differ from the run's."""
    for name, (old, new) in fixed_changes(checkpoint_settings(path), settings).items():
        problem = f"{name} is {new} in config.json, but {old} in {path.name}"
        advice = "delete config.json to resume with the checkpoint's settings"
        raise InputError(f"{path.parent}: {problem}; is it from a different run? {advice}")


def check_resumed(saved, given, folder):
    """Print which flags beside --resume change a setting of the run, `saved`. Raises: InputError
    for a change that would invalidate the steps already made."""
    advice = "omit it, or start a new run in a different --output_dir"
    if not holds_run(folder):
        advice = "no step was made yet, so omit --resume to start with new settings"
    for name, (old, new) in fixed_changes(saved, given).items():
        raise InputError(f"--{name} {new}: the run in {folder} has {old}; {advice}")
    found = changes(saved, given)
    old, new = found.get("max_steps", (0, 0))
    if new < old:
        raise InputError(f"--max_steps {new}: the run in {folder} has {old}, and it can only grow")
    schedule = saved.get("lr_scheduler_type", Config.lr_scheduler_type)
    rate = f"the learning rate now follows a {schedule} over {new} steps, so it jumps"
    if schedule == "constant":
        rate = "the learning rate stays constant"
    consequence = {
        "max_steps": rate,
        "device": "results will not be bit-identical",
        "completions_per_forward": "results will not be bit-identical",
    }
    for name, (old, new) in found.items():
        note = f": {consequence[name]}" if name in consequence else ""
        print(f"{name} {old} -> {new}{note}")
