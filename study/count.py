"""Counts what a training step asks of a GPU, on meta tensors: kernel launches, bytes read and
written, FLOPs, and how often the CPU waits for the GPU. Predicts seconds from these counts.

    python study/count.py                     # Qwen3-VL-2B, P 1,100, C 110, G 8, 4 questions
    python study/count.py --fused             # as on a T4

An operation takes the longer of its bytes at 80 % of a card's bandwidth and its FLOPs at half of
its peak; a phase takes at least its launches at 8 µs, except decoding, which a graph launches. On
meta tensors an RMSNorm is six operations, on CUDA one.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent))
import decoding
from config import Config
from extras import fit, shapes
from extras.meta_memory import META, MetaMemory, leaves
from model import CHECK_DONE
from study.common import markdown_table
from study.random_model import CELL, model_config
from study.step_arms import LEARNING

QUESTION = 76  # tokens around the image
CARDS = {"T4": (65e12, 0.32e12), "4090": (165e12, 1.008e12), "H100": (990e12, 3.35e12)}
LAUNCH = 8e-6  # seconds of the CPU per operation
WAIT = "_local_scalar_dense nonzero masked_select repeat_interleave unique_consecutive".split()
FREE = "empty empty_like empty_strided new_empty new_empty_strided detach alias _unsafe_view "
FREE = set((FREE + "lift_fresh _reshape_alias zeros_like_").split())


class MetaCounter(MetaMemory):
    """Adds up the counts of every phase. `fused`: bitsandbytes multiplies 4-bit weights with up to
    32 rows in one kernel, as on a T4; otherwise sampling dequantizes the weights once."""

    def __init__(self, fused=False):
        super().__init__()
        self.fused, self.counts = fused, defaultdict(Counter)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.partition("::")[2]
        inputs = [x for x in leaves((args, tuple(kwargs.values()))) if isinstance(x, torch.Tensor)]
        on_gpu, count = [x for x in inputs if x.is_meta], self.counts[self.phase]
        there, wait = kwargs.get("device"), False
        if name == "_to_copy" and there is not None and inputs[0].device != torch.device(there):
            wait = inputs[0].numel() and (on_gpu or not kwargs.get("non_blocking"))
        elif on_gpu:
            masks = name in ("index", "index_put_") and any(
                x.dtype == torch.bool for x in on_gpu[1:]
            )
            wait = name in WAIT or masks
        count["waits"] += bool(wait)
        few = name == "gemm_4bit" and inputs[0].numel() // inputs[0].shape[-1] <= 32
        if few and self.fused:
            features = args[2][0]  # rows of the weight
            out, flops = inputs[0].new_empty(*inputs[0].shape[:-1], features), 2 * features
            flops *= inputs[0].numel()
        else:
            out, flops = super().__torch_dispatch__(function, types, args, kwargs), 0
            if name == "gemm_4bit":  # its parts are counted
                return out
        returns = function._schema.returns
        alias = returns[0].alias_info if returns else None
        if name in FREE or (alias and not alias.is_write) or not (on_gpu or there == META):
            return out
        tensors = on_gpu + [x for x in leaves(out) if isinstance(x, torch.Tensor) and x.is_meta]
        size = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors)
        if formula := flop_registry.get(function.overloadpacket):
            # torch's formula for bmm does not know its out_dtype.
            flops = formula(*(x for x in args if x is not torch.float32), **kwargs, out_val=out)
        count.update(launches=1, bytes=size, flops=flops)
        for card, (peak, bandwidth) in CARDS.items():
            count[card] += max(flops / peak / 0.5, size / bandwidth / 0.8)
        return out


def count_step(shape, cfg, fused=False):
    """{phase: Counter} of one step. It is counted with 3 and 4 layers and extrapolated, because
    every further layer does the same."""
    config = model_config(shape)
    layers = config.text_config.num_hidden_layers
    three, four = (count_layers(shape, cfg, fused, n) for n in (3, 4))
    return {
        phase: Counter({k: v + (layers - 4) * (v - three[phase][k]) for k, v in count.items()})
        for phase, count in four.items()
    }


def count_layers(shape, cfg, fused, layers):
    """{phase: Counter} of one step. The decoded tokens are a phase of their own."""
    memory, config = MetaCounter(fused), model_config(shape)
    config.text_config.num_hidden_layers = layers
    step = decoding.Decoder.step

    def count_token(decoder, *args):
        memory.phase = "token"
        out = step(decoder, *args)
        memory.phase = "sampling"
        return out

    with (
        patch.object(decoding, "room_for_weights", lambda *_: not fused),
        patch.object(fit, "MetaMemory", lambda: memory),
        patch.object(decoding.Decoder, "step", count_token),
    ):
        fit.rehearse(config, cfg, QUESTION)
    tokens = fit.DECODED - 1  # were fed to the decoder
    for key in memory.counts["token"]:
        memory.counts["token"][key] *= (cfg.max_completion_length - 1) / tokens
    memory.counts["token"]["waits"] += cfg.max_completion_length // CHECK_DONE["cuda"]
    memory.counts.pop("loading")
    return memory.counts


def seconds(counts, card, graph):
    """Predicted seconds of a step."""
    cpu = {phase: 0 if graph and phase == "token" else LAUNCH for phase in counts}
    return sum(max(c[card], c["launches"] * cpu[phase]) for phase, c in counts.items())


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--shape", default="2b", choices=shapes.TEXT, help="shape of the model (default: 2b)")
    add("--P", type=int, default=1100, help="prompt tokens (default: 1100)")
    add("--fused", action="store_true", help="bitsandbytes fuses products of few rows, as on a T4")
    args = parser.parse_args()
    settings = dict(max_pixels=(args.P - QUESTION) * CELL**2, eval_examples=0, **LEARNING)
    counts, rows = count_step(args.shape, Config(**settings), args.fused), []
    for phase, c in [*counts.items(), ("step", sum(counts.values(), Counter()))]:
        sizes = f"{c['launches']:,.0f}", f"{c['bytes'] / 1e9:,.0f}", f"{c['flops'] / 1e12:.1f}"
        rows.append([phase, *sizes, f"{c['waits']:.0f}"])
    print(markdown_table(["phase", "launches", "GB", "TFLOP", "waits"], rows))
    for card in CARDS:
        eager, graph = (seconds(counts, card, graph) for graph in (False, True))
        print(f"{card}: {eager:.2f} s predicted, {graph:.2f} s with --cuda_graph")


if __name__ == "__main__":
    main()
