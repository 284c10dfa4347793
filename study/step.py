"""What one optimizer step costs: ours, ours without the shared prompt, and TRL's GRPOTrainer.

    python study/step.py                        # everything missing in study/results/step.json
    python study/step.py --results mine.json    # everything, for your own machine
    python study/step.py --points 512,64,8      # one point: P, C, G
    python study/step.py --report               # measure nothing, only print the tables

All three variants (--arms) have the same random Qwen3-VL, LoRA, image, question, G, C, beta,
quantization and checkpointing, and every completion has exactly C tokens. Ours computes the whole
attention reward; TRL gets constant rewards, which take no time. Each variant is loaded once per
point, in its own process. The variants take turns, one step each. The first round is not timed.
"""

import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression, median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from extras.shapes import TEXT
from study.common import RESULTS, ROOT, machine, markdown_table, write_results
from study.random_model import make_model
from study.step_arms import worker

ARMS = ("ours", "naive", "trl")
HEADLINE = (512, 64, 8)  # P, C, G
GRID = [(P, C, G) for P in (128, 512, 1100) for C in (32, 110) for G in (4, 8, 16)]
CPU_LIMIT = 6_000  # on a CPU, only points of the grid with G (P + C) up to this
SCALING = {"G": (4, 8, 16, 32), "C": (32, 64, 128, 256), "layers": (1, 3, 5, 7)}


