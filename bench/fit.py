"""Compare the predictions of `python sayo_mini.py fit` with measurements, and predict the memory of
Qwen3-VL-2B, 4B and 8B.

    python bench/fit.py             # everything missing in bench/results/fit.json
    python bench/fit.py --report    # only rewrite the table, from the JSON

It compares the peak memory of one optimizer step above the loaded model, on a CPU, for a model of
34 M parameters. Every point is measured in its own process. The real shapes are only predicted
here; `bench/memory.py` measures them on a card and shows both.
"""

import argparse
import gc
import json
import multiprocessing
import sys
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import sayo_mini
from analysis.predict_memory import rehearse
from bench.doc_tables import RESULTS, ROOT, insert, machine, markdown_table, write_atomically
from bench.memory import CAPS, QUESTION, SHAPES, C
from bench.memory import POINTS as REAL_POINTS
from bench.shapes import CELL, make_model, model_config
from bench.step_arms import LEARNING, PeakMemory, make_step
from commands.fit import Plan
from config import Config
from model import load_vlm

SHAPE = "30m"
KEYS = ("N", "G", "C", "load_in_4bit", "gradient_checkpointing", "completions_per_forward")
STEP = ("sampling", "scoring", "update")
POINTS = [
    (256, 4, 110, True, True, 0),
    (256, 8, 110, True, True, 0),
    (256, 16, 110, True, True, 0),
    (1024, 4, 110, True, True, 0),
    (1024, 8, 110, True, True, 0),
    (1024, 16, 110, True, True, 0),
    (256, 8, 110, True, False, 0),
    (1024, 8, 110, True, False, 0),
    (256, 8, 110, False, True, 0),
    (1024, 8, 110, False, True, 0),
    (256, 8, 110, False, False, 0),
    (1024, 8, 110, False, False, 0),
    (256, 8, 32, True, True, 0),
    (1024, 8, 32, True, False, 0),
    (256, 16, 32, True, False, 0),
    (1024, 16, 110, True, True, 4),
    (256, 16, 110, True, False, 2),
]


def predict(point):
    """Predicted bytes that a step needs above the loaded model."""
    cfg = Config(
        num_generations=point["G"],
        max_completion_length=point["C"],
        prompts_per_step=1,
        eval_examples=0,
        **{name: point[name] for name in KEYS[3:]},
        **LEARNING,
    )
    rows = int(point["N"] ** 0.5)
    grid, settings = (rows, point["N"] // rows), {"dtype": torch.float32, "kernels": "cpu"}
    peaks = rehearse(
        model_config(SHAPE), cfg, sayo_mini.train_step, QUESTION, grid=grid, **settings
    )
    return max(peaks[phase] for phase in STEP) - peaks["loaded"]


def predict_shape(shape, N, G):
    """Predict one step of a real shape, as in bench/memory.py: its peak, and for each card how many
    completions fit in a forward pass (0: all of them, None: not even one)."""
    cfg = Config(
        num_generations=G,
        max_completion_length=C,
        prompts_per_step=1,
        max_pixels=N * CELL**2,
        eval_examples=0,
        **LEARNING,
    )
    plan = Plan(model_config(shape), cfg, sayo_mini.train_step, QUESTION)
    cards = []
    for card in CAPS:
        fits = plan.needed() <= card
        smaller = None if fits else plan.largest("completions_per_forward", range(1, G), card)
        cards.append(0 if fits else smaller)
    peaks = plan.peaks()
    peak = max(peaks[phase] for phase in ("loading", *STEP))
    return {"shape": shape, "N": N, "G": G, "peak": peak, "needed": plan.needed(), "cards": cards}


def measure(folder, point, pipe):
    torch.set_num_threads(1)
    settings = {name: point[name] for name in ("load_in_4bit", "gradient_checkpointing")}
    vlm = load_vlm(folder, device="cpu", **settings)
    memory = PeakMemory(vlm.device)
    make_step(vlm, 40, 4, 2)()  # so that one-time allocations of libraries do not count
    vlm.model.zero_grad()
    gc.collect()
    memory.base = memory.resident()
    vlm.completions_per_forward = 0
    shape = point["N"] + QUESTION, point["C"], point["G"], point["N"]
    step = make_step(vlm, *shape, point["completions_per_forward"])
    with memory.measure():
        step()
    pipe.send(memory.peak)


def measure_in_process(folder, point):
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(folder, point, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def error(row):
    return row["predicted"] / row["measured"] - 1


def table(results):
    rows = []
    for row in results["points"]:
        cells = [str(row[name]) for name in "NGC"]
        cells.append("NF4" if row["load_in_4bit"] else "fp32")
        cells.append("yes" if row["gradient_checkpointing"] else "no")
        cells.append(str(row["completions_per_forward"] or row["G"]))
        cells += [f"{row[name] / 1e6:.1f}" for name in ("predicted", "measured")]
        rows.append([*cells, f"{100 * error(row):+.1f} %"])
    header = ["N", "G", "C", "weights", "checkpointing", "completions per forward"]
    return markdown_table([*header, "predicted, MB", "measured, MB", "error"], rows)


def summary(results):
    errors = [abs(error(row)) for row in results["points"]]
    low, high = (100 * f(map(error, results["points"])) for f in (min, max))
    return (
        f"{len(errors)} points: median error {100 * median(errors):.1f} %, largest "
        f"{100 * max(errors):.1f} % (from {low:+.1f} % to {high:+.1f} %)."
    )


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--models", default="runs/bench", help="folder of the random models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of fit.json")
    parser.add_argument("--report", action="store_true", help="only rewrite the table")
    parser.add_argument("--points", type=int, help="measure only the first points; no real shapes")
    args = parser.parse_args()
    path = args.results / "fit.json"
    results = {"command": "python bench/fit.py", "machine": machine(), "points": [], "shapes": []}
    if path.exists():
        results = json.loads(path.read_text())
    points = [dict(zip(KEYS, values)) for values in POINTS[: args.points]]
    known = [{name: row[name] for name in KEYS} for row in results["points"]]
    for point in tqdm([] if args.report else [point for point in points if point not in known]):
        folder = make_model(SHAPE, args.models)
        costs = {"predicted": predict(point), "measured": measure_in_process(folder, point)}
        results["points"].append(point | costs)
        write_atomically(path, json.dumps(results, indent=1))
    known = [(row["shape"], row["N"], row["G"]) for row in results["shapes"]]
    points = [(shape, *point) for shape in SHAPES for point in REAL_POINTS]
    skip = args.report or args.points
    for point in tqdm([] if skip else [point for point in points if point not in known]):
        results["shapes"].append(predict_shape(*point))
        write_atomically(path, json.dumps(results, indent=1))
    print(table(results), summary(results), sep="\n\n")
    if args.results == RESULTS:
        insert(ROOT / "docs" / "gpu.md", "fit errors", f"{table(results)}\n\n{summary(results)}")


if __name__ == "__main__":
    main()
