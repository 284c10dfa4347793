"""The command line, and the subcommands other than `train`, a file each."""

import os
import warnings

# Before torch loads: nothing is compiled here, and the compiler takes a second to load.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)  # names that transformers will drop


def run_subcommand(command, given, load_model):
    """Run `look`, `probe` or `check` with the flags `given`; each imports only what it needs.

    Args: load_model, from a Config to a Vlm. Returns: the exit code.
    """
    if command == "check":
        from commands.check import check_dataset

        return check_dataset(**given)
    if command == "look":
        from commands.look import run_look

        return run_look(given, load_model)
    from commands.parser import build_config, run_config
    from commands.probe import run_probe
    from sources import load_datasets

    cfg = run_config(given) if given.get("resume") else build_config(given)
    return run_probe(load_model(cfg), load_datasets(cfg)[0], cfg)