def plan(args):
    """What to measure: a list of (part of the study, point, arms, rounds, options)."""
    options = {"device": args.device, "load_in_4bit": True, "gradient_checkpointing": True}
    if args.cuda_graph:
        options["cuda_graph"] = True
    if args.points:
        points = [tuple(int(n) for n in text.split(",")) for text in args.points]
        return [("point", point, args.arms, args.rounds, options) for point in points]
    items = []
    for load_in_4bit in (True, False):
        for checkpointing in (True, False):
            changed = {"load_in_4bit": load_in_4bit, "gradient_checkpointing": checkpointing}
            items.append(("setting", HEADLINE, ARMS, args.rounds, options | changed))
    for P, C, G in GRID:
        if args.device != "cpu" or G * (P + C) <= CPU_LIMIT:
            items.append(("grid", (P, C, G), ARMS, max(1, args.rounds // 2), options))
    P, C, G = HEADLINE
    for name, values in SCALING.items():
        for value in values:
            point = (P, value if name == "C" else C, value if name == "G" else G)
            layers = {"layers": tuple(range(value))} if name == "layers" else {}
            items.append((f"scaling {name}", point, ("ours",), args.rounds, options | layers))
    return items


def compare(point, arms, rounds, folder, options):
    """Run the variants in turns at one point.
    Returns: {variant: costs of its steps}; the first step has only its peak memory."""
    context, pipes, workers = get_context("spawn"), {}, []
    costs, trained = {arm: [] for arm in arms}, set()
    try:
        for arm in arms:  # one at a time
            pipes[arm], theirs = context.Pipe()
            args = theirs, arm, folder, point, options
            process = context.Process(target=worker, args=args, daemon=True)
            process.start()
            theirs.close()  # so that recv() fails if the worker dies
            workers.append(process)
            trained.add(pipes[arm].recv())
        if len(trained) > 1:
            raise SystemExit(f"the variants train different numbers of weights: {trained}")
        for _ in range(1 + rounds):
            for arm in arms:
                pipes[arm].send("step")
                costs[arm].append(pipes[arm].recv())
        for pipe in pipes.values():
            pipe.send("stop")
        for process in workers:
            process.join(30)
    except EOFError:
        raise SystemExit(f"{arm} failed at P, C, G = {point}; see its message above") from None
    finally:
        for process in workers:
            process.kill()
    return costs


def measure_missing(args, results, file):
    """Measure the points that are not in `results`, and write the file after each."""
    folder = make_model(args.shape, args.models, args.device)
    known = [{k: v for k, v in entry.items() if k != "rows"} for entry in results["measured"]]
    with tqdm(plan(args), desc="points") as bar:
        for part, point, arms, rounds, options in bar:
            entry = json.loads(json.dumps(dict(part=part, **dict(zip("PCG", point)), **options)))
            bar.set_postfix_str(f"{part}: P {point[0]}, C {point[1]}, G {point[2]}")
            if entry not in known:
                costs = compare(point, arms, rounds, folder, options)
                results["measured"].append(entry | {"rows": costs})
                write_results(file, results)


# --- tables ---


def tables(results):
    """{part of the study: its Markdown table}, for the parts that were measured."""
    parts = {}
    for entry in results["measured"]:
        parts.setdefault(entry["part"], []).append(entry)
    costs = ["ours, s", "naive, s", "TRL, s", "naive / ours", "TRL / ours"]
    costs += ["ours, MB", "naive, MB", "TRL, MB"]
    found = {}
    for part, entries in parts.items():
        if part == "setting":
            header = ["weights", "checkpointing"]
            rows = [setting_cells(entry) + cost_cells(entry) for entry in entries]
            found[part] = markdown_table(header + costs, rows)
        elif part in ("grid", "point"):
            rows = [[str(entry[k]) for k in "PCG"] + cost_cells(entry) for entry in entries]
            found[part] = markdown_table(["P", "C", "G", *costs], rows)
    scaling = [
        scaling_cells(name, parts[f"scaling {name}"])
        for name in SCALING
        if f"scaling {name}" in parts
    ]
    if scaling:
        header = ["against", "unit", "measured", "linear fit", "largest deviation"]
        found["scaling"] = markdown_table(header, scaling)
    return found


def setting_cells(entry):
    unquantized = "fp32" if entry["device"] == "cpu" else "16-bit"
    weights = "NF4" if entry["load_in_4bit"] else unquantized
    return [weights, "yes" if entry["gradient_checkpointing"] else "no"]


def cost_cells(entry):
    """The cells of one measured point; empty for a variant that was not measured."""
    ours, naive, trl = (entry["rows"].get(arm) for arm in ARMS)
    return [
        *(f"{median_of(arm, 'seconds'):.2f}" if arm else "" for arm in (ours, naive, trl)),
        *(ratio(ours, arm) if ours and arm else "" for arm in (naive, trl)),
        *(f"{arm[0]['peak'] / 2**20:,.0f}" if arm else "" for arm in (ours, naive, trl)),
    ]


def median_of(costs, key):
    return median(step[key] for step in costs[1:])


def ratio(ours, theirs):
    """theirs / ours in seconds: the median over rounds, the smallest and the largest."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours[1:], theirs[1:])]
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def scaling_cells(name, entries):
    """Our cost against G, C or the number of captured layers, and its linear fit."""
    key = "capture" if name == "layers" else "seconds"
    x = [len(entry["layers"]) if name == "layers" else entry[name] for entry in entries]
    y = [median_of(entry["rows"]["ours"], key) for entry in entries]
    b, a = linear_regression(x, y)
    deviation = max(abs(s - a - b * v) / s for v, s in zip(x, y))
    return [
        "captured layers" if name == "layers" else name,
        "s of capture" if name == "layers" else "s per step",
        ", ".join(f"{v}: {s:.3f}" for v, s in zip(x, y)),
        f"{a:.3f} + {b:.4f} {name}",
        f"{100 * deviation:.0f} %",
    ]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--points", nargs="+", metavar="P,C,G", help="measure only these points")
    add("--arms", nargs="+", default=ARMS, choices=ARMS, help="with --points (default: all)")
    add("--rounds", type=int, default=5, help="timed steps each; half in the grid (default: 5)")
    add("--shape", default="30m", choices=TEXT, help="shape of the random model (default: 30m)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=cuda, help="default: cuda if available, else cpu")
    add("--cuda_graph", action="store_true", help="ours decodes with a CUDA graph")
    add("--models", default=ROOT / "runs" / "study", help="folder of the random models")
    add("--results", type=Path, help="JSON file (default: step.json or step_cuda.json in results/)")
    add("--report", action="store_true", help="measure nothing, only print the tables")
    args = parser.parse_args()
    file = RESULTS / ("step.json" if args.device == "cpu" else "step_cuda.json")
    if args.points:  # not part of the study
        file = Path(args.models) / "points.json"
    file = args.results or file
    results = {"machine": machine(), "shape": args.shape, "measured": []}
    results["machine"]["threads"] = torch.get_num_threads()
    if file.exists():
        results = json.loads(file.read_text())
    if results["shape"] != args.shape:
        sys.exit(f"{file} has results of shape {results['shape']}: choose another --results")
    if not args.report:
        measure_missing(args, results, file)
    for part, text in tables(results).items():
        print(f"\n{part}\n\n{text}")


if __name__ == "__main__":
    main()
