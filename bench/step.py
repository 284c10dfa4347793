"""What one optimizer step costs: ours, ours without the shared prompt, and TRL's GRPOTrainer.

    python bench/step.py                        # everything missing in bench/results/step.json
    python bench/step.py --results mine.json    # everything, for your own machine
    python bench/step.py --points 512,64,8      # one point: P, C, G
    python bench/step.py --report               # only rewrite the tables, from the JSON

All three variants (--arms) have the same random Qwen3-VL, LoRA, image, question, G, C, beta,
quantization and checkpointing, and every completion has exactly C tokens. Ours computes the whole
attention reward; TRL gets constant rewards, which take no time. Each variant is loaded once per
point, in its own process. The variants take turns, one step each. The first round is not timed.
"""

import argparse
import json
import sys
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import attention
from bench.doc_tables import RESULTS, ROOT, insert, machine, markdown_table, write_atomically
from bench.shapes import TEXT, make_model
from bench.step_arms import worker

ARMS = ("ours", "naive", "trl")
PARTS = ("sample", "score", "update")
HEADLINE = (512, 64, 8)  # P, C, G
GRID = [(P, C, G) for P in (128, 512, 1100) for C in (32, 110) for G in (4, 8, 16)]
CPU_LIMIT = 6_000  # on a CPU, only points of the grid with G (P + C) up to this
SCALING = {"G": (4, 8, 16, 32), "C": (32, 64, 128, 256), "layers": (1, 3, 5, 7)}


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


def capture_bytes(P, C, G, heads=8, kv_heads=4, head_dim=64):
    """The peak memory of the tensors that `image_attention` creates for all heads of one layer."""
    length = P + G * C
    query = torch.randn(1, heads, length, head_dim)
    key = torch.randn(1, kv_heads, length, head_dim)
    capture = attention.Capture([0], list(range(heads)))
    group = attention.PackedGroup(P, G, C, torch.arange(P), None)
    with MemTracker() as tracker:
        attention.image_attention(query, key, group, capture, head_dim**-0.5)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak - query.nbytes - key.nbytes


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


def median_of(costs, key):
    return median(step[key] for step in costs if key in step)


def ratio(ours, theirs):
    """theirs / ours in seconds: the median over rounds, the smallest and the largest."""
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(ours, theirs) if "seconds" in a]
    return f"{median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"


def seconds(costs):
    parts = " + ".join(f"{median_of(costs, part):.2f}" for part in PARTS)
    return f"{median_of(costs, 'seconds'):.2f} = {parts}"


def megabytes(costs):
    return f"{median_of(costs, 'peak') / 2**20:,.0f}"


COST_COLUMNS = [
    *("ours, s", "naive, s", "TRL, s", "TRL / ours", "naive / ours"),
    *("ours, MB", "naive, MB", "TRL, MB"),
    *("ours, tokens / reference", "TRL, tokens / reference", "capture"),
]


def cost_cells(entry):
    """The cells of one measured point; empty for a variant that was not measured."""
    reference, costs = 3 * (entry["P"] + entry["G"] * entry["C"]), entry["rows"]
    ours, naive, trl = (costs.get(arm) for arm in ARMS)

    def share(costs, key):
        return f"{100 * median_of(costs, key) / median_of(costs, 'seconds'):.1f} %"

    return [
        *(seconds(arm) if arm else "" for arm in (ours, naive, trl)),
        *(ratio(ours, arm) if ours and arm else "" for arm in (trl, naive)),
        *(megabytes(arm) if arm else "" for arm in (ours, naive, trl)),
        f"{median_of(ours, 'tokens') / reference:.3f}" if ours else "",
        f"{median_of(trl, 'tokens') / reference:.2f}" if trl else "",
        share(ours, "capture") if ours else "",
    ]


def setting_cells(entry):
    unquantized = "fp32" if entry["device"] == "cpu" else "16-bit"
    weights = "NF4" if entry["load_in_4bit"] else unquantized
    return [weights, "yes" if entry["gradient_checkpointing"] else "no"]


def tables(results):
    """{name: Markdown} for everything that was measured, and for the memory of the capture."""
    parts = {}
    for entry in results["measured"]:
        parts.setdefault(entry["part"], []).append(entry)
    texts = {}
    if "setting" in parts:
        rows = [setting_cells(entry) + cost_cells(entry) for entry in parts["setting"]]
        texts["setting"] = markdown_table(["weights", "checkpointing", *COST_COLUMNS], rows)
    for part in ("grid", "point"):
        rows = [[str(e[k]) for k in "PCG"] + cost_cells(e) for e in parts.get(part, [])]
        if rows:
            texts[part] = markdown_table(["P", "C", "G", *COST_COLUMNS], rows)
    if rows := scaling_rows(parts):
        header = ["against", "unit", "measured", "linear fit", "largest deviation"]
        texts["scaling"] = markdown_table(header, rows)
    texts["capture"] = capture_table()
    return texts


