"""The arms of `ablation.py`: their rewards as flags of sayo_mini.py, and the placebos.

A placebo replaces one function of the reward during its run; see docs/evidence.md.
"""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch

import reward
import sayo_mini
from bench.doc_tables import ROOT
from commands.probe import best_layer_and_heads, most_discriminative_head, probe
from sources.scenes import Scenes

# The paper's values of the settings that the preset of the tiny model changes.
PAPER = {"alignment": "query", "layers": "-1", "heads": "all"}
COMMON_FLAGS = ["--model_name_or_path", str(ROOT / "tiny"), "--device", "cpu"]
COMMON_FLAGS += ["--eval_examples", "0"]
COMMON_FLAGS += [part for name, value in PAPER.items() for part in (f"--{name}", value)]


def weight_flags(attention, format, accuracy):
    return ["--reward_weights", f"attention={attention},format={format},accuracy={accuracy}"]


SAYO = "attention + format (SAYO)"
BOTH = "attention + accuracy + format"
ACCURACY = "accuracy + format"
FORMAT = "format only"
ROLLED_BOX = "placebo A: rolled box"
SHUFFLED_SCORES = "placebo B: scores shuffled within the group"
LENGTH = "length only"
LOWEST_ENTROPY = "lowest-entropy 30 % of tokens"
ARMS = {  # name -> flags
    FORMAT: weight_flags(0, 1, 0),
    ACCURACY: weight_flags(0, 1, 1),
    SAYO: weight_flags(1, 1, 0),
    BOTH: weight_flags(1, 1, 1),
    ROLLED_BOX: weight_flags(1, 1, 0),
    SHUFFLED_SCORES: weight_flags(1, 1, 0),
    LENGTH: weight_flags(0, 1, 0),
}
TABLE_ORDER = [SAYO, BOTH, ACCURACY, FORMAT, ROLLED_BOX, SHUFFLED_SCORES, LENGTH]


def roll_box():
    """Placebo A: move the region by half the image in both directions, wrapping around at the
    edges. Its area is the same, but its place is wrong."""
    true_region = sayo_mini.example_region

    def rolled_region(example, grid):
        shift = grid[0] // 2, grid[1] // 2
        return true_region(example, grid).view(grid).roll(shift, (0, 1)).flatten()

    return patch.object(sayo_mini, "example_region", rolled_region)


def shuffle_scores(seed):
    """Placebo B: shuffle the true attention rewards among the completions of a group. Their mean
    and standard deviation are kept but carry no information."""
    true_reward, generator = reward.attention_reward, torch.Generator().manual_seed(seed)

    def shuffled_reward(*args):
        scores = true_reward(*args)
        return scores[torch.randperm(len(scores), generator=generator)]

    return patch.object(reward, "attention_reward", shuffled_reward)


def reward_length():
    """Replace the format reward by one for length alone, tokens / 18."""

    def length_reward(text, n_tokens, shortest, longest):
        return n_tokens / longest

    return patch.object(reward, "format_reward", length_reward)


def select_lowest_entropy():
    """Select the most certain tokens instead of the least certain ones."""
    select = reward.select_tokens

    def select_lowest(entropy, mask, fraction):
        return select(-entropy, mask, fraction)

    return patch.object(reward, "select_tokens", select_lowest)


def patch_for(arm, seed):
    """Returns: the context manager in which an arm trains."""
    if arm == SHUFFLED_SCORES:
        return shuffle_scores(seed)
    patches = {
        ROLLED_BOX: roll_box,
        LENGTH: reward_length,
        LOWEST_ENTROPY: select_lowest_entropy,
    }
    return patches.get(arm, nullcontext)()


def probe_untrained_model(vlm, cfg, count):
    """Probe the untrained model on validation scenes, with both alignments.
    Returns: {alignment: {"auroc": (L + 1, H + 1), "gap": the same}}, nested lists."""
    scenes, results = Scenes("validation", count), {}
    for alignment in ("query", "predict"):
        auroc, _, gap = probe(vlm, scenes, replace(cfg, alignment=alignment))
        results[alignment] = {"auroc": auroc.tolist(), "gap": gap.tolist()}
    return results


def discriminative_head(probe_results):
    """The head, over both alignments, whose AUROC differs most between right and wrong answers.
    Returns: {"alignment": name, "layers": index, "heads": index}."""
    gaps = {name: torch.tensor(tables["gap"]) for name, tables in probe_results.items()}
    alignment = max(gaps, key=lambda name: gaps[name][:-1, :-1].max())
    layer, head = most_discriminative_head(gaps[alignment])
    return {"alignment": alignment, "layers": layer, "heads": head}


def variant_arms(probe_results):
    """Variants of attention + format, some with heads found by the probe. The best layer in the
    probe was the last one, which the arm already uses. Returns: {name: flags}."""
    layer, heads = best_layer_and_heads(torch.tensor(probe_results["query"]["auroc"]))
    heads, single = ",".join(map(str, heads)), discriminative_head(probe_results)
    single_flags = [part for name, value in single.items() for part in (f"--{name}", str(value))]
    best_flags = ["--layers", str(layer), "--heads", heads]
    single_name = f"layer {single['layers']}, head {single['heads']}, {single['alignment']}"
    flags = {
        "all tokens": ["--token_fraction", "1"],
        LOWEST_ENTROPY: [],
        "predict alignment": ["--alignment", "predict"],
        "all layers": ["--layers", "all"],
        f"best three heads (layer {layer}, heads {heads})": best_flags,
        f"most discriminative head ({single_name})": single_flags,
    }
    return {name: weight_flags(1, 1, 0) + more for name, more in flags.items()}
