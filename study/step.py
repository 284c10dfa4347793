"""What one optimizer step costs: ours, ours without the shared prompt, and TRL's GRPOTrainer.

    python study/step.py                        # everything missing in study/results/step.json
    python study/step.py --results mine.json    # everything, for your own machine
    python study/step.py --report               # measure nothing, only print the table

All three variants have the same random Qwen3-VL in NF4, LoRA, image, question, G, C, beta and
gradient checkpointing, and every completion has exactly C tokens. Ours computes the whole attention
reward; TRL gets constant rewards, which take no time. Each variant is loaded once per point, in its
own process. The variants take turns, one step each. The first round is not timed.
"""

import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean, median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from study.common import RESULTS, ROOT, machine, markdown_table, write_results
from study.random_model import make_model
from study.step_arms import worker

ARMS = ("ours", "naive", "trl")
OPTIONS = {"load_in_4bit": True, "gradient_checkpointing": True}
ROUNDS = {(512, 64, 8): 5}  # timed steps of each variant at a point (P, C, G)
ROUNDS |= {(P, C, G): 2 for P in (128, 512, 1100) for C in (32, 110) for G in (4, 8, 16)}
CPU_LIMIT = 6_000  # on a CPU, only points with G (P + C) up to this


def points(device):
    """The points (P, C, G) to measure."""
    return [(P, C, G) for P, C, G in ROUNDS if device != "cpu" or G * (P + C) <= CPU_LIMIT]


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
    except EOFError:
        raise SystemExit(f"{arm} failed at P, C, G = {point}; see its message above") from None
    finally:
        for process in workers:
            process.kill()
            process.join()
    return costs


def measure_missing(points, results, file, device):
    """Measure the points that are not in `results`, and write the file after each."""
    known = [tuple(entry[name] for name in "PCG") for entry in results["measured"]]
    for point in tqdm(points, desc="points"):
        if point not in known:
            folder = make_model("30m", ROOT / "runs" / "study", device)
            costs = compare(point, ARMS, ROUNDS[point], folder, OPTIONS | {"device": device})
            results["measured"].append(dict(zip("PCG", point)) | {"rows": costs})
            write_results(file, results)


# --- tables ---


def table(results):
    """The Markdown table of all points, sorted, and the geometric mean of TRL / ours."""
    header = ["P", "C", "G", "ours, s", "naive, s", "TRL, s", "naive / ours", "TRL / ours"]
    header += ["ours, MB", "naive, MB", "TRL, MB"]
    entries = sorted(results["measured"], key=lambda entry: [entry[name] for name in "PCG"])
    rows = [[str(e[name]) for name in "PCG"] + cost_cells(**e["rows"]) for e in entries]
    ratios = [median(ratios_of(e["rows"]["ours"], e["rows"]["trl"])) for e in entries]
    mean = f"geometric mean of TRL / ours: {geometric_mean(ratios):.1f}"
    return f"{markdown_table(header, rows)}\n\n{mean}"


def parts_table(results):
    """The Markdown table of what the seconds of a step are spent on, at the first point."""
    first = results["measured"][0]
    header = [", ".join(f"{name} {first[name]}" for name in "PCG")]
    header += ["sampling, s", "scoring, s", "update, s", "of it capture, s"]
    rows = []
    for arm, steps in first["rows"].items():
        seconds = [
            f"{median(step[name] for step in steps[1:]):.2f}" if name in steps[1] else ""
            for name in ("sample", "score", "update", "capture")
        ]
        rows.append(["TRL" if arm == "trl" else arm, *seconds])
    return markdown_table(header, rows)


def cost_cells(ours, naive, trl):
    """The cells of one measured point."""
    arms = ours, naive, trl
    return [
        *(f"{median(step['seconds'] for step in arm[1:]):.2f}" for arm in arms),
        *(ratio(ours, arm) for arm in (naive, trl)),
        *(f"{arm[0]['peak'] / 2**20:,.0f}" for arm in arms),
    ]


def ratios_of(ours, theirs):
    """theirs / ours in seconds, of every round."""
    return [b["seconds"] / a["seconds"] for a, b in zip(ours[1:], theirs[1:])]


def ratio(ours, theirs):
    """theirs / ours in seconds: the median over rounds, the smallest and the largest."""
    ratios = ratios_of(ours, theirs)
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if available, else cpu")
    add("--results", type=Path, help="JSON file (default: step.json or step_cuda.json in results/)")
    add("--report", action="store_true", help="measure nothing, only print the table")
    args = parser.parse_args()
    file = args.results or RESULTS / ("step.json" if args.device == "cpu" else "step_cuda.json")
    results = {"machine": machine() | {"threads": torch.get_num_threads()}, "measured": []}
    if file.exists():
        results = json.loads(file.read_text())
    if not args.report:
        measure_missing(points(args.device), results, file, args.device)
    print(f"\n{table(results)}\n\n{parts_table(results)}")


if __name__ == "__main__":
    main()
