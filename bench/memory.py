"""Measure peak memory, seconds per step and tokens per second of models with the shapes of
Qwen3-VL-2B, 4B and 8B and random weights.

    python bench/memory.py                # with CUDA: everything, also with capped memory
    python bench/memory.py --shapes 2b    # one shape; later runs add their results
    python bench/memory.py --report       # only rewrite the tables, from the JSON

Without CUDA it computes the memory floors of these shapes, and measures a small shape to show how
close a step comes to its floor. The predictions in the tables come from bench/fit.py. The random
weights are written to disk once: 4.3 GB for 2b, 8.9 GB for 4b, 17.5 GB for 8b. GB are 2**30 bytes.
"""

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.doc_tables import RESULTS, ROOT, insert, machine, markdown_table, write_atomically
from bench.shapes import TEXT, VISION, make_model
from bench.step_arms import PeakMemory, count_forward_tokens, make_step
from model import load_vlm

GB = 2**30
SHAPES = ("2b", "4b", "8b")
POINTS = [(N, G) for N in (256, 1024) for G in (4, 8, 16)]
QUESTION = 76  # tokens of the question and the template around the image
C = 110  # tokens of a completion
CAPS = (6, 8, 12, 16, 24)  # GB
SMALL = "30m"  # the shape measured on a CPU
NOT_MEASURED = "not yet measured"


def memory_floor(shape, N, G, width=2):
    """Lower bound in bytes for the memory of this step, by part.

    It assumes 4-bit weights in the language model, `width` bytes per number elsewhere, and LoRA
    with AdamW in fp32. For its backward pass, a layer keeps the inputs of its products, norms and
    gates, and the keys and values as its completions see them.
    """
    text = TEXT[shape]
    hidden, inner, layers = (
        text[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, kv = (text[k] * text["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    P, tokens = N + QUESTION, N + QUESTION + G * C
    sides = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), *[(hidden, inner)] * 3]
    linear = layers * sum(a * b for a, b in sides)
    lora = layers * sum(16 * (a + b) for a, b in sides)
    embeddings = text["vocab_size"] * hidden * (1 if text["tie_word_embeddings"] else 2)
    per_layer = tokens * (6 * hidden + 2 * heads + 2 * kv + 4 * inner) + 2 * G * (P + C) * heads
    nf4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes per weight, double quantization included
    parts = {
        "weights": linear * nf4 + width * (embeddings + vision_weights(shape)),
        "LoRA": 4 * 4 * lora,  # weights, gradient, two moments
        "KV cache": width * layers * 2 * kv * tokens,  # only while sampling
        "layer inputs": width * layers * hidden * tokens,  # kept by checkpointing, only in training
        "one layer": width * per_layer,
    }
    training = parts["layer inputs"] + parts["one layer"]
    return parts | {"floor": parts["weights"] + parts["LoRA"] + max(parts["KV cache"], training)}


def vision_weights(shape):
    """The number of weights of the vision tower."""
    hidden, tower = TEXT[shape]["hidden_size"], VISION[shape]
    wide, merged = tower["hidden_size"], 4 * tower["hidden_size"]
    blocks = tower["depth"] * wide * (4 * wide + 2 * tower["intermediate_size"])
    mergers = (1 + len(tower["deepstack_visual_indexes"])) * merged * (merged + hidden)
    return blocks + mergers + (1536 + 2304) * wide


def measure_point(vlm, counts, shape, N, G, rounds, cap=None, completions_per_forward=0):
    """Measure the memory of one step, then time `rounds` steps.

    Args: counts, from `count_forward_tokens`; cap, GB of the card to use, or None.
    Returns: the costs as a dict, or None if the step ran out of memory.
    """
    cuda, memory = vlm.device.type == "cuda", PeakMemory(vlm.device)
    try:
        if cuda:
            limit_memory(cap)
        vlm.completions_per_forward = 0
        step = make_step(vlm, N + QUESTION, C, G, N, completions_per_forward)
        with memory.measure():
            step()
        counts["tokens"], start = 0, time.perf_counter()
        for _ in range(rounds):
            step()
        if cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    finally:
        vlm.model.zero_grad()
        gc.collect()
    row = {"shape": shape, "N": N, "G": G, "cap": cap}
    row["completions_per_forward"] = completions_per_forward
    row["peak"] = memory.peak + memory.base * cuda
    if not rounds:
        return row
    seconds = (time.perf_counter() - start) / rounds
    return row | {
        "reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "seconds": seconds,
        "completion_tokens_per_second": G * C / seconds,
        "forward_tokens_per_second": counts["tokens"] / rounds / seconds,
    }


def limit_memory(cap):
    """Limit torch to the memory that a card with `cap` GB would offer. None: no limit."""
    torch.cuda.empty_cache()
    share = 1.0
    if cap:
        free, total = torch.cuda.mem_get_info()
        driver = total - free - torch.cuda.memory_reserved()  # bytes that torch cannot use
        share = (cap * GB - driver) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))


