"""Kill a tiny run with SIGKILL at random moments, resume it each time, and compare its files with
those of an uninterrupted run.

    python bench/kill.py --kills 50

Every process is the real command. Each resumes what the one before left behind, and may be killed
itself. `tests/test_durability.py` does the same with 20 kills.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(ROOT / "tiny")]
FLAGS += ["--prompts_per_step", "2", "--num_generations", "4", "--eval_examples", "2"]
FLAGS += ["--max_steps", "16", "--save_steps", "2"]
COMPARED = (
    "metrics.jsonl",
    "samples.jsonl",
    "before.json",
    "after.json",
    "adapter/adapter_model.safetensors",
)


def start(folder, *flags):
    """Start the real command, which resumes what is in the folder. Its output is unbuffered and
    goes into one pipe."""
    command = [sys.executable, "sayo_mini.py", *FLAGS, "--resume", "--output_dir", str(folder)]
    settings = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | settings,
    )


def run_and_kill(folder, seconds):
    """Start a process and kill it `seconds` after it has opened the run's folder.
    Returns: False if it had ended by then. Raises: SystemExit if it ended with an error."""
    process = start(folder)
    output = ""
    for line in process.stdout:  # loading comes first, and writes nothing
        output += line
        if "starting from the beginning" in line or "resuming" in line:
            break
    time.sleep(seconds)
    process.kill()
    output += process.communicate()[0]
    if process.returncode not in (0, -9):
        raise SystemExit(f"a process ended with exit code {process.returncode}:\n{output}")
    return process.returncode == -9


def kill_and_resume(folder, kills, seed=0):
    """Kill `kills` processes, each at a random moment of its work, then let one finish.
    Returns: the number of steps in the log after each kill. Raises: SystemExit if a process ends
    with an error."""
    rng, steps = random.Random(seed), []
    while len(steps) < kills:
        if run_and_kill(folder, rng.uniform(0, 1.5)):
            log = folder / "metrics.jsonl"
            steps.append(log.read_bytes().count(b"\n") if log.exists() else 0)
    finish(folder)
    return steps


def finish(folder):
    """Run a process to its end. Raises: SystemExit if it fails."""
    process = start(folder)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"the last process ended with exit code {process.returncode}:\n{output}")


def differences(folder, other):
    """The compared files that are not the same to the bit."""
    return [
        name for name in COMPARED if (folder / name).read_bytes() != (other / name).read_bytes()
    ]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        uninterrupted, killed = Path(temporary, "uninterrupted"), Path(temporary, "killed")
        finish(uninterrupted)
        steps = kill_and_resume(killed, args.kills, args.seed)
        different = differences(uninterrupted, killed)
    print(f"killed {len(steps)} times, with {steps} steps in the log")
    print(f"files that differ: {different or 'none'}")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
