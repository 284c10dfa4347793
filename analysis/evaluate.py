"""Evaluation: greedy answers to held-out questions, and where the model looks while it answers."""

import math
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from tqdm import tqdm

import reward
from analysis import page_maps
from analysis.html_report import LEVELS, is_packed, pack_map, small_grid
from attention import Capture
from config import InputError
from data import encode_example, example_region
from model import Completions
from sources.packing import split_by_tokens

EXAMPLES_IN_PICTURE = 4  # held-out examples whose maps go into look.png
EXAMPLES_IN_REPORT = 8  # held-out examples whose maps go into report.html
EXAMPLES_WITH_HEADS = 4  # held-out examples whose maps of every head go into report.html
MAX_MAP_CHARACTERS = 70_000  # per answer in look.gif
LOOKS = "early", "late", "permuted_early", "permuted_late"  # see `reward.early_and_late`


@dataclass
class AttentionTrace:
    """An answer and the attention of each token to the image. Tensors are on the CPU."""

    completion: Completions  # one answer, on the model's device
    attention: torch.Tensor  # (C, N), aligned, mean over the Vlm's layers and heads
    entropy: torch.Tensor  # (C,) nats
    selected: torch.Tensor  # (C,) bool, the tokens that the attention reward uses

    @property
    def map(self):
        """The mean attention of the selected tokens, (N,)."""
        return self.attention[self.selected].mean(0)


def trace_attention(vlm, prompt, cfg, completion=None):
    """Record where the model looks while it writes an answer. Args: completion, Completions of one
    answer, by default the greedy one. Returns: AttentionTrace. Raises: InputError."""
    completion = completion or vlm.sample(prompt, 1, cfg.max_completion_length, temperature=0)
    return trace_answers(vlm, [prompt], cfg, [completion])[0]


@torch.no_grad()
def trace_answers(vlm, prompts, cfg, completions, selected=None):
    """Record where the model looks while it writes some answers, in one forward pass.

    Args: completions, Completions of one answer per prompt; selected, a list of (C,) bool, by
    default the tokens that `reward.select_tokens` selects.
    Returns: a list of AttentionTrace. Raises: InputError if the model's output is not finite.
    """
    traces = []
    for i, scores in enumerate(vlm.score_groups(prompts, completions)):
        if not (scores.logps.isfinite().all() and scores.attention.isfinite().all()):
            advice = "try --no-load_in_4bit, a different --adapter, or --device cpu (fp32)"
            raise InputError(f"the model's output is not finite (NaN or infinity): {advice}")
        mask, rows = completions[i].mask, (scores.attention, scores.prompt_attention)
        chosen = selected[i] if selected else None
        if chosen is None:
            chosen = reward.select_tokens(scores.entropy, mask, cfg.token_fraction)[0]
        attention = reward.align_attention(*rows, cfg.alignment)[0]  # (C, N)
        tensors = attention.cpu(), scores.entropy[0].cpu(), chosen.cpu()
        traces.append(AttentionTrace(completions[i], *tensors))
    return traces


def evaluate(vlm, examples, cfg, name, before=None):
    """Answer held-out questions greedily and measure where the model looks.

    Args: examples, a data set; name, for the progress bar; before, the results of an earlier
    evaluation of the same examples, or None.
    Returns: a list of dicts for JSON, one per example, with the keys
    - id, question, answer, of the example
    - text, ids and selected of the answer; correct (0 or 1); length in tokens
    - area, the region's fraction of the image, and the scores of `reward.localization` for the
      mean map of the selected tokens: auroc, mass_over_area, pointing, tas, image_mass
    - early and late (0 or 1), whether the first and the last look find the region, see
      `reward.early_and_late`; permuted_early and permuted_late, with the *next* example's region
    - permuted_auroc: the same map scored with the *next* example's region. A map that fits any
      region as well as its own reflects a positional habit, not a search
    - fixed_auroc, fixed_mass_over_area, ...: the same scores on fixed text. The model is fed the
      answers of `before` and measured at the tokens selected then. The wording is the same before
      and after, so only changes in attention count. Without `before` they equal the scores above
    - to_region, to_image: the attention of each token, (C,)
    - grid, small_map, map, page: data for look.png and report.html; small_map is the mean map of
      the selected tokens, see `page_maps`. map and page are None except for the first few examples
    - by_word: data for look.gif, see `word_maps`
    """
    results, limit = [], cfg.max_completion_length
    pairs = ((x, encode_example(vlm, x, cfg)) for x in (examples[i] for i in range(len(examples))))
    with tqdm(total=len(examples), desc=f"evaluate {name}") as bar:
        for batch in split_by_tokens(pairs, lambda pair: len(pair[1].input_ids) + limit):
            prompts = [prompt for _, prompt in batch]
            answers = vlm.sample_groups(prompts, 1, limit, temperature=0)
            traces = fixed = trace_answers(vlm, prompts, cfg, answers)
            if before:
                fixed = trace_fixed_text(vlm, prompts, cfg, before[len(results) :])
            after_batch = examples[(len(results) + len(batch)) % len(examples)]
            following = [example for example, _ in batch[1:]] + [after_batch]
            for (example, prompt), next_example, *pair in zip(batch, following, traces, fixed):
                regions = [example_region(x, prompt.grid) for x in (example, next_example)]
                results.append(answer_row(vlm, example, prompt, regions, *pair, cfg, len(results)))
                bar.update()
    return results


