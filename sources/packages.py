"""Finds installed packages that break imports. Colab's torchvision and torchao, for example, stop
working when a different PyTorch is installed, and transformers and PEFT try to import them."""

from importlib import import_module

from config import InputError

NOT_NEEDED = "torchvision torchaudio torchao"


def check_packages():
    """Import the libraries. Raises: InputError saying what to install or uninstall."""
    try:
        for name in ("transformers", "transformers.modeling_utils", "peft", "bitsandbytes"):
            import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise import_problem(error) from None


def import_problem(error):
    """An InputError for a failed import."""
    while error.__cause__:
        error = error.__cause__  # transformers only says "Could not import module"
    reason = (str(error).splitlines() or [""])[0]
    if isinstance(error, ModuleNotFoundError):
        return InputError(f"{reason}: pip install -r requirements.txt")
    if "bitsandbytes" in reason:
        return InputError(f"pip install bitsandbytes, or use --no-load_in_4bit ({reason})")
    advice = f"pip uninstall {NOT_NEEDED}, which are not needed here"
    return InputError(f"the libraries cannot be imported ({reason}): {advice}")
