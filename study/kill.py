"""Kill a small run at every write and at random times, resume it, and compare every file.

    python study/kill.py                                      # every write, then random times
    python study/kill.py --writes 10 --random 5 --signals 5   # fewer of them

The run trains the model in tiny/ for two steps with a checkpoint after each. A *write* opens a
file of the run to write to it, or makes, renames or deletes a file or folder. The run is killed
right before the write, and resumed. If the file of the last write still has its name, the run is
also resumed with half of that write missing, as a kill in the middle of it would leave the file.
Then runs are killed, and stopped by Ctrl-C, SIGTERM or SIGHUP, at random times.
Every file of the resumed run must equal that of an uninterrupted run bit for bit. Needs Linux or
macOS.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import extras.report  # noqa: F401 (loaded before the fork)
import sayo_mini
from model import load_vlm
from study.common import RESULTS, ROOT, machine, markdown_table, write_results

FLAGS = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(ROOT / "tiny")]
FLAGS += "--max_steps 2 --save_steps 1 --prompts_per_step 2 --num_generations 4".split()
FLAGS += "--temperature 2 --eval_examples 1 --output_dir run".split()
NOT_COMPARED = "timing.jsonl", "lock"
KINDS = "before a write", "in the middle of a write", "at a random time", "by another signal"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
CHANGES = "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"


# --- in the process that is killed ---


class Writes:
    """An audit hook of Python that counts the writes to the folder run/ and kills the process
    right before the one with the given number."""

    def __init__(self, kill_at):
        self.folder, self.kill_at = Path.cwd() / "run", kill_at
        self.count, self.last = 0, ("", 0)

    def __call__(self, event, args):
        if event not in ("open", *CHANGES) or not isinstance(args[0], str | os.PathLike):
            return
        path, flags = Path(args[0]).absolute(), args[2] if event == "open" else os.O_RDWR
        if not flags & (os.O_WRONLY | os.O_RDWR) or not path.is_relative_to(self.folder):
            return
        self.count += 1
        if self.count == self.kill_at:
            self.save()
            os.kill(os.getpid(), signal.SIGKILL)
        if flags & os.O_CREAT:
            before = path.stat().st_size if flags & os.O_APPEND and path.exists() else 0
            self.last = str(path.relative_to(self.folder)), before

    def save(self):
        """Write the count, and the last written file with its size before that write."""
        Path("writes.json").write_text(json.dumps([self.count, self.last]))


def start(folder, kill_at=None):
    """Start or resume the run in `folder`/run in a new process. Returns: its process id."""
    folder.mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        writes = Writes(kill_at)
        sys.addaudithook(writes)
        resume = ["--resume"] if Path("run/config.json").exists() else []
        code = sayo_mini.main([*FLAGS, *resume])
        writes.save()
    finally:
        os._exit(code)


# --- in the process that starts it ---


def finish(folder):
    """Run or resume to the end. Returns: the number of writes. Raises: SystemExit if it fails."""
    if wait(start(folder)) != 0:
        raise SystemExit(f"a run failed:\n{(folder / 'output.txt').read_text()}")
    return json.loads((folder / "writes.json").read_text())[0]


def wait(pid):
    """Returns: the exit code of the process, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_write(work, number):
    """Kill a new run at a write. Returns: the one or two folders that the kill may leave."""
    folder, cut = work / f"write{number}", work / f"write{number}-cut"
    assert wait(start(folder, kill_at=number)) == -signal.SIGKILL
    name, before = json.loads((folder / "writes.json").read_text())[1]
    if not (folder / "run" / name).is_file():  # it was renamed
        return [folder]
    shutil.copytree(folder, cut)
    path = cut / "run" / name
    os.truncate(path, (before + path.stat().st_size) // 2)
    return folder, cut


def differences(folder, other):
    """The files that are not bit-identical in two folders, or that only one of them has."""
    contents = [
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (folder / "run", other / "run")
    ]
    names = (contents[0].keys() | contents[1].keys()) - set(NOT_COMPARED)
    return sorted(name for name in names if contents[0].get(name) != contents[1].get(name))


def kill_and_resume(work, writes, random_times, signals):
    """Kill runs in the folder `work`, resume them, and compare them with an uninterrupted run.

    Args: writes, how many of the writes to kill at, None for all; random_times, how many kills at
    random times; signals, how many of SIGNALS at random times.
    Yields: for each resumed run, the kind of its end and the files that differ.
    """
    start_time, whole = time.monotonic(), work / "uninterrupted"
    count = finish(whole)
    duration, rng = time.monotonic() - start_time, random.Random(0)
    for number in sorted(rng.sample(range(1, count + 1), count if writes is None else writes)):
        for kind, folder in zip(KINDS, kill_at_write(work, number)):
            finish(folder)
            yield kind, differences(whole, folder)
            shutil.rmtree(folder)
    for number in range(random_times + signals):
        folder = work / f"random{number}"
        pid = start(folder)
        time.sleep(rng.uniform(0, duration))
        os.kill(pid, signal.SIGKILL if number < random_times else rng.choice(SIGNALS))
        wait(pid)
        finish(folder)
        yield KINDS[2 if number < random_times else 3], differences(whole, folder)
        shutil.rmtree(folder)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--writes", type=int, help="kill at so many of the writes (default: all)")
    parser.add_argument("--random", type=int, default=20, help="kills at random times (default 20)")
    parser.add_argument("--signals", type=int, default=20, help="other signals (default 20)")
    parser.add_argument("--results", type=Path, default=RESULTS / "kill.json", help="JSON file")
    args = parser.parse_args()
    # The forked processes then have loaded everything as well.
    torch.set_num_threads(1)
    load_vlm(ROOT / "tiny", load_in_4bit=False, device="cpu")
    found = {kind: {"resumed runs": 0, "files that differ": []} for kind in KINDS}
    with tempfile.TemporaryDirectory() as work:
        for kind, different in tqdm(
            kill_and_resume(Path(work), args.writes, args.random, args.signals)
        ):
            found[kind]["resumed runs"] += 1
            found[kind]["files that differ"] += different
    rows = []
    for kind, result in found.items():
        names = ", ".join(sorted(set(result["files that differ"]))) or "none"
        rows.append([kind, str(result["resumed runs"]), names])
    print(markdown_table(["killed", "resumed runs", "files that differ"], rows))
    write_results(args.results, {"machine": machine()} | found)
    return any(result["files that differ"] for result in found.values())


if __name__ == "__main__":
    sys.exit(main())
