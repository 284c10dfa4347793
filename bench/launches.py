"""Count the operations that launch a kernel, on meta tensors: no GPU and no weights are needed.

    python bench/launches.py          # Qwen3-VL-2B's shape; writes bench/results/launches.json
    python bench/launches.py --report # only rewrite the table, from the JSON

It counts one decoded token (ours, and transformers with PEFT's wrappers and a DynamicCache, which
is what this program used before `sources/decoding.py`), and one packed forward and backward of a
group. Views and allocations launch nothing and are not counted. RMSNorm as `rms_norm` counts once,
as on CUDA; so does bitsandbytes' 4-bit product.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent.parent))
import reward
import sources.decoding as decoding
from analysis.meta_memory import MetaMemory, meta_as_device
from analysis.predict_memory import build_on_meta, rehearsed_example, rehearsed_vlm
from bench.doc_tables import RESULTS, ROOT, insert, machine, markdown_table, write_atomically
from bench.shapes import model_config
from config import Config
from data import encode_example

GOAL = 1500  # operations per decoded token at 28 layers
NO_KERNEL = set(
    "view _unsafe_view reshape expand transpose t permute slice select split split_with_sizes "
    "unsqueeze squeeze unbind detach alias as_strided unfold empty empty_like empty_strided "
    "new_empty _reshape_alias set_data lift_fresh mT chunk".split()
)
REST = "attention, rotary embedding, cache, residuals"
MODULES = {  # class name of a module of transformers or PEFT -> row of the table
    "Linear4bit": "linear layers and LoRA",
    "RMSNorm": "RMSNorm",
    "MLP": "activation",
}


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel by the innermost `label`."""

    def __init__(self):
        super().__init__()
        self.counts, self.labels, self.muted = Counter(), [REST], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if name not in NO_KERNEL and not self.muted and any(x.is_meta for x in tensors):
            self.counts[self.labels[-1]] += 1
        return function(*args, **(kwargs or {}))

    def wrap(self, function, label, as_one=False):
        """`function`, with its operations under `label`; `as_one`: they count as one."""

        def wrapped(*args, **kwargs):
            self.labels.append(label)
            self.counts[label] += as_one and not self.muted
            self.muted += as_one
            try:
                return function(*args, **kwargs)
            finally:
                self.muted -= as_one
                self.labels.pop()

        return wrapped


def label_modules(launches, core):
    """Attribute the operations of transformers' modules."""
    for module in core.model.language_model.modules():
        for suffix, label in MODULES.items():
            if type(module).__name__.endswith(suffix):
                module.forward = launches.wrap(module.forward, label)


def count(launches, function):
    launches.counts.clear()
    with launches:
        function()
    return dict(launches.counts)


def count_all(shape, text_tokens, grid, G, C):
    """Returns: {what: {row: operations}}."""
    cfg = Config(num_generations=G, max_completion_length=C, gradient_checkpointing=False)
    results, memory = {}, MetaMemory()
    model = build_on_meta(model_config(shape), torch.bfloat16)
    with memory, meta_as_device("cuda"):
        memory.enter("loading")
        vlm = rehearsed_vlm(model, cfg, memory, text_tokens, grid)
        prompt = encode_example(vlm, rehearsed_example(vlm), cfg)
        with torch.no_grad():
            hidden, caches, start = vlm._prefill([prompt], G)
            token = torch.zeros(G, dtype=torch.long, device="meta")
            launches = Launches()
            results["ours"] = count(launches, decoded(vlm, launches, caches, start, token))
            results["before"] = count(
                launches, by_transformers(vlm, launches, caches, start, token)
            )
        completions = vlm.sample(prompt, G, C)
        for p in vlm.core.modules():
            p.__dict__.pop("forward", None)
        launches, scores = Launches(), []
        results["packed forward"] = count(
            launches, lambda: scores.append(vlm.score(prompt, completions))
        )
        ones = torch.ones(G, device="meta")
        results["backward"] = count(
            launches,
            lambda: reward.grpo_loss(
                scores[0].logps, scores[0].logps.detach(), None, ones, completions.mask
            )[0].backward(),
        )
    return results


def decoded(vlm, launches, caches, start, token):
    decoder = decoding.Decoder(vlm.core, caches, start, 8)
    decoding.normalize = launches.wrap(decoding.normalize, "RMSNorm", as_one=True)
    for layer in decoder.layers:
        layer.mlp.act_fn.forward = launches.wrap(layer.mlp.act_fn.forward, "activation")
        for name in ("qkv", "out", "gate_up", "down"):
            setattr(layer, name, launches.wrap(getattr(layer, name), "linear layers and LoRA"))
    return lambda: decoder.step(token, 3)


def by_transformers(vlm, launches, caches, start, token):
    """The same token with the model's own forward, each completion with its own cache."""
    label_modules(launches, vlm.core)
    cache, G = DynamicCache(), len(token)
    for index, layer in enumerate(caches):
        keys, values = (x.expand(G, -1, -1, -1) for x in (layer.keys, layer.values))
        cache.update(keys, values, index)
    inputs = {"input_ids": token[:, None], "position_ids": start.expand(3, 1, -1).mT}
    return lambda: vlm.core.model(**inputs, use_cache=True, **{vlm.cache_name: cache})


def table(results):
    rows, ours, before = [], results["ours"], results["before"]
    for name in sorted(ours.keys() | before.keys(), key=lambda n: -before.get(n, 0)):
        rows.append([name, f"{before.get(name, 0):,}", f"{ours.get(name, 0):,}"])
    totals = [sum(results[key].values()) for key in ("before", "ours")]
    rows.append(["**total**", *(f"**{total:,}**" for total in totals)])
    return markdown_table(["operations per decoded token", "transformers + PEFT", "ours"], rows)


def summary(results):
    forward, backward = (sum(results[key].values()) for key in ("packed forward", "backward"))
    return f"One packed forward of a group takes {forward:,} operations, its backward {backward:,}."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="only rewrite the table")
    path = RESULTS / "launches.json"
    if not parser.parse_args().report:
        point = {"shape": "2b", "text_tokens": 128, "grid": (16, 16), "G": 8, "C": 64}
        content = {"machine": machine(), "point": point, "counts": count_all(**point)}
        write_atomically(path, json.dumps(content, indent=1))
    counts = json.loads(path.read_text())["counts"]
    print(table(counts), summary(counts), sep="\n\n")
    insert(ROOT / "docs" / "cost.md", "launches", f"{table(counts)}\n\n{summary(counts)}")


if __name__ == "__main__":
    main()
