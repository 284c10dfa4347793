"""How work grows: its cost at ten times a size, divided by its cost at that size. 1 is constant,
10 linear. Times are CPU time, memory is that of Python objects."""

import sys
import tempfile
import time
import tracemalloc
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from checkpoint import LOGS, RunDirectory
from config import Config
from data import epoch_index
from extras.check import check_dataset
from extras.report import render_page
from metrics import ALARMS, Alarms

ROW = dict.fromkeys([*ALARMS, "skipped_updates", "rewards/accuracy/mean", "kl"], 0.0)
cpu_time = partial(timeit, timer=time.process_time, number=1)


def alarms(steps, folder):
    found = Alarms(Config(), [ROW] * steps)
    return cpu_time(lambda: [(found.check(ROW, steps), found.is_best()) for _ in range(200)])


def check(questions, folder):
    Image.effect_noise((2000, 2000), 90).save(folder / "one.png")
    row = '{"image": "one.png", "question": "What?", "answer": "x", "boxes": [[1, 2, 300, 200]]}\n'
    (folder / "set.jsonl").write_text(row * questions)
    with redirect_stdout(None):
        return cpu_time(lambda: check_dataset(folder / "set.jsonl"))


def pick(examples, folder):
    return cpu_time(lambda: [epoch_index(k, examples, 0) for k in range(examples)]) / examples


def page(steps, folder):
    rows = (ROW | {"step": step, "kl": step * 0.37 % 1} for step in range(1, steps + 1))
    run = SimpleNamespace(settings=vars(Config()), step=steps, history=lambda: rows)
    return len(render_page(run, None, None, []))


def resume(steps, folder):
    cpu = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    run = RunDirectory(Config(output_dir=str(folder)), {}, None, cpu, None)
    for _ in range(steps):
        run.log(ROW, [{"text": "the dot on the red card is blue . " * 8}] * 32, 0.0)
    tracemalloc.stop()
    tracemalloc.start()
    for name in LOGS:
        run.cut_log(name)
    Alarms(Config(), run.history())
    return tracemalloc.get_traced_memory()[1]


WORK = {  # what grows with what -> (its cost, a size)
    "alarms of a step, with earlier steps": (alarms, 800),
    "check, with questions about an image": (check, 20),
    "picking an example, with examples": (pick, 10_000),
    "report.html, with steps": (page, 3000),
    "memory of opening --resume, with steps": (resume, 200),
}


def growth(cost, size):
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as ten:
        return cost(10 * size, Path(ten)) / cost(size, Path(one))


if __name__ == "__main__":
    for name, work in WORK.items():
        print(f"{name:40}{growth(*work):5.1f}")