def answer_row(vlm, example, prompt, regions, trace, fixed, cfg, index):
    """The results of one answer, a dict; see `evaluate`. Args: regions, its own and the next one's;
    fixed, the trace of the fixed text; index, of the example."""
    return (
        answer_fields(example, trace)
        | localization_fields(trace.map, fixed.map, *regions)
        | look_fields(trace, *regions)
        | position_fields(trace, regions[0])
        | map_fields(vlm, prompt, regions[0], trace, cfg, index)
    )


@torch.no_grad()
def attention_maps(vlm, prompt, completions):
    """The attention to the image of every layer and head.

    Returns: (L, H, G, C, N), and (L, H, N) of the prompt's last token. Keep G small.
    """
    text = vlm.core.config.text_config
    layers, heads = range(text.num_hidden_layers), range(text.num_attention_heads)
    capture = Capture(layers, heads, average_heads=False)
    vlm._packed_forward([prompt], [completions.ids], capture)
    maps = torch.stack([capture.maps[layer][0] for layer in layers])  # (L, H, 1 + G*C, N)
    return maps[:, :, 1:].unflatten(2, completions.ids.shape), maps[:, :, 0]


def are_results(content, count):
    """Whether decoded JSON looks like `count` results of `evaluate`; the file may be damaged."""
    per_token = "ids", "selected", "to_region", "to_image"
    scores = "auroc", "mass_over_area", "pointing", "tas", "image_mass"
    scores += "correct", "length", "area", "permuted_auroc", *(f"fixed_{name}" for name in scores)
    numbers = int, float

    def is_by_word(by_word, length):
        rows, cols = by_word["grid"]
        return (
            len(by_word["words"]) == len(by_word["maps"]) == length
            and all(isinstance(word, str) for word in by_word["words"])
            and min(rows, cols) > 0
            and all(0 <= largest <= 1 for largest, _ in by_word["maps"])
            and all(len(levels) == rows * cols for _, levels in by_word["maps"])
            and all(set(levels) <= set(LEVELS) for _, levels in by_word["maps"])
        )

    def is_result(row):
        cells = row["grid"][0] * row["grid"][1]
        attention, page = row["map"] or [0] * cells, row["page"] or {}
        words = row["text"], row.get("question", ""), row.get("answer", "")
        looks = [name in row for name in LOOKS]  # earlier versions have none, nor small_map
        return (
            all(isinstance(text, str) for text in words)
            and all(looks) == any(looks)
            and all(row[name] in (0, 1) for name in ("correct", *LOOKS) if name in row)
            and ("small_map" not in row or is_packed(row["small_map"], small_grid(row["grid"])))
            and all(type(row[name]) in numbers and abs(row[name]) != inf for name in scores)
            and all(len(row[name]) == row["length"] for name in per_token)
            and all(type(v) in (*numbers, bool) for name in per_token for v in row[name])
            and len(attention) == cells
            and all(type(v) in numbers for v in attention)
            and isinstance(page, dict)
            # Results of earlier versions lack it.
            and ("by_word" not in row or is_by_word(row["by_word"], row["length"]))
        )

    try:
        return len(content) == count and all(map(is_result, content))
    except (TypeError, ValueError, LookupError, AttributeError):
        return False


