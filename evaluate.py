"""Evaluation: greedy answers to held-out questions, where the model looks while it answers, and the
verdict and the table that compare the results before and after training."""

import math
import zlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch
from tqdm import tqdm

import reward
from config import InputError, parse_weights
from data import encode_example, example_region, image_keys, next_image
from model import Completions, split_by_tokens

MAX_CELLS = 70_000  # per answer: the maps of long answers are pooled to fewer cells
Z = 1.96  # standard errors from the mean to the end of a normal 95 % interval
FEWEST = 6  # images for an interval or a conclusion, see `opening_lines`
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"  # see `pack_map`


@dataclass
class AttentionTrace:
    """An answer and the attention of each token to the image."""

    completion: Completions  # one answer
    attention: torch.Tensor  # (C, N), aligned, mean over the Vlm's layers and heads
    entropy: torch.Tensor  # (C,) nats
    selected: torch.Tensor  # (C,) bool, the tokens that the attention reward uses

    @property
    def map(self):
        """The mean attention of the selected tokens, (N,)."""
        return self.attention[self.selected].mean(0)


def evaluate(vlm, examples, cfg, name, before=None):
    """Answer held-out questions greedily and measure where the model looks.

    Args: examples, a data set; name, for the progress bar; before, the results of an earlier
    evaluation of the same examples, or None.
    Returns: a list of dicts for JSON, one per example:
    - id, question and answer of the example, and image, a checksum of its pixels; text, ids,
      selected tokens and length of the greedy answer; correct (0 or 1)
    - area, the region's fraction of the image, and `reward.localization` of the mean map of the
      selected tokens; permuted_auroc scores the same map with the region of the *next* example, of
      another image: a model that always looks at the same place scores equally on both
    - early, late (0 or 1), see `reward.early_and_late`, of the tokens before <answer>;
      permuted_..., with the next region
    - fixed_..., the same scores on fixed text: the model is fed the answers of `before`, so only
      changes in attention count. Without `before` they equal the scores above
    - per token (C,): to_region and to_image, sums of attention; words, what it adds to the text;
      maps, its attention map as `pack_map` stores it, on grid = (rows, cols); look_maps, two such
      maps of the whole answer, see `reward.look_maps`
    """
    results, answered = [], answer_all(vlm, examples, cfg)
    with tqdm(total=len(examples), desc=f"evaluate {name}") as bar:
        for batch in split_by_tokens(answered, lambda x: len(x[1].input_ids) + x[2].ids.shape[1]):
            _, prompts, answers = zip(*batch)
            traces = fixed = trace_answers(vlm, prompts, cfg, answers)
            if before:
                earlier = before[len(results) : len(results) + len(batch)]
                fixed = trace_fixed_text(vlm, prompts, cfg, earlier)
            for (example, prompt, _), *parts in zip(batch, traces, fixed):
                following = examples[next_image(examples, len(results))]
                results.append(result_row(vlm, example, prompt, *parts, following))
                bar.update()
    return results


def answer_all(vlm, examples, cfg):
    """Answer greedily, as many questions at once as training samples completions. Yields: Example,
    Prompt and Completions of one answer."""
    at_once = cfg.prompts_per_step * cfg.num_generations
    for start in range(0, len(examples), at_once):
        batch = [examples[i] for i in range(start, min(start + at_once, len(examples)))]
        prompts = [encode_example(vlm, example, cfg) for example in batch]
        answers = vlm.sample_groups(prompts, 1, cfg.max_completion_length, temperature=0)
        yield from zip(batch, prompts, answers)


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
        if selected:
            chosen = selected[i]
        else:
            chosen = reward.select_tokens(scores.entropy, mask, cfg.token_fraction)[0]
        attention = reward.align_attention(*rows, cfg.alignment)[0]  # (C, N)
        traces.append(AttentionTrace(completions[i], attention, scores.entropy[0], chosen))
    return traces


def trace_fixed_text(vlm, prompts, cfg, results):
    """The AttentionTraces of answers in earlier results, at the tokens selected then."""
    completions, selected = [], []
    for result in results:
        ids = torch.tensor(result["ids"])[None]
        completions.append(Completions(ids, torch.ones_like(ids).bool()))
        selected.append(torch.tensor(result["selected"]))
    return trace_answers(vlm, prompts, cfg, completions, selected)


