"""What Qwen3-VL-2B, 4B and 8B need: peak memory, seconds a step, tokens a second. Random weights of their shapes.

    python bench/memory.py                 # on a CUDA card: everything, also under caps that imitate smaller cards
    python bench/memory.py --shapes 2b     # one shape; the others can follow later, results are added up
    python bench/memory.py --report        # the tables again, from the JSON

Without CUDA it prints the computed floor of these shapes, and beside it what a small shape really takes. The random
weights are written once (2b 4.3 GB, 4b 8.9 GB, 8b 17.5 GB of disk). GB are 2**30 bytes.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from bench.arms import Memory, count, our_step
from bench.report import ROOT, insert, machine, markdown
from bench.shapes import TEXT, VISION, make
from model import load_vlm

GB = 2**30
SHAPES = ("2b", "4b", "8b")
POINTS = [(N, G) for N in (256, 1024) for G in (4, 8, 16)]
QUESTION, C = 76, 110  # tokens of the question and the template around the image, and of an answer
CAPS = (6, 8, 12, 16, 24)
SMALL = "30m"


def floor(shape, N, G, width=2):
    """Bytes that no implementation of this step can do without, by part: `width` bytes a number, 4-bit weights of the
    language model, fp32 LoRA with AdamW. What a layer keeps for its backward pass: inputs of its products, norms and
    gates; keys and values as its completions see them."""
    text, tower = TEXT[shape], VISION[shape]
    hidden, inner, layers = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    heads, kv = text["num_attention_heads"] * text["head_dim"], text["num_key_value_heads"] * text["head_dim"]
    P, tokens = N + QUESTION, N + QUESTION + G * C
    sides = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden), *[(hidden, inner)] * 3]
    linear = layers * sum(a * b for a, b in sides)
    lora = layers * sum(16 * (a + b) for a, b in sides)
    embeddings = text["vocab_size"] * hidden * (1 if text["tie_word_embeddings"] else 2)
    wide, merged = tower["hidden_size"], 4 * tower["hidden_size"]
    vision = tower["depth"] * wide * (4 * wide + 2 * tower["intermediate_size"])
    vision += (1 + len(tower["deepstack_visual_indexes"])) * merged * (merged + hidden) + (1536 + 2304) * wide
    a_layer = tokens * (6 * hidden + 2 * heads + 2 * kv + 4 * inner) + 2 * G * (P + C) * heads
    parts = {
        "weights": linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + width * (embeddings + vision),
        "LoRA": 4 * 4 * lora,  # itself, its gradient, two moments
        "KV cache": width * layers * 2 * kv * tokens,  # only while sampling
        "layer inputs": width * layers * hidden * tokens,  # of gradient checkpointing, only while training
        "one layer": width * a_layer,
    }
    training = parts["layer inputs"] + parts["one layer"]
    return parts | {"floor": parts["weights"] + parts["LoRA"] + max(parts["KV cache"], training)}


def measured(vlm, seen, shape, N, G, rounds, cap=None, completions_per_forward=0):
    """A step at one point whose memory is watched, then `rounds` that are timed. Returns: what they cost, or None if
    memory did not suffice."""
    cuda, memory = vlm.device.type == "cuda", Memory(vlm.device)
    try:
        if cuda:
            torch.cuda.empty_cache()
            share = min(1.0, (cap * GB - context()) / torch.cuda.get_device_properties(0).total_memory) if cap else 1.0
            torch.cuda.set_per_process_memory_fraction(share)
        vlm.completions_per_forward = 0
        step = our_step(vlm, N + QUESTION, C, G, N, completions_per_forward)
        with memory.watch():
            step()
        seen["tokens"], start = 0, time.perf_counter()
        for _ in range(rounds):
            step()
        if cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None
    finally:
        vlm.model.zero_grad()
        gc.collect()
    row = {"shape": shape, "N": N, "G": G, "cap": cap, "completions_per_forward": completions_per_forward,
           "peak": memory.peak + memory.base * cuda}  # fmt: skip
    if not rounds:
        return row
    seconds = (time.perf_counter() - start) / rounds
    return row | {"reserved": torch.cuda.max_memory_reserved() if cuda else None, "seconds": seconds,
                  "written_per_second": G * C / seconds,
                  "forward_tokens_per_second": seen["tokens"] / rounds / seconds}  # fmt: skip


def context():
    """Bytes of the card that are gone before the first tensor: the driver's own."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def under_cap(vlm, seen, shape, N, G, cap):
    """With as many completions in a forward as fit. Returns: what it cost, or what did not fit."""
    size = G
    while size:
        row = measured(vlm, seen, shape, N, G, 1, cap, 0 if size == G else size)
        if row:
            return row
        size //= 2
    return {"shape": shape, "N": N, "G": G, "cap": cap, "peak": None}


