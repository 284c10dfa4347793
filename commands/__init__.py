"""The command line, and the subcommands other than `train`, a file each."""

import os
import sys
import warnings

# Before torch loads: nothing is compiled here, and the compiler takes a second to load.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# PEFT 0.21 asks transformers by the old name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Tensors of ever new lengths would leave GPU memory in pieces. Linux alone can join them.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def run_subcommand(command, given, load_model, train_step):
    """Run `look`, `probe`, `check` or `fit` with the flags `given`; each imports what it needs.

    Args: load_model, from a Config to a Vlm; train_step, that of sayo_mini. Returns: the exit code.
    """
    if command == "check":
        from commands.check import check_dataset

        return check_dataset(**given)
    if command == "fit":
        from commands.fit import run_fit

        return run_fit(given, train_step)
    if command == "look":
        from commands.look import run_look

        return run_look(given, load_model)
    from commands.probe import run_probe

    return run_probe(given, load_model)
