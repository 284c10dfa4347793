"""Kill a tiny run with SIGKILL at random moments, resume it each time, and hold it against an uninterrupted one.

    python bench/kill.py --kills 50

Every process is the real command; the next one resumes what the last one left, and may be killed itself. Most
of the time goes into starting them. `tests/test_durability.py` does the same with 20.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(HERE / "tiny"), "--prompts_per_step", "2",
         "--num_generations", "4", "--eval_examples", "2", "--max_steps", "16", "--save_steps", "2"]  # fmt: skip
COMPARED = ("metrics.jsonl", "samples.jsonl", "before.json", "after.json", "adapter/adapter_model.safetensors")


def start(folder, *flags):
    """The real command, unbuffered, resuming what is in the folder; all its output in one pipe."""
    command = [sys.executable, "sayo_mini.py", *FLAGS, "--resume", "--output_dir", str(folder), *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment)  # fmt: skip


def killed(folder, seconds):
    """Whether a process was still at work `seconds` after it had opened the run's folder; then it was killed."""
    program = start(folder)
    output = ""
    for line in program.stdout:  # loading comes first, and writes nothing
        output += line
        if "starting from the beginning" in line or "resuming" in line:
            break
    time.sleep(seconds)
    program.kill()
    output += program.communicate()[0]
    if program.returncode not in (0, -9):
        raise SystemExit(f"a process ended by itself with exit code {program.returncode}:\n{output}")
    return program.returncode == -9


def kill_and_resume(folder, kills, seed=0):
    """Kill `kills` processes, each at a random moment of its work, then let one come to the end.
    Returns: the steps in the log after each kill. Raises: SystemExit if one ends with an error."""
    rng, steps = random.Random(seed), []
    while len(steps) < kills:
        if killed(folder, rng.uniform(0, 1.5)):
            log = folder / "metrics.jsonl"
            steps.append(log.read_bytes().count(b"\n") if log.exists() else 0)
    finish(folder)
    return steps


def finish(folder):
    program = start(folder)
    output = program.communicate()[0]
    if program.returncode:
        raise SystemExit(f"the last process ended with exit code {program.returncode}:\n{output}")


def differences(one, other):
    """The files that differ in a bit."""
    return [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        whole, cut = Path(temporary, "whole"), Path(temporary, "cut")
        finish(whole)
        steps = kill_and_resume(cut, args.kills, args.seed)
        different = differences(whole, cut)
    print(f"killed {len(steps)} times, with {steps} steps logged; files that differ: {different or 'none'}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