def run(args, results, save):
    """Add to `results` what they lack of the points asked for."""
    cuda = args.device == "cuda"
    shapes, points, caps = (args.shapes, POINTS, (None, *CAPS)) if cuda else ([SMALL], POINTS, (None,))
    known = {(row["shape"], row["N"], row["G"], row["cap"]) for row in results["measured"]}
    for shape in shapes:
        todo = [(N, G, cap) for N, G in points for cap in caps if (shape, N, G, cap) not in known]
        if not todo:
            continue
        folder = make(shape, args.models, args.device)
        vlm = load_vlm(folder, device=args.device, gradient_checkpointing=True)
        seen = count(vlm.core)
        if cuda:
            results["loading"][shape] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        for N, G, cap in tqdm(todo, desc=shape):
            where = vlm, seen, shape, N, G
            row = under_cap(*where, cap) if cap else measured(*where, args.rounds * cuda)
            results["measured"].append(row or {"shape": shape, "N": N, "G": G, "cap": None, "peak": None})
            save()
        del vlm
        gc.collect()


def tables(results, card):
    """name -> Markdown, from the results of the CPU and of the card."""
    card = {(row["shape"], row["N"], row["G"], row["cap"]): row for row in card["measured"]}
    floors, short, caps, small = [], [], [], []
    for shape in SHAPES:
        for N, G in POINTS:
            parts, row, first = floor(shape, N, G), card.get((shape, N, G, None)), [shape.upper(), str(N), str(G)]
            found = ["not yet measured"] * 4
            if row and row["peak"]:
                speed = (f"{row[key]:,.0f}" for key in ("written_per_second", "forward_tokens_per_second"))
                found = [f"{row['peak'] / GB:.2f}", f"{row['seconds']:.1f}", *speed]
            elif row:
                found = ["does not fit", "", "", ""]
            if row:
                cells = [card.get((shape, N, G, cap)) for cap in CAPS]
                caps.append([*first, *("" if not c else "no" if not c["peak"] else
                                       f"{c['completions_per_forward'] or G} in a forward, {c['seconds']:.1f} s"
                                       for c in cells)])  # fmt: skip
            floors.append([*first, *(f"{part / GB:.2f}" for part in parts.values()), *found])
            if G == 8:
                short.append([*first, f"{parts['floor'] / GB:.1f}", *found])
    for row in results["measured"]:
        parts = floor(SMALL, row["N"], row["G"], width=4)
        over = parts["floor"] - parts["weights"]
        small.append([str(row["N"]), str(row["G"]), *(f"{size / GB:.3f}" for size in (over, row["peak"])),
                      f"{row['peak'] / over:.1f}"])  # fmt: skip
    where, cost = ["shape", "N", "G"], ["peak, GB", "s / step", "tokens written / s", "forward tokens / s"]
    names = [name for name in floor("2b", 256, 4) if name != "floor"]
    return {
        "floor": markdown([*where, *names, "computed floor, GB", *cost], floors),
        "short": markdown([*where, "computed floor, GB", *cost], short),
        "caps": markdown([*where, *(f"{cap} GB" for cap in CAPS)], caps) if caps else "Not yet measured.",
        "small": markdown(["N", "G", "floor less weights, GB", "measured over the loaded model, GB", "ratio"], small),
    }  # fmt: skip


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES, help="with CUDA (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="steps that are timed at a point (default: 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--models", default="runs/bench", help="where random models are kept (default: runs/bench)")
    parser.add_argument("--results", default=HERE / "results", help="folder (default: bench/results)")
    parser.add_argument("--report", action="store_true", help="only make the tables again")
    args = parser.parse_args()
    files = {device: Path(args.results, f"memory_{device}.json") for device in ("cpu", "cuda")}
    command = " ".join(["python bench/memory.py", *sys.argv[1:]])
    every = {device: json.loads(file.read_text()) if file.exists() else
             {"command": command, "machine": machine(), "loading": {}, "measured": []}
             for device, file in files.items()}  # fmt: skip

    def save():
        new = Path(f"{files[args.device]}.new")
        new.parent.mkdir(exist_ok=True)
        new.write_text(json.dumps(every[args.device], indent=1))
        os.replace(new, files[args.device])

    if not args.report:
        run(args, every[args.device], save)
    for name, text in tables(every["cpu"], every["cuda"]).items():
        print(f"\n{name}\n\n{text}")
        if Path(args.results) == HERE / "results":
            insert(*(ROOT / "README.md", "memory") if name == "short" else (HERE / "README.md", f"memory {name}"), text)


if __name__ == "__main__":
    main()
