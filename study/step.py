"""What one optimizer step costs: ours, ours without the shared prompt, and TRL's GRPOTrainer.

    python study/step.py                        # everything missing in study/results/step.json
    python study/step.py --results mine.json    # everything, for your own machine
    python study/step.py --report               # measure nothing, only print the tables

All three variants have the same random Qwen3-VL, LoRA, image, question, G, C, beta, quantization
and checkpointing, and every completion has exactly C tokens. Ours computes the whole attention
reward; TRL gets constant rewards, which take no time. Each variant is loaded once per point, in its
own process. The variants take turns, one step each. The first round is not timed.
"""

import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from study.common import RESULTS, ROOT, machine, markdown_table, write_results
from study.random_model import make_model
from study.step_arms import worker

ARMS = ("ours", "naive", "trl")
HEADLINE = (512, 64, 8)  # P, C, G
GRID = [(P, C, G) for P in (128, 512, 1100) for C in (32, 110) for G in (4, 8, 16)]
ROUNDS = 5  # timed steps of each variant; half as many in the grid
CPU_LIMIT = 6_000  # on a CPU, only points of the grid with G (P + C) up to this


def plan(device):
    """What to measure: a list of (part of the study, point, rounds, options)."""
    items = []
    for load_in_4bit in (True, False):
        for checkpointing in (True, False):
            options = {"device": device, "load_in_4bit": load_in_4bit}
            options["gradient_checkpointing"] = checkpointing
            items.append(("setting", HEADLINE, ROUNDS, options))
    options = items[0][-1]
    for P, C, G in GRID:
        if device != "cpu" or G * (P + C) <= CPU_LIMIT:
            items.append(("grid", (P, C, G), ROUNDS // 2, options))
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
    except EOFError:
        raise SystemExit(f"{arm} failed at P, C, G = {point}; see its message above") from None
    finally:
        for process in workers:
            process.kill()
            process.join()
    return costs


def measure_missing(items, results, file):
    """Measure the points that are not in `results`, and write the file after each."""
    known = [{k: v for k, v in entry.items() if k != "rows"} for entry in results["measured"]]
    for part, point, rounds, options in tqdm(items, desc="points"):
        entry = dict(part=part, **dict(zip("PCG", point)), **options)
        if entry not in known:
            folder = make_model("30m", ROOT / "runs" / "study", options["device"])
            costs = compare(point, ARMS, rounds, folder, options)
            results["measured"].append(entry | {"rows": costs})
            write_results(file, results)


# --- tables ---


def tables(results):
    """{part of the study: its Markdown table}."""
    costs = ["ours, s", "naive, s", "TRL, s", "naive / ours", "TRL / ours"]
    costs += ["ours, MB", "naive, MB", "TRL, MB"]
    headers = {"setting": ["weights", "checkpointing"], "grid": ["P", "C", "G"]}
    found = {}
    for part, header in headers.items():
        entries = [entry for entry in results["measured"] if entry["part"] == part]
        cells = setting_cells if part == "setting" else point_cells
        rows = [cells(entry) + cost_cells(**entry["rows"]) for entry in entries]
        found[part] = markdown_table(header + costs, rows)
    return found


def setting_cells(entry):
    unquantized = "fp32" if entry["device"] == "cpu" else "16-bit"
    weights = "NF4" if entry["load_in_4bit"] else unquantized
    return [weights, "yes" if entry["gradient_checkpointing"] else "no"]


def point_cells(entry):
    return [str(entry[name]) for name in "PCG"]


def cost_cells(ours, naive, trl):
    """The cells of one measured point."""
    arms = ours, naive, trl
    return [
        *(f"{median(step['seconds'] for step in arm[1:]):.2f}" for arm in arms),
        *(ratio(ours, arm) for arm in (naive, trl)),
        *(f"{arm[0]['peak'] / 2**20:,.0f}" for arm in arms),
    ]


def ratio(ours, theirs):
    """theirs / ours in seconds: the median over rounds, the smallest and the largest."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours[1:], theirs[1:])]
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if available, else cpu")
    add("--results", type=Path, help="JSON file (default: step.json or step_cuda.json in results/)")
    add("--report", action="store_true", help="measure nothing, only print the tables")
    args = parser.parse_args()
    file = args.results or RESULTS / ("step.json" if args.device == "cpu" else "step_cuda.json")
    results = {"machine": machine() | {"threads": torch.get_num_threads()}, "measured": []}
    if file.exists():
        results = json.loads(file.read_text())
    if not args.report:
        measure_missing(plan(args.device), results, file)
    for part, text in tables(results).items():
        print(f"\n{part}\n\n{text}")


if __name__ == "__main__":
    main()