def result_row(vlm, example, prompt, trace, fixed, next_example):
    """Args: fixed, the AttentionTrace of the fixed text. Returns: see `evaluate`."""
    region, next_region = (example_region(x, prompt.grid) for x in (example, next_example))
    attention, text = trace.attention, trace.completion.texts[0]  # (C, N)
    words = written_words(vlm, trace.completion)
    before_answer = tokens_before_answer(words)
    early, late = reward.early_and_late(attention, region, before_answer)
    permuted = reward.early_and_late(attention, next_region, before_answer)
    side = max(1, math.isqrt(MAX_CELLS // len(words)))
    grid = tuple(min(side, cells) for cells in prompt.grid)
    maps = torch.cat([attention, torch.stack(reward.look_maps(attention, before_answer))])
    maps = maps.unflatten(-1, prompt.grid)  # (C + 2, rows, cols)
    maps = torch.nn.functional.adaptive_avg_pool2d(maps, grid).flatten(1)
    *maps, first_look, last_look = [pack_map(row) for row in maps.tolist()]
    fixed_scores = reward.localization(fixed.map, region)
    return {
        "id": example.id,
        "question": example.question,
        "answer": example.answer,
        "image": zlib.crc32(example.image.tobytes()),
        "text": text,
        "ids": trace.completion.ids[0].tolist(),
        "selected": trace.selected.tolist(),
        "correct": reward.accuracy_reward(text, example.answer),
        "length": len(words),
        "to_region": [four_digits(x) for x in attention[:, region].sum(1).tolist()],
        "to_image": [four_digits(x) for x in attention.sum(1).tolist()],
        "words": words,
        "grid": grid,
        "maps": maps,
        "look_maps": [first_look, last_look],
        "area": region.float().mean().item(),
        **reward.localization(trace.map, region),
        "permuted_auroc": reward.localization(trace.map, next_region)["auroc"],
        **{f"fixed_{name}": score for name, score in fixed_scores.items()},
        "early": float(early),
        "late": float(late),
        "permuted_early": float(permuted[0]),
        "permuted_late": float(permuted[1]),
    }


def tokens_before_answer(words):
    """The tokens that end before <answer>, (C,) bool; all if there is no <answer>.
    Args: words, from `written_words`. A real model's <answer> is several tokens."""
    start = len("".join(words).partition("<answer>")[0])
    return torch.tensor([len(word) for word in words]).cumsum(0) <= start


def written_words(vlm, completion):
    """What each token adds to the text of an answer, a list of C strings. Joined, they are the
    text. A token without text, such as the end of turn, adds an empty string."""
    ids, text = completion.ids[0].tolist(), completion.texts[0]
    decode = vlm.tokenizer.decode
    ends = [len(decode(ids[:i], skip_special_tokens=True)) for i in range(len(ids) + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


def pack_map(attention):
    """Pack an attention map as [largest value, a string with one character of LEVELS per cell]: the
    square root of its fraction of the largest value, in 64 steps."""
    largest = max(max(attention), 1e-12)
    levels = (round(63 * (max(0.0, a) / largest) ** 0.5) for a in attention)
    return [four_digits(largest), "".join(LEVELS[level] for level in levels)]


def four_digits(value):
    """Rounded to four significant digits, because attention can be small."""
    return float(f"{value:.4g}")


def unpack_map(packed):
    """The attention of each cell, from `pack_map`."""
    largest, levels = packed
    return [largest * (LEVELS.index(level) / 63) ** 2 for level in levels]


# --- what changed ---


def verdict(before, after):
    """What training changed, in three lines: answers, first looks, attention. All compare the same
    questions. Args: before, after, lists of results of `evaluate`, in the same order."""
    images, pairs = [row["image"] for row in before], list(zip(before, after))
    right = [sum(row["correct"] for row in rows) for rows in (before, after)]
    changes = [new["correct"] - old["correct"] for old, new in pairs]
    looks = [
        f"{sum(not row['early'] for row in rows)} {name} ({count_corrected(rows)} corrected)"
        for name, rows in (("before", before), ("after", after))
    ]
    own, own_low = paired_change([new["auroc"] - old["auroc"] for old, new in pairs], images)
    fixed, fixed_low = paired_change(
        [new["fixed_auroc"] - old["auroc"] for old, new in pairs], images
    )
    if own_low is None:
        conclusion = f"no conclusion, because fewer than {FEWEST} images count"
    elif fixed_low is not None and fixed_low > 0:
        conclusion = "the model looks at the region more while it reads the same words"
    elif own_low <= 0:
        conclusion = "nothing shows that the model looks at the region more than before"
    else:
        conclusion = "the model learned to write differently; on the same words, no gain is shown"
    return (
        f"Answers: {right[0]:.0f} right before, {right[1]:.0f} right after, of {len(before)}; "
        f"{changes.count(1)} fixed, {changes.count(-1)} broken (exact sign test, "
        f"{sign_test(sum_by_image(changes, images))}).\n"
        f"First looks off the region (the box around what is asked about): {looks[0]}, "
        f"{looks[1]}.\n"
        f"Attention: {conclusion}. The probability that a cell in the region gets more attention "
        f"than a cell outside (AUROC) changed by {own} while the model writes its own answers, and "
        f"by {fixed} while it reads its answers from before training."
    )


def sum_by_image(values, images):
    """The sum of the values of every image. Questions about one image are not independent, so tests
    and intervals count images."""
    sums = dict.fromkeys(images, 0)
    for image, value in zip(images, values):
        sums[image] += value
    return list(sums.values())


def sign_test(changes):
    """The exact two-sided p-value, as text, of the hypothesis that changes up and down are equally
    likely. Zeros do not count. With one question per image this is McNemar's test."""
    up, down = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1))
    p = min(1.0, 2 * tail / 2 ** (up + down))
    return f"p = {p:.2g}" if p >= 1e-6 else "p < 1e-6"


def opening_lines(train_set, eval_set, cfg):
    """What a run trains on, the smallest change that its evaluation can call significant, and what
    can be done with the answers.

    If answers about six images change, all in one direction, the sign test has p = 2 / 2^6 = 0.03.
    With five images, p is 0.06. So with one question per image, no change of the accuracy below
    6 / questions is significant.
    """

    def size(dataset):
        images = plural(len(image_keys(dataset)), "image")
        return f"{plural(len(dataset), 'question')} about {images}"

    images, line = len(image_keys(eval_set)), "training: none"
    if cfg.max_steps:
        epochs = cfg.max_steps * cfg.prompts_per_step / len(train_set)
        line = f"training: {size(train_set)} in {plural(cfg.max_steps, 'step')} "
        line += f"(epochs: {epochs:.3g})"
    line += f"; held out: {size(eval_set)}"
    if images >= FEWEST and images == len(eval_set):
        smallest = FEWEST / len(eval_set)
        line += f": a change of accuracy below {smallest:.3f} cannot be significant"
    elif images >= FEWEST:  # several questions about an image can cancel out
        line += f": changed answers about fewer than {FEWEST} images cannot be significant"
    elif images:
        line += f": with fewer than {FEWEST} images, no change of accuracy can be significant"
    if cfg.region == "rolled":
        line += "\nplacebo: the attention reward uses the boxes rolled by half the image"
    weights = parse_weights(cfg.reward_weights)
    as_in_paper = weights.get("attention") and not weights.get("accuracy") and not cfg.reward
    if cfg.max_steps and as_in_paper and not cfg.keep_best:
        line += "\nright answers are logged but not rewarded, as in the paper; --reward_weights "
        line += "attention=1,format=1,accuracy=1 rewards them, --keep_best keeps the best adapter"
    return line


def paired_change(differences, images):
    """(the mean difference and its 95 % interval as text, e.g. "+0.22 [+0.19, +0.25]"; the lower
    end of the interval as printed). Below FEWEST images, only the mean, and None."""

    def signed(value):
        return f"{round(value, 2) + 0.0:+.2f}"  # never -0.00

    mean, half, count = estimate(differences, images)
    if count < FEWEST:
        return signed(mean) if count else "-", None
    low = round(mean - half, 2)
    return f"{signed(mean)} [{signed(low)}, {signed(mean + half)}]", low


def estimate(values, images):
    """The mean of the values that are not NaN, half the width of its 95 % interval (Student's t,
    clustered by image; 0 for one image), and the effective number of images: fewer than there are
    if some have more values than others (Kish)."""
    pairs = [(value, image) for value, image in zip(values, images) if not math.isnan(value)]
    if not pairs:
        return math.nan, 0.0, 0
    values, images = zip(*pairs)
    mean = fmean(values)
    sums = sum_by_image([value - mean for value in values], images)
    count = len(sums)
    variance = sum(s * s for s in sums) * count / max(1, count - 1)
    effective = len(values) ** 2 / sum(size * size for size in Counter(images).values())
    errors = student_t(max(1, effective - 1))
    return mean, errors * math.sqrt(variance) / len(values), effective


def student_t(v):
    """How many standard errors a 95 % interval extends to each side, for v degrees of freedom: the
    expansion of Student's t around the normal 1.96, within 1 % from v = 5."""
    return Z + (Z**3 + Z) / (4 * v) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * v**2)


def results_text(before, after):
    """The verdict and the table, as a run prints them."""
    return f"{verdict(before, after)}\n\n{results_table(before, after)}"


# --- the table ---


def results_table(before, after):
    """The results of `evaluate` before and after training as a text table: a line per metric with
    its mean, its 95 % confidence interval and its chance level."""
    rows = table_rows(before, after)
    header = f"held-out examples: {len(before)}", "before", "after", "chance"
    width = max(25, 2 + max(len(cell) for row in rows for cell in row[1:3]))
    lines = [f"{row[0]:32}{row[1]:>{width}}{row[2]:>{width}}{row[3]:>8}" for row in [header, *rows]]
    if any("-" in row for row in rows):
        lines.append("-: the AUROC is undefined if the region covers the whole image")
    return "\n".join(lines)


def table_rows(before, after):
    """The rows of the table, (title, before, after, chance), all text. Chance for looks: how often
    they find the next example's region, before training."""

    def mean(key):
        return f"{fmean(row[key] for row in before):.3f}"

    metrics = [  # title, key, chance
        ("greedy accuracy", "correct", ""),
        ("attention on the region, AUROC", "auroc", "0.500"),
        ("  with the next example's box", "permuted_auroc", "0.500"),
        ("  mass / area", "mass_over_area", "1.000"),
        ("  pointing game", "pointing", mean("area")),
        ("  TAS", "tas", "0.500"),
        ("the same on fixed text, AUROC", "fixed_auroc", "0.500"),
        ("  mass / area", "fixed_mass_over_area", "1.000"),
        ("first look on the region", "early", mean("permuted_early")),
        ("last look on the region", "late", mean("permuted_late")),
        ("attention to the whole image", "image_mass", ""),
        ("answer length, tokens", "length", ""),
    ]
    unbounded = "mass_over_area", "fixed_mass_over_area", "length"
    images, rows = [row["image"] for row in before], []
    for title, key, chance in metrics:
        proportion = key in ("correct", "early", "late")
        largest = math.inf if key in unbounded else 1.0
        cells = [
            confidence_interval([row[key] for row in results], images, proportion, largest)
            for results in (before, after)
        ]
        rows.append((title, *cells, chance))
    return rows


def plural(count, word):
    return f"{count} {word}{'s' * (count != 1)}"


def count_corrected(results):
    """How many answers have their first look off the region and their last look on it."""
    return sum(row["late"] > row["early"] for row in results)


def confidence_interval(values, images, proportion=False, largest=1.0):
    """The mean and its 95 % confidence interval as text, e.g. "0.523 [0.461, 0.584]".

    The interval is Student's, see `estimate`, if it lies inside [0, 1]. Else it is Wilson's,
    which stays inside and has a width even if all values are equal. It treats each image as one
    value of 0 or 1, the worst case. Metrics without an upper bound have Student's interval, clipped
    at 0.

    Args: values, floats from 0 to `largest`, which is 1 or infinity; images, of the values, which
    are the independent units; proportion, true if every value is 0 or 1, always uses Wilson's.
    Returns: text; only the mean below FEWEST images, "-" for no values.
    """
    mean, half, n = estimate(values, images)
    if n < FEWEST:
        return f"{mean:.3f}" if n else "-"
    low, high, z = mean - half, mean + half, Z
    if proportion or (largest == 1 and not 0 < low <= high < 1):
        p = min(max(mean, 0.0), 1.0)  # rounding can push a mean above 1
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        low, high = center - half, center + half
    return f"{mean:.3f} [{max(0.0, low):.3f}, {min(largest, high):.3f}]"
