"""What one optimiser step costs: ours, ours with the prompt repeated G times, and TRL's GRPOTrainer.

    python bench/step.py                          # what bench/results/step.json still lacks of the study
    python bench/step.py --results mine.json      # all of it anew
    python bench/step.py --points 512,64,8        # one point: P, C, G
    python bench/step.py --report                 # the tables again, from the JSON

Same random Qwen3-VL, LoRA, image, question, G, C, beta, 4-bit and checkpointing; every completion has exactly C tokens.
Ours computes the whole attention reward, TRL gets constant rewards in constant time. Each runs in a process of its own,
which is loaded once for a point; they take turns, one step each, after a round that does not count.
"""

import argparse
import json
import os
import sys
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import attention
from bench.arms import worker
from bench.report import ROOT, insert, machine, markdown
from bench.shapes import TEXT, make

ARMS = ("ours", "naive", "trl")
PARTS = ("sample", "score", "update")
HEADLINE = (512, 64, 8)  # P, C, G
GRID = [(P, C, G) for P in (128, 512, 1100) for C in (32, 110) for G in (4, 8, 16)]
CPU_LIMIT = 6_000  # G (P + C) of the points of the grid that a CPU is asked for


def compare(point, arms, rounds, folder, options):
    """Let the arms take turns at one point. Returns: arm -> what its steps have cost; of the first, only the memory."""
    context, pipes, workers = get_context("spawn"), {}, []
    rows, trained = {arm: [] for arm in arms}, set()
    try:
        for arm in arms:  # one loads at a time
            pipes[arm], theirs = context.Pipe()
            process = context.Process(target=worker, args=(theirs, arm, folder, point, options), daemon=True)
            process.start()
            theirs.close()  # else a worker that dies would leave us waiting
            workers.append(process)
            trained.add(pipes[arm].recv())
        if len(trained) > 1:
            raise SystemExit(f"the arms train different weights: {trained}")
        for turn in range(1 + rounds):
            for arm in arms:
                pipes[arm].send("step")
                rows[arm].append(pipes[arm].recv())
        for pipe in pipes.values():
            pipe.send("stop")
        for process in workers:
            process.join(30)
    except EOFError:
        raise SystemExit(f"{arm} died at P, C, G = {point}; its own message stands above") from None
    finally:
        for process in workers:
            process.kill()
    return rows


def capture_bytes(P, C, G, heads=8, kv_heads=4, head_dim=64):
    """The peak of the tensors that `image_attention` makes, of all heads of one layer."""
    query, key = torch.randn(1, heads, P + G * C, head_dim), torch.randn(1, kv_heads, P + G * C, head_dim)
    capture = attention.Capture([0], list(range(heads)), torch.arange(P))
    with MemTracker() as tracker:
        attention.image_attention(query, key, (P, G, C), capture, head_dim**-0.5)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - query.nbytes - key.nbytes