def measure_under_cap(vlm, counts, shape, N, G, cap):
    """Measure with as many completions per forward pass as fit: try all G, then half, and so on.
    Returns: the costs; `peak` is None if not even one fits."""
    size = G
    while size:
        per_forward = 0 if size == G else size
        row = measure_point(vlm, counts, shape, N, G, 1, cap, per_forward)
        if row:
            return row
        size //= 2
    return {"shape": shape, "N": N, "G": G, "cap": cap, "peak": None}


def measure_missing(args, results, save):
    """Measure the missing points, and call `save` after each."""
    cuda = args.device == "cuda"
    shapes, caps = (args.shapes, (None, *CAPS)) if cuda else ([SMALL], (None,))
    known = {(row["shape"], row["N"], row["G"], row["cap"]) for row in results["measured"]}
    for shape in shapes:
        todo = [(N, G, cap) for N, G in POINTS for cap in caps if (shape, N, G, cap) not in known]
        if todo:
            measure_shape(shape, todo, args, results, save)
            gc.collect()


def measure_shape(shape, todo, args, results, save):
    """Measure one shape, and free its model afterwards. Args: todo, a list of (N, G, cap)."""
    cuda = args.device == "cuda"
    folder = make_model(shape, args.models, args.device)
    vlm = load_vlm(folder, device=args.device, gradient_checkpointing=True)
    counts = count_forward_tokens(vlm.core)
    if cuda:
        results["loading"][shape] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for N, G, cap in tqdm(todo, desc=shape):
        point = vlm, counts, shape, N, G
        if cap:
            row = measure_under_cap(*point, cap)
        else:
            row = measure_point(*point, args.rounds * cuda)
        nothing_fits = {"shape": shape, "N": N, "G": G, "cap": None, "peak": None}
        results["measured"].append(row or nothing_fits)
        save()