def readme_table(results):
    """The table of README.md: our costs and TRL's in each setting."""
    rows = []
    for entry in results["measured"]:
        if entry["part"] == "setting":
            ours, trl = entry["rows"]["ours"], entry["rows"]["trl"]
            both = (ours, trl)
            rows.append(
                [
                    *setting_cells(entry),
                    *(f"{median_of(costs, 'seconds'):.2f}" for costs in both),
                    ratio(ours, trl),
                    *(megabytes(costs) for costs in both),
                ]
            )
    header = ["weights", "checkpointing", "ours, s", "TRL, s", "TRL / ours", "ours, MB", "TRL, MB"]
    return markdown_table(header, rows)


def scaling_rows(parts):
    """Cost against G, C and the number of captured layers, with a linear fit and the largest
    relative deviation from it."""
    rows = []
    for name, key in (("G", "seconds"), ("C", "seconds"), ("layers", "capture")):
        entries = parts.get(f"scaling {name}", [])
        if len(entries) < 3:
            continue
        values = [float(len(e["layers"]) if name == "layers" else e[name]) for e in entries]
        x, y = (
            torch.tensor(values),
            torch.tensor([median_of(e["rows"]["ours"], key) for e in entries]),
        )
        matrix = torch.stack([torch.ones_like(x), x], 1)
        a, b = torch.linalg.lstsq(matrix, y[:, None]).solution[:, 0]
        deviation = ((y - a - b * x) / y).abs().max()
        against = "captured layers" if name == "layers" else name
        unit = "s per step" if key == "seconds" else "s of capture"
        measured = ", ".join(f"{v:.0f}: {s:.3f}" for v, s in zip(x, y))
        line = f"{a:.3f} + {b:.4f} {name}"
        rows.append([against, unit, measured, line, f"{100 * deviation:.0f} %"])
    return rows


def capture_table():
    rows = []
    for P, C, G in GRID:
        peak = capture_bytes(P, C, G)
        relative = [f"{peak / (4 * G * C * length):.1f}" for length in (P + C, P + G * C)]
        rows.append([str(P), str(C), str(G), f"{peak / 2**20:.1f}", *relative])
    header = ["P", "C", "G", "peak, MB", "peak / 4 G C (P + C)", "peak / 4 G C (P + G C)"]
    return markdown_table(header, rows)


def results_file(args):
    """The default of --results. Every device and shape has its own file. Single points are not part
    of the study; their results go to the folder of the models."""
    if args.results:
        return Path(args.results)
    device = "" if args.device == "cpu" else "_cuda"
    shape = "" if args.shape == "30m" else f"_{args.shape}"
    return (Path(args.models) if args.points else RESULTS) / f"step{device}{shape}.json"


def measure_missing(args, results, file):
    """Measure the missing points, and write the file after each."""
    folder = make_model(args.shape, args.models, args.device)
    known = [{k: v for k, v in entry.items() if k != "rows"} for entry in results["measured"]]
    with tqdm(plan(args), desc="points") as bar:
        for part, point, arms, rounds, options in bar:
            entry = json.loads(json.dumps(dict(part=part, **dict(zip("PCG", point)), **options)))
            bar.set_postfix_str(f"{part}: P {point[0]}, C {point[1]}, G {point[2]}")
            if entry not in known:
                costs = compare(point, arms, rounds, folder, options)
                results["measured"].append(entry | {"rows": costs})
                write_atomically(file, json.dumps(results, indent=1))


def write_docs(results):
    """Write the tables of docs/cost.md and README.md."""
    for name, text in tables(results).items():
        insert(ROOT / "docs" / "cost.md", f"step {name}", text)
    insert(ROOT / "README.md", "cost", readme_table(results))


def parse_args():
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
    add("--models", default="runs/bench", help="folder of the random models (default: runs/bench)")
    add("--results", help="file; default: step.json in bench/results, or in --models with --points")
    add("--report", action="store_true", help="only rewrite the tables")
    return parser.parse_args()


def main():
    args = parse_args()
    file = results_file(args)
    if args.report or file.exists():
        results = json.loads(file.read_text())
    else:
        info = machine() | {"trl": version("trl"), "threads": torch.get_num_threads()}
        command = " ".join(["python bench/step.py", *sys.argv[1:]])
        results = {"command": command, "machine": info, "shape": args.shape, "measured": []}
    if not args.report:
        measure_missing(args, results, file)
    for name, text in tables(results).items():
        print(f"\n{name}\n\n{text}")
    if file == RESULTS / "step.json":
        write_docs(results)


if __name__ == "__main__":
    main()