def todo(args):
    """What is to be measured: (part, point, arms, rounds, options)."""
    options = {"device": args.device, "load_in_4bit": True, "gradient_checkpointing": True}
    if args.points:
        points = [tuple(int(n) for n in text.split(",")) for text in args.points]
        return [("point", point, args.arms, args.rounds, options) for point in points]
    plan = []
    for four_bit in (True, False):
        for checkpointing in (True, False):
            changed = options | {"load_in_4bit": four_bit, "gradient_checkpointing": checkpointing}
            plan.append(("setting", HEADLINE, ARMS, args.rounds, changed))
    for P, C, G in GRID:
        if args.device != "cpu" or G * (P + C) <= CPU_LIMIT:
            plan.append(("grid", (P, C, G), ARMS, max(1, args.rounds // 2), options))
    P, C, G = HEADLINE
    for name, values in (("G", (4, 8, 16, 32)), ("C", (32, 64, 128, 256)), ("layers", (1, 3, 5, 7))):
        for value in values:
            point = (P, value if name == "C" else C, value if name == "G" else G)
            layers = {"layers": tuple(range(value))} if name == "layers" else {}
            plan.append((f"scaling {name}", point, ("ours",), args.rounds, options | layers))
    return plan


def middle(rows, key):
    return median(row[key] for row in rows if key in row)


def ratio(ours, theirs, key="seconds"):
    """Median over the rounds of theirs / ours, with the least and the greatest: neighbours in time are compared."""
    found = [their[key] / our[key] for our, their in zip(ours, theirs) if key in our]
    return f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})"


def tables(results):
    """name -> Markdown."""

    def row_of(entry, first):
        floor, by_arm = 3 * (entry["P"] + entry["G"] * entry["C"]), entry["rows"]
        ours = by_arm.get("ours")

        def cells(arms, text):
            return [text(by_arm[arm]) if arm in by_arm else "" for arm in arms]

        return [
            *first,
            *cells(ARMS, lambda rows: f"{middle(rows, 'seconds'):.2f} = " + " + ".join(
                f"{middle(rows, part):.2f}" for part in PARTS)),
            *cells(("trl", "naive"), lambda rows: ratio(ours, rows) if ours else ""),
            *cells(ARMS, lambda rows: f"{middle(rows, 'peak') / 2**20:,.0f}"),
            *cells(("ours",), lambda rows: f"{middle(rows, 'tokens') / floor:.3f}"),
            *cells(("trl",), lambda rows: f"{middle(rows, 'tokens') / floor:.2f}"),
            *cells(("ours",), lambda rows: f"{100 * middle(rows, 'capture') / middle(rows, 'seconds'):.1f} %"),
        ]  # fmt: skip

    columns = ["ours, s", "naive, s", "TRL, s", "TRL / ours", "naive / ours", "ours, MB", "naive, MB", "TRL, MB",
               "tokens / floor", "TRL's", "capture"]  # fmt: skip
    parts = {}
    for entry in results["measured"]:
        parts.setdefault(entry["part"], []).append(entry)
    out = {}
    for part, entries in parts.items():
        if part == "setting":
            rows = [row_of(e, ["4-bit" if e["load_in_4bit"] else "32-bit",
                               "yes" if e["gradient_checkpointing"] else "no"]) for e in entries]  # fmt: skip
            out[part] = markdown(["weights", "checkpointing", *columns], rows)
        elif part in ("grid", "point"):
            out[part] = markdown(["P", "C", "G", *columns], [row_of(e, [str(e[k]) for k in "PCG"]) for e in entries])
    out["scaling"] = scaling(parts)
    rows = []
    for P, C, G in GRID:
        peak = capture_bytes(P, C, G)
        relative = [f"{peak / (4 * G * C * length):.1f}" for length in (P + C, P + G * C)]
        rows.append([str(P), str(C), str(G), f"{peak / 2**20:.1f}", *relative])
    out["capture"] = markdown(["P", "C", "G", "peak, MB", "in 4 G C (P + C) bytes", "in 4 G C (P + G C) bytes"], rows)
    return {name: text for name, text in out.items() if text}


def scaling(parts):
    """Cost against G, C and the layers captured, each held against the straight line through its points."""
    rows = []
    for name, key in (("G", "seconds"), ("C", "seconds"), ("layers", "capture")):
        entries = parts.get(f"scaling {name}", [])
        x = torch.tensor([float(len(e["layers"]) if name == "layers" else e[name]) for e in entries])
        y = torch.tensor([middle(e["rows"]["ours"], key) for e in entries])
        if len(x) < 3:
            continue
        line = torch.linalg.lstsq(torch.stack([torch.ones_like(x), x], 1), y[:, None]).solution[:, 0]
        off = ((y - line[0] - line[1] * x) / y).abs().max()
        what = "layers captured" if name == "layers" else name
        rows.append([what, key, ", ".join(f"{v:.0f}: {s:.3f}" for v, s in zip(x, y)),
                     f"{line[0]:.3f} + {line[1]:.4f} {name}", f"{100 * off:.0f} %"])  # fmt: skip
    return markdown(["against", "what, s", "measured", "straight line", "furthest from it"], rows) if rows else ""


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--points", nargs="+", metavar="P,C,G", help="measure these points only")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="with --points: which (default: all)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="steps of each arm that count (default: 5; in the grid: half)"
    )
    parser.add_argument("--shape", default="30m", choices=TEXT, help="of the random model (default: 30m)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="runs/bench", help="where random models are kept (default: runs/bench)")
    parser.add_argument("--results", help="default: step.json in bench/results; of --points, in --models")
    parser.add_argument("--report", action="store_true", help="only make the tables again")
    args = parser.parse_args()
    file = results_file(args)
    if args.report or file.exists():
        results = json.loads(file.read_text())
    else:
        where = machine() | {"trl": version("trl"), "threads": torch.get_num_threads()}
        results = {"command": " ".join(["python bench/step.py", *sys.argv[1:]]), "machine": where,
                   "shape": args.shape, "measured": []}  # fmt: skip
    if not args.report:
        measure(args, results, file)
    for name, text in tables(results).items():
        print(f"\n{name}\n\n{text}")
        if file == HERE / "results" / "step.json":
            insert(HERE / "README.md", f"step {name}", text)
            if name == "setting":
                insert(ROOT / "README.md", "cost", text)


def results_file(args):
    """Each device, and each shape, has its own; points apart are no part of the study."""
    device, shape = "" if args.device == "cpu" else "_cuda", "" if args.shape == "30m" else f"_{args.shape}"
    folder = Path(args.models) if args.points else HERE / "results"
    return Path(args.results or folder / f"step{device}{shape}.json")


def measure(args, results, file):
    """Add to `results`, and write into `file`, what is not in them yet."""
    folder = make(args.shape, args.models, args.device)
    known = [{key: value for key, value in entry.items() if key != "rows"} for entry in results["measured"]]
    with tqdm(todo(args), desc="points") as bar:
        for part, point, arms, rounds, options in bar:
            entry = json.loads(json.dumps(dict(part=part, **dict(zip("PCG", point)), **options)))
            bar.set_postfix_str(f"{part}: P {point[0]}, C {point[1]}, G {point[2]}")
            if entry not in known:
                results["measured"].append(entry | {"rows": compare(point, arms, rounds, folder, options)})
                file.parent.mkdir(parents=True, exist_ok=True)
                Path(f"{file}.new").write_text(json.dumps(results, indent=1))
                os.replace(f"{file}.new", file)


if __name__ == "__main__":
    main()
