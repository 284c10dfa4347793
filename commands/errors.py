"""When something goes wrong: one line for a mistake (exit code 2), how to continue after Ctrl-C
(130), and a second try with less memory."""

import re
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from checkpoint import resume_command
from commands.parser import parse_command_line
from commands.signals import handle_signals, interrupt, signals_to_stop
from config import Config, InputError

MEMORY_FLAGS = "--completions_per_forward, --prompts_per_step, --max_pixels or --num_generations"
# What libraries say if they find no memory for themselves.
OUT_OF_MEMORY = re.compile(r"CU[A-Z]+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|CUDA.*out of memory")


@contextmanager
def one_line_errors(argv, program):
    """Yields an object whose `exit_code` is set here if the body ends in an error of the user or in
    Ctrl-C. SIGTERM and SIGHUP act like it; the training loop handles all three by itself."""
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
    except KeyboardInterrupt:  # while loading or evaluating: no file is half-written
        print(f"stopped; {next_step(argv, program)}")
        outcome.exit_code = 130
        return
    print(f"{program.split()[-1]}: {problem}", file=sys.stderr)
    outcome.exit_code = 2


def gpu_problem(error, advice):
    """One line for an error of the GPU, None for any other RuntimeError."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(text):
        return f"out of GPU memory: lower {MEMORY_FLAGS}"
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
        return f"the GPU failed ({text}); {advice}; CUDA_LAUNCH_BLOCKING=1 would show where"
    return None


def next_step(argv, program):
    command, given, _ = parse_command_line(argv)
    folder = Path(given.get("output_dir", Config.output_dir))
    if command == "train" and (folder / "config.json").exists():
        return f"continue with: {resume_command(folder, program)}"
    return "nothing was saved"


def halve_micro_batch(vlm, cfg, run):
    """After running out of GPU memory, halve the micro-batch, once. Returns False if that was done
    already, is not possible, or if updates of the step may have been made."""
    size = cfg.completions_per_forward or cfg.num_generations
    if run.memory_reduced or size == 1 or cfg.num_iterations > 1:
        return False
    run.memory_reduced = True
    vlm.completions_per_forward = cfg.completions_per_forward = size // 2
    run.write_config(cfg)  # a resumed run keeps it
    change = f"repeating it with --completions_per_forward {size // 2}"
    tqdm.write(f"step {run.step + 1}: out of GPU memory; {change}")
    return True
