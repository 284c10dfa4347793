"""Kill tiny runs at random moments, resume them each time, and compare their files with those of an
uninterrupted run.

    python bench/kill.py --kills 50

Every process is the real program. The functions that make up the PHASES are wrapped, so that they
record when they begin and end. When a phase begins, a timer of the operating system is set. Its
signal ends the process as abruptly as SIGKILL does, without running a handler or any Python code.
The delay is a random part of the phase's duration on this machine, as measured in the uninterrupted
run. A kill is counted for the phase in which it fell. A run is killed in every phase, then finished
and compared; then the next run begins. `tests/test_durability.py` does the same with 20 kills.
Writes bench/results/kill.json.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.doc_tables import RESULTS, ROOT, machine, markdown_table, write_atomically

FLAGS = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(ROOT / "tiny")]
FLAGS += ["--prompts_per_step", "2", "--num_generations", "4", "--eval_examples", "2"]
FLAGS += ["--max_steps", "16", "--save_steps", "2"]
COMPARED = (
    "metrics.jsonl",
    "samples.jsonl",
    "before.json",
    "after.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/README.md",
)
PHASES = (  # in the order of a run
    "loading",
    "opening the run",
    "first evaluation",
    "sampling",
    "update",
    "log",
    "checkpoint",
    "last evaluation",
    "results",
)
REPEATED = "sampling", "update", "log", "checkpoint"  # these occur several times in a run
SIGNAL = signal.SIGALRM  # sent by the timer; nothing handles it, so it ends the process


# --- in the process that is killed ---


def run_with_marks():
    """Run the program, and append a line "phase,time" to the file $MARKS when a phase begins and
    "-,time" when it ends. $KILL_AT, "phase,number,seconds", sets the timer when the phase begins
    for the number-th time."""
    import sayo_mini

    mark = partial(write_mark, os.open(os.environ["MARKS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    in_phase(sayo_mini, "load_datasets", "loading", mark)
    in_phase(sayo_mini, "load_model", "loading", mark)
    in_phase(sayo_mini, "RunDirectory", "opening the run", mark)
    in_phase(sayo_mini, "evaluate", None, mark)
    in_phase(sayo_mini, "roll_out", "sampling", mark)
    in_phase(sayo_mini, "score_and_reward", "update", mark)
    in_phase(sayo_mini, "accumulate_gradient", "update", mark)
    in_phase(sayo_mini, "update", "update", mark)
    in_phase(sayo_mini.RunDirectory.__wrapped__, "log", "log", mark)
    in_phase(sayo_mini.RunDirectory.__wrapped__, "save", "checkpoint", mark)
    in_phase(sayo_mini.RunDirectory.__wrapped__, "atomic_write", "results", mark, ("adapter",))
    in_phase(sayo_mini, "write_report", "results", mark)
    sys.exit(sayo_mini.main())


def in_phase(owner, name, phase, mark, only=None):
    """Wrap a function so that it marks its beginning and its end.

    Args: phase, its name, or None to derive it from the argument "before" or "after" of `evaluate`;
    only, mark only calls whose first argument is one of these.
    """
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        chosen = phase or {"before": "first evaluation", "after": "last evaluation"}[args[3]]
        if only and args[1] not in only:
            return function(*args, **kwargs)
        mark(chosen)
        try:
            return function(*args, **kwargs)
        finally:
            mark("-")

    wrapped.__wrapped__ = function
    setattr(owner, name, wrapped)


def write_mark(file, phase, counts=Counter()):
    os.write(file, f"{phase},{time.monotonic()}\n".encode())
    counts[phase] += 1
    wanted, number, seconds = os.environ.get("KILL_AT", "-,0,0").split(",")
    if phase == wanted and counts[phase] == int(number):
        signal.setitimer(signal.ITIMER_REAL, float(seconds))


# --- in the process that starts it ---


def run(folder, kill_at=None):
    """Resume the run in the folder, or start it, until it ends or is killed.

    Args: kill_at, (phase, number, seconds) or None.
    Returns: the marks, a list of (phase or "-", time), and whether it was killed.
    Raises: SystemExit if it ended with an error.
    """
    marks = folder.with_suffix(".marks")
    marks.unlink(missing_ok=True)
    start = [sys.executable, "-c", "from bench.kill import run_with_marks; run_with_marks()"]
    settings = {"MARKS": str(marks), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if kill_at:
        settings["KILL_AT"] = ",".join(map(str, kill_at))
    process = subprocess.run(
        [*start, *FLAGS, "--resume", "--output_dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | settings,
    )
    if process.returncode not in (0, -SIGNAL):
        raise SystemExit(f"a process ended with exit code {process.returncode}:\n{process.stdout}")
    lines = (line.split(",") for line in marks.read_text().splitlines())
    return [(phase, float(at)) for phase, at in lines], process.returncode == -SIGNAL


def finish(folder):
    """Finish the run in the folder. Returns: {phase: its median duration in seconds}."""
    marks, _ = run(folder)
    durations = {phase: [] for phase in PHASES}
    for (phase, start), (_, end) in zip(marks, marks[1:]):
        if phase != "-":
            durations[phase].append(end - start)
    return {phase: statistics.median(values) for phase, values in durations.items() if values}


def kill_and_resume(folder, kills, seed=0):
    """Kill runs in `folder`, and compare each with an uninterrupted one.

    Args: kills, the least number of kills, spread evenly over the phases.
    Returns: a list with a dict per kill (the `phase` in which it fell, its `run`, `ms` after the
    beginning of the intended phase, `steps` in the log), and {run: the files that differ}.
    Raises: SystemExit if a process ends with an error.
    """
    folder.mkdir(exist_ok=True)
    rng, found, different = random.Random(seed), [], {}
    durations = finish(folder / "uninterrupted")

    def missing(phase):
        return len(found) < kills or count(found, phase) < kills // len(PHASES)

    while any(map(missing, PHASES)):
        run = folder / f"run{len(different) + 1}"
        for phase in filter(missing, PHASES):
            had = count(found, phase)
            for _ in range(3):  # a kill may fall in a different phase
                number = rng.randint(1, 3) if phase in REPEATED else 1
                seconds = max(1e-6, rng.uniform(0, 0.9 * durations[phase]))
                found += kill_once(run, (phase, number, seconds))
                if count(found, phase) > had:
                    break
        finish(run)
        different[run.name] = differences(folder / "uninterrupted", run)
    return found, different


def count(kills, phase):
    return sum(kill["phase"] == phase for kill in kills)


def kill_once(folder, kill_at):
    """Returns: [a dict as in `kill_and_resume`], or [] if the process ended before the kill, or was
    killed between two phases."""
    marks, killed = run(folder, kill_at)
    phase, began = marks[-1]
    if not killed or phase == "-":
        return []
    log = folder / "metrics.jsonl"
    steps = log.read_bytes().count(b"\n") if log.exists() else 0
    return [{"phase": phase, "run": folder.name, "ms": 1000 * kill_at[2], "steps": steps}]


def differences(folder, other):
    """The compared files that are not bit-identical."""
    return [
        name for name in COMPARED if (folder / name).read_bytes() != (other / name).read_bytes()
    ]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=50, help="at least (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="for the random moments (default: 0)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="default: cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of kill.json")
    args = parser.parse_args()
    FLAGS[1] = args.device
    if args.device == "cuda":
        FLAGS.append("--deterministic")
    with tempfile.TemporaryDirectory() as temporary:
        found, different = kill_and_resume(Path(temporary), args.kills, args.seed)
    rows = []
    for phase in PHASES:
        kills = [kill for kill in found if kill["phase"] == phase]
        files = {name for kill in kills for name in different[kill["run"]]}
        rows.append([phase, str(len(kills)), ", ".join(sorted(files)) or "none"])
    print(markdown_table(["killed in", "kills", "files that differ"], rows))
    print(f"{len(found)} kills in {len(different)} runs")
    results = {"machine": machine(), "seed": args.seed, "kills": found, "different": different}
    write_atomically(args.results / "kill.json", json.dumps(results, indent=1) + "\n")
    return any(different.values())


if __name__ == "__main__":
    sys.exit(main())
