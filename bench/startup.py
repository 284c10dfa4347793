"""Print how long the commands take to start, as the median wall time of five processes.

    python bench/startup.py

The machine should be idle.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.doc_tables import ROOT, machine

RUNS = 5
LOOK = "look --model_name_or_path tiny --device cpu --image example/one.png".split()
LOOK += ["--question", "What color is the dot on the pink card?"]


def median_seconds(command):
    """The median wall time of RUNS processes. Raises: CalledProcessError if one fails."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "python sayo_mini.py --help": ["sayo_mini.py", "--help"],
            "python sayo_mini.py look": ["sayo_mini.py", *LOOK, "--output", f"{folder}/look.png"],
            'python -c "import sayo_mini"': ["-c", "import sayo_mini"],
        }
        for name, command in commands.items():
            print(f"{name:30}{median_seconds(command):6.2f} s, median of {RUNS}", flush=True)


if __name__ == "__main__":
    main()