def tables(cpu_results, cuda_results, predictions):
    """{name: Markdown}. Args: predictions, the "shapes" in the results of bench/fit.py."""
    rows = {(r["shape"], r["N"], r["G"], r["cap"]): r for r in cuda_results["measured"]}
    predicted = {(r["shape"], r["N"], r["G"]): r for r in predictions}
    floors, short, cards, caps = [], [], [], []
    for shape in SHAPES:
        for N, G in POINTS:
            point, parts = [shape.upper(), str(N), str(G)], memory_floor(shape, N, G)
            row, plan = rows.get((shape, N, G, None)), predicted.get((shape, N, G))
            peak = f"{plan['peak'] / GB:.2f}" if plan else ""
            cost = [peak, *cost_cells(row)]
            floors.append([*point, *(f"{part / GB:.2f}" for part in parts.values()), *cost])
            if G == 8:
                short.append([*point, f"{parts['floor'] / GB:.1f}", *cost])
            if plan:
                cards.append([*point, f"{plan['needed']:.1f}", *map(card_cell, plan["cards"])])
            if row:
                caps.append([*point, *(cap_cell(rows.get((shape, N, G, cap))) for cap in CAPS)])
    where, cap_names = ["shape", "N", "G"], [f"{cap} GB" for cap in CAPS]
    cost = ["predicted peak, GB", "measured peak, GB", "s / step"]
    cost += ["completion tokens / s", "forward tokens / s"]
    names = [name for name in memory_floor("2b", 256, 4) if name != "floor"]
    cap_table = markdown_table([*where, *cap_names], caps)
    return {
        "short": markdown_table([*where, "computed floor, GB", *cost], short),
        "floor": markdown_table([*where, *names, "computed floor, GB", *cost], floors),
        "cards": markdown_table([*where, "needed, GB", *cap_names], cards),
        "caps": cap_table if caps else "Not yet measured.",
        "small": small_table(cpu_results),
    }


def card_cell(per_forward):
    """Args: completions per forward pass that fit; 0: all of them; None: not even one."""
    return "no" if per_forward is None else f"{per_forward} per forward" if per_forward else "all"


def cost_cells(row):
    if not row:
        return [NOT_MEASURED] * 4
    if not row["peak"]:
        return ["does not fit", "", "", ""]
    speed = [row["completion_tokens_per_second"], row["forward_tokens_per_second"]]
    cells = [f"{row['peak'] / GB:.2f}", f"{row['seconds']:.1f}"]
    return cells + [f"{value:,.0f}" for value in speed]


def cap_cell(row):
    if not row:
        return ""
    if not row["peak"]:
        return "no"
    return f"{row['completions_per_forward'] or row['G']} per forward, {row['seconds']:.1f} s"


def small_table(results):
    """Measured memory of the small shape against its floor, both without the weights."""
    rows = []
    for row in results["measured"]:
        parts = memory_floor(SMALL, row["N"], row["G"], width=4)
        floor, peak = parts["floor"] - parts["weights"], row["peak"]
        cells = [f"{floor / GB:.3f}", f"{peak / GB:.3f}", f"{peak / floor:.1f}"]
        rows.append([str(row["N"]), str(row["G"]), *cells])
    header = ["N", "G", "floor without weights, GB", "measured above the loaded model, GB", "ratio"]
    return markdown_table(header, rows)


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--shapes", nargs="+", default=SHAPES, choices=SHAPES, help="with CUDA (default: all)")
    add("--rounds", type=int, default=2, help="timed steps per point (default: 2)")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    choices = ["cuda", "cpu"]
    add("--device", default=cuda, choices=choices, help="default: cuda if available, else cpu")
    add("--models", default="runs/bench", help="folder of the random models (default: runs/bench)")
    add("--results", type=Path, default=RESULTS, help="folder (default: bench/results)")
    add("--report", action="store_true", help="only rewrite the tables")
    return parser.parse_args()


def load_results(path):
    if path.exists():
        return json.loads(path.read_text())
    command = " ".join(["python bench/memory.py", *sys.argv[1:]])
    return {"command": command, "machine": machine(), "loading": {}, "measured": []}


def main():
    args = parse_args()
    files = {device: args.results / f"memory_{device}.json" for device in ("cpu", "cuda")}
    results = {device: load_results(file) for device, file in files.items()}

    def save():
        write_atomically(files[args.device], json.dumps(results[args.device], indent=1))

    if not args.report:
        measure_missing(args, results[args.device], save)
    predictions = load_results(args.results / "fit.json").get("shapes", [])
    for name, text in tables(results["cpu"], results["cuda"], predictions).items():
        print(f"\n{name}\n\n{text}")
        if args.results == RESULTS:
            insert(ROOT / "docs" / "cost.md", f"memory {name}", text)


if __name__ == "__main__":
    main()