def trace_fixed_text(vlm, prompts, cfg, results):
    """The AttentionTraces of answers in earlier results, at the tokens selected then."""
    completions, selected = [], []
    for result in results[: len(prompts)]:
        ids = torch.tensor(result["ids"], device=vlm.device)[None]
        completions.append(Completions(ids, torch.ones_like(ids).bool()))
        selected.append(torch.tensor(result["selected"], device=vlm.device))
    return trace_answers(vlm, prompts, cfg, completions, selected)


def answer_fields(example, trace):
    text = trace.completion.texts[0]
    return {
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "text": text,
        "ids": trace.completion.ids[0].tolist(),
        "selected": trace.selected.tolist(),
        "correct": reward.accuracy_reward(text, example.answer),
        "length": len(trace.entropy),
    }


def localization_fields(attention, fixed_attention, region, next_region):
    """Args: the maps of the model's own answer and of the fixed text, (N,); two regions (N,)."""
    scores = reward.localization(attention, region)
    fixed_scores = reward.localization(fixed_attention, region)
    return {
        "area": region.float().mean().item(),
        **scores,
        "permuted_auroc": reward.localization(attention, next_region)["auroc"],
        **{f"fixed_{name}": score for name, score in fixed_scores.items()},
    }


def look_fields(trace, region, next_region):
    own, other = (
        reward.early_and_late(trace.attention, box, trace.selected) for box in (region, next_region)
    )
    return dict(zip(LOOKS, map(float, own + other)))


def position_fields(trace, region):
    return {
        "to_region": round_values(trace.attention[:, region].sum(1)),  # (C,)
        "to_image": round_values(trace.attention.sum(1)),  # (C,)
    }


def map_fields(vlm, prompt, region, trace, cfg, index):
    heads = index < EXAMPLES_WITH_HEADS
    shown = index < EXAMPLES_IN_REPORT
    return {
        "grid": prompt.grid,
        "map": trace.map.tolist() if index < EXAMPLES_IN_PICTURE else None,
        "small_map": page_maps.small_map(trace.map, prompt.grid),
        "page": report_maps(vlm, prompt, region, trace, cfg, heads) if shown else None,
        "by_word": word_maps(vlm, prompt, trace),
    }


def report_maps(vlm, prompt, region, trace, cfg, heads=True):
    """Data of one answer for report.html, a dict for JSON: its tokens, and their maps in the layers
    and heads of the reward, in some layers, and, with `heads`, in every head. See `page_maps`."""
    maps, prompt_maps = attention_maps(vlm, prompt, trace.completion)  # (L, H, 1, C, N), (L, H, N)
    rows = maps[:, :, 0].cpu(), prompt_maps.cpu()
    attention = reward.align_attention(*rows, cfg.alignment)  # (L, H, C, N)
    fields = {
        "words": decode_tokens(vlm, trace.completion),
        "entropy": round_values(trace.entropy),
        "rewarded": page_maps.reward_fields(trace.attention, prompt.grid),
        **page_maps.layer_fields(attention.mean(1), prompt.grid),
    }
    if heads:
        chosen = trace.selected, region, prompt.grid
        fields["heads"] = page_maps.head_fields(attention, *chosen)
    return fields


def word_maps(vlm, prompt, trace):
    """Data of one answer for look.gif: what each token adds to the text, and its map.

    The map is the one that the reward uses: aligned, mean over the Vlm's layers and heads. Maps of
    long answers are pooled, so that an answer has at most MAX_MAP_CHARACTERS cells.
    Returns: a dict for JSON: `words` (C strings), `grid`, `maps` (C of `pack_map`).
    """
    side = max(1, math.isqrt(MAX_MAP_CHARACTERS // len(trace.entropy)))
    grid = tuple(min(side, cells) for cells in prompt.grid)
    maps = trace.attention.unflatten(-1, prompt.grid)  # (C, rows, cols)
    maps = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(1)
    words = written_words(vlm, trace.completion)
    return {"words": words, "grid": grid, "maps": [pack_map(row) for row in maps.tolist()]}


def written_words(vlm, completion):
    """What each token adds to the text of an answer, a list of C strings. Joined, they are the
    text. A token without text, such as the end of turn, adds an empty string."""
    ids, text = completion.ids[0].tolist(), completion.texts[0]
    decode = vlm.tokenizer.decode
    ends = [len(decode(ids[:i], skip_special_tokens=True)) for i in range(len(ids) + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


def decode_tokens(vlm, completion):
    """The tokens of an answer as a list of strings."""
    return [vlm.tokenizer.decode([token]) for token in completion.ids[0].tolist()]


def round_values(values):
    return [round(value, 4) for value in values.tolist()]
