"""Where the time of one of our steps goes, by kind of operation.

    python bench/profile_step.py                  # the points where TRL / ours is smallest
    python bench/profile_step.py 512,64,8         # one point: P, C, G
    python bench/profile_step.py --report         # only rewrite the table, from the JSON

The model, its weights and the step are those of `step.py`, in NF4 with checkpointing. The profiler
makes short operations slower, so the shares are more exact than the seconds.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.doc_tables import RESULTS, ROOT, insert, machine, markdown_table, write_atomically
from bench.shapes import make_model
from bench.step import median_of
from bench.step_arms import make_step
from model import load_vlm

POINTS = ["128,32,4", "128,110,4", "128,110,8", "128,110,16", "512,110,4"]
FILE = RESULTS / "profile_step.json"
PRODUCTS = "mm addmm addmm_ bmm baddbmm _scaled_dot_product_flash_attention_for_cpu convolution"
KINDS = {
    "dequantization": lambda name: name.startswith("bitsandbytes::"),
    "products": lambda name: (
        name.removeprefix("aten::") in PRODUCTS.split() or "dot_product" in name or "mkldnn" in name
    ),
    "rest": lambda name: True,
}


def profile_point(point, folder):
    """The seconds of one step by kind of operation, and of its longest operations."""
    vlm = load_vlm(folder, load_in_4bit=True, device="cpu", gradient_checkpointing=True)
    step = make_step(vlm, *point)
    step()  # allocates some memory once
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}
    seconds = dict.fromkeys(KINDS, 0.0)
    for name, time in events.items():
        seconds[next(kind for kind, is_kind in KINDS.items() if is_kind(name))] += time
    longest = sorted(events.items(), key=lambda item: -item[1])[:12]
    return {"seconds": seconds, "longest": dict(longest)}


def table(results, steps):
    """Args: steps, the results of `step.py`, for the seconds of TRL and of our step without the
    profiler. The last column is what TRL / ours would be if everything but dequantization and
    products took no time."""
    rows = []
    for text, point in results["points"].items():
        shape, seconds = [int(n) for n in text.split(",")], point["seconds"]
        entry = next(e for e in steps if e["part"] == "grid" and [e[k] for k in "PCG"] == shape)
        ours, trl = (median_of(entry["rows"][arm], "seconds") for arm in ("ours", "trl"))
        shares = [value / sum(seconds.values()) for value in seconds.values()]
        ratios = [trl / ours, trl / ours / (1 - shares[2])]
        cells = [f"{100 * share:.0f} %" for share in shares] + [f"{r:.1f}" for r in ratios]
        rows.append([*map(str, shape), *cells])
    header = ["P", "C", "G", "dequantization", "products", "rest", "TRL / ours", "without the rest"]
    return markdown_table(header, rows)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("points", nargs="*", default=POINTS, metavar="P,C,G")
    parser.add_argument("--models", default="runs/bench", help="default: runs/bench")
    parser.add_argument("--report", action="store_true", help="only rewrite the table")
    args = parser.parse_args()
    if args.report:
        results = json.loads(FILE.read_text())
    else:
        folder = make_model("30m", args.models, "cpu")
        results = {"command": "python bench/profile_step.py", "machine": machine()}
        results["machine"]["threads"] = torch.get_num_threads()
        results["points"] = {
            text: profile_point([int(n) for n in text.split(",")], folder) for text in args.points
        }
        if args.points == POINTS:
            write_atomically(FILE, json.dumps(results, indent=1))
    steps = json.loads((RESULTS / "step.json").read_text())["measured"]
    text = table(results, steps)
    print(text)
    if args.points == POINTS:
        insert(ROOT / "docs" / "cost.md", "step profile", text)


if __name__ == "__main__":
    main()
