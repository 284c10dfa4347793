"""The command line, and one file per subcommand other than `train`."""

import os
import sys
import warnings

# Must be set before torch loads. Nothing is compiled, and the compiler takes a second to load.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# PEFT 0.21 uses the deprecated name.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
# Tensors of many different lengths would fragment GPU memory. Supported only on Linux.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def run_subcommand(command, given, load_model, train_step):
    """Run `look`, `probe`, `check` or `fit` and import only what it needs.

    Args: given, a dict of flags; load_model, a function from Config to Vlm; train_step, the
    function in sayo_mini. Returns: the exit code. Raises: InputError.
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
