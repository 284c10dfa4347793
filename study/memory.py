"""Peak memory of one optimizer step: measured, and predicted by `python sayo_mini.py fit`.

    python study/memory.py                   # on a CUDA card: the shapes of Qwen3-VL-2B, 4B and 8B
    python study/memory.py --shapes 2b       # one shape; later runs add their results
    python study/memory.py --report          # measure nothing, only print the table

The models have random weights, which are written to disk once: 4.3 GB for 2b, 8.9 GB for 4b,
17.5 GB for 8b. Without CUDA, a model of 34 M parameters is measured, but not predicted. Every point
is measured in its own process.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from config import Config
from extras.fit import rehearse
from extras.shapes import TEXT
from study.common import RESULTS, ROOT, machine, markdown_table, write_results
from study.random_model import CELL, make_model, model_config
from study.step import compare, median_of
from study.step_arms import LEARNING

SMALL = "30m"  # the shape that is measured on a CPU
POINTS = [(N, G) for N in (256, 1024) for G in (4, 8, 16)]  # image tokens, completions
QUESTION = 76  # tokens of the question and the template around the image
C = 110  # tokens of a completion


def predict(shape, N, G):
    """Predicted peak of one step on a CUDA card, in bytes, with the loaded model."""
    cfg = Config(
        num_generations=G,
        max_completion_length=C,
        prompts_per_step=1,
        max_pixels=N * CELL**2,
        eval_examples=0,
        **LEARNING,
    )
    peaks = rehearse(model_config(shape), cfg, QUESTION)
    return max(peaks[phase] for phase in ("sampling", "scoring", "update"))


def measure_missing(args, results):
    """Measure the points that are not in `results`, and write the file after each."""
    known = {(row["shape"], row["N"], row["G"]) for row in results["measured"]}
    points = [(shape, N, G) for shape in args.shapes for N, G in POINTS]
    options = {"device": args.device, "load_in_4bit": True, "gradient_checkpointing": True}
    for shape, N, G in tqdm([point for point in points if point not in known], desc="points"):
        folder = make_model(shape, args.models, args.device)
        step = options | {"image_tokens": N}
        costs = compare((N + QUESTION, C, G), ("ours",), 2, folder, step)["ours"]
        row = {"shape": shape, "N": N, "G": G} | costs[0]
        row["seconds"] = median_of(costs, "seconds")
        if shape != SMALL:
            row["predicted"] = predict(shape, N, G)
        results["measured"].append(row)
        write_results(args.results, results)


def table(results):
    """The Markdown table of all measured points. Cells without a number are empty."""
    rows = []
    for row in results["measured"]:
        cells = [row["shape"].upper(), str(row["N"]), str(row["G"])]
        for name in ("before", "peak", "predicted"):
            cells.append(f"{row[name] / 2**20:,.0f}" if name in row else "")
        total = row["peak"] + row.get("before", 0)
        cells.append(f"{row['predicted'] / total - 1:+.1%}" if "predicted" in row else "")
        cells.append(f"{row['seconds']:.2f}" if "seconds" in row else "")
        rows.append(cells)
    header = ["shape", "N", "G", "model, MB", "+ step, MB", "predicted sum, MB", "error"]
    return markdown_table([*header, "s per step"], rows)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ("2b", "4b", "8b") if device == "cuda" else (SMALL,)
    add = parser.add_argument
    add("--shapes", nargs="+", default=shapes, choices=TEXT, help=f"default: {' '.join(shapes)}")
    add("--device", default=device, help=f"default: {device}")
    add("--models", default=ROOT / "runs" / "study", help="folder of the random models")
    add("--results", type=Path, default=RESULTS / f"memory_{device}.json", help="JSON file")
    add("--report", action="store_true", help="measure nothing, only print the table")
    args = parser.parse_args()
    results = {"machine": machine(), "measured": []}
    if args.results.exists():
        results = json.loads(args.results.read_text())
    if not args.report:
        measure_missing(args, results)
    print(table(results))


if __name__ == "__main__":
    main()
