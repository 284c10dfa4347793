"""Exit codes and one-line messages: user and GPU errors (2), Ctrl-C outside training (130)."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from config import Config, InputError
from runtime.parser import parse_command_line
from runtime.run_folder import resume_command
from runtime.signals import handle_signals, interrupt, signals_to_stop

MEMORY_FLAGS = "--completions_per_forward, --prompts_per_step, --max_pixels or --num_generations"
# Messages of CUDA libraries that cannot allocate memory.
OUT_OF_MEMORY = re.compile(r"CU[A-Z]+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDA.*out of memory")


@contextmanager
def one_line_errors(argv, program):
    """Print user errors, GPU errors and Ctrl-C as one line. SIGTERM and SIGHUP act like Ctrl-C; the
    training loop handles all three itself.

    Yields: an object whose `exit_code` is set here, to 2 or 130, if the body fails.
    """
    outcome = SimpleNamespace(exit_code=0)
    try:
        with handle_signals(signals_to_stop(), interrupt):
            yield outcome
        return
    except RuntimeError as error:
        problem = gpu_problem(error, next_step(argv, program))
        if problem is None:
            raise
    except InputError as error:
        problem = " ".join(str(error).split())
    except KeyboardInterrupt:  # outside training; files are replaced atomically
        print(f"stopped; {next_step(argv, program)}")
        outcome.exit_code = 130
        return
    print(f"{program.split()[-1]}: {problem}", file=sys.stderr)
    outcome.exit_code = 2


def gpu_problem(error, advice):
    """A one-line message for a GPU error, None for any other RuntimeError."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(text):
        return f"out of GPU memory: lower {MEMORY_FLAGS}"
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return f"the GPU failed ({text}); {advice}; set CUDA_LAUNCH_BLOCKING=1 to see where"
    return None


def next_step(argv, program):
    command, given, _ = parse_command_line(argv)
    folder = Path(given.get("output_dir", Config.output_dir))
    if command == "train" and (folder / "config.json").exists():
        return f"continue with: {resume_command(folder, program)}"
    return "nothing was saved"
