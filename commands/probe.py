"""`probe`: how well does the attention of each layer and head find the region before training?"""

from pathlib import Path
from statistics import NormalDist

import torch
from tqdm import tqdm

import reward
from analysis.evaluate import attention_maps, trace_attention
from analysis.plots import plot_heatmap
from config import InputError
from data import encode_example, example_region
from runtime.parser import build_config, run_config
from runtime.run_folder import check_folder
from sources import load_datasets

FOLDER = "runs/probe"  # not the folder of the default run
RECOMMENDED = 3  # heads, at most
MIN_QUESTIONS = 10  # minimum for an interval


def run_probe(given, load_model):
    """Probe the first `--eval_examples` training examples, print a table and draw it as probe.png.
    Held-out examples are not used, to keep them for the evaluation.

    Args: given, a dict of flags; load_model, a function from Config to Vlm. Returns: the exit code.
    Raises: InputError.
    """
    resume = given.get("resume")
    cfg = run_config(given) if resume else build_config({"output_dir": FOLDER} | given)
    folder = Path(cfg.output_dir)
    check_folder(folder)
    examples = load_datasets(cfg)[0]
    count = min(len(examples), cfg.eval_examples or 64)
    examples = [examples[i] for i in range(count)]
    tables, correct = measure_heads(load_model(cfg), examples, cfg)
    auroc, permuted = tables.nanmean(0)
    print_table(auroc, f"AUROC of {count} questions, --alignment {cfg.alignment}")
    print(f"chance: 0.50; control with the next example's box: {permuted.nanmean():.2f}")
    print_recommendation(tables, correct, cfg.alignment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_heatmap(auroc.tolist(), folder / "probe.png")
    except OSError as error:
        message = f"cannot write probe.png to --output_dir {folder}: {error.strerror}"
        raise InputError(message) from None
    print(f"heat map: {folder / 'probe.png'}")
    return 0


def probe(vlm, examples, cfg):
    """Measure how well every layer and head finds the region in greedy answers.

    Returns: auroc, permuted, gap, each (L + 1, H + 1): a row per layer and a column per head. The
    last row and column are for the mean map over all. `permuted` scores the same maps with the next
    example's region. `gap` is the mean AUROC of right answers minus that of wrong ones. A head that
    looks at the same place in both cases carries no signal for the reward.
    """
    tables, correct = measure_heads(vlm, examples, cfg)
    auroc, permuted = tables.nanmean(0)
    gap = tables[correct, 0].nanmean(0) - tables[~correct, 0].nanmean(0)
    return auroc, permuted, gap


def measure_heads(vlm, examples, cfg):
    """The AUROCs that `probe` averages. Returns: (AUROCs (examples, 2, L + 1, H + 1), with each
    example's own region and with the next one's; bool (examples,), true for right answers)."""
    tables, correct = [], []
    for i in tqdm(range(len(examples)), desc="probe"):
        example, next_example = examples[i], examples[(i + 1) % len(examples)]
        prompt = encode_example(vlm, example, cfg)
        trace = trace_attention(vlm, prompt, cfg)
        attention = layer_head_attention(vlm, prompt, trace.completion, cfg)
        maps = attention[:, :, trace.selected].mean(2)  # (L + 1, H + 1, N)
        regions = [example_region(each, prompt.grid) for each in (example, next_example)]
        tables.append([auroc_table(maps, region) for region in regions])
        answer = trace.completion.texts[0]
        correct.append(reward.accuracy_reward(answer, example.answer) == 1)
    return torch.tensor(tables), torch.tensor(correct)


def layer_head_attention(vlm, prompt, completion, cfg):
    """The aligned attention of one answer, (L + 1, H + 1, C, N). The last layer and head are the
    means over all layers and heads."""
    maps, prompt_maps = attention_maps(vlm, prompt, completion)  # (L, H, 1, C, N), (L, H, N)
    attention = reward.align_attention(maps[:, :, 0], prompt_maps, cfg.alignment).cpu()
    for dim in (0, 1):
        attention = torch.cat([attention, attention.mean(dim, keepdim=True)], dim)
    return attention


def auroc_table(maps, region):
    """The AUROC of maps (L + 1, H + 1, N), as nested lists."""
    return [[reward.localization(map, region)["auroc"] for map in layer] for layer in maps]


def best_layer_and_heads(auroc):
    """The layer whose mean over all heads finds the region best, and its best heads, at most three,
    sorted by index.

    Args: auroc (L + 1, H + 1), see `probe`.
    """
    layer = auroc[:-1, -1].argmax().item()
    heads = auroc[layer, :-1]
    return layer, sorted(heads.topk(min(3, len(heads))).indices.tolist())


def most_discriminative_head(gap):
    """The (layer, head) with the largest gap between right and wrong answers, or None if there are
    no right or no wrong answers.

    Args: gap (L + 1, H + 1), see `probe`.
    """
    heads = gap[:-1, :-1]
    return None if heads.isnan().any() else divmod(heads.argmax().item(), heads.shape[1])


def print_table(auroc, title):
    print(f"{title}; columns: head 0 to {auroc.shape[1] - 2}, all")
    for i, row in enumerate(auroc.tolist()):
        name = "all" if i == len(auroc) - 1 else f"layer {i}"
        print(f"{name:>8} " + " ".join(f"{value:.2f}" for value in row))


def mean_and_error(values):
    """The mean and its standard error over the first dimension, ignoring NaNs."""
    count, mean = values.isfinite().sum(0), values.nanmean(0)
    variance = (values - mean).square().nansum(0) / (count - 1)
    return mean, (variance / count).sqrt()


def heads_above_chance(tables):
    """The single heads whose AUROC is significantly above 0.5 and above the control.

    The control is the AUROC with the next example's box. The best of many heads exceeds 0.5 by
    chance, so the 95 % intervals are simultaneous for all heads (Bonferroni).

    Args: tables, see `measure_heads`.
    Returns: a list of (layer, head, AUROC, low, high, AUROC with the next box), best first.
    """
    mean, error = mean_and_error(tables[:, 0, :-1, :-1])  # (L, H)
    permuted = tables[:, 1, :-1, :-1].nanmean(0)
    half = simultaneous_z(mean.numel()) * error
    table = torch.stack([mean, mean - half, mean + half, permuted], -1).tolist()
    found = [
        (layer, head, *row)
        for layer, heads in enumerate(table)
        for head, row in enumerate(heads)
        if row[1] > max(0.5, row[3])
    ]
    return sorted(found, key=lambda row: -row[2])


def head_of_right_answers(tables, correct):
    """The (layer, head, gap, half width of its interval) with the largest AUROC gap between right
    and wrong answers. None if its interval, as in `heads_above_chance`, includes 0, or if there are
    fewer than MIN_QUESTIONS right or wrong answers."""
    right, wrong = (tables[chosen, 0, :-1, :-1] for chosen in (correct, ~correct))
    if min(len(right), len(wrong)) < MIN_QUESTIONS:
        return None
    (mean, error), (other, other_error) = mean_and_error(right), mean_and_error(wrong)
    gap = (mean - other).nan_to_num(-1)
    half = simultaneous_z(gap.numel()) * (error**2 + other_error**2).sqrt()
    layer, head = divmod(gap.argmax().item(), gap.shape[1])
    values = gap[layer, head].item(), half[layer, head].item()
    return (layer, head, *values) if values[0] > values[1] else None


def simultaneous_z(count):
    return NormalDist().inv_cdf(1 - 0.025 / count)


def print_recommendation(tables, correct, alignment):
    """Print the best single heads with their intervals, and the flags that select them."""
    more = "use more questions (--eval_examples)"
    if len(tables) < MIN_QUESTIONS:
        return print(f"no recommendation from fewer than {MIN_QUESTIONS} questions: {more}")
    found = heads_above_chance(tables)
    if not found:
        return print(f"no head is above chance and above the control: {more}")
    count = tables[0, 0, :-1, :-1].numel()
    print(f"best single heads, with simultaneous 95 % intervals for all {count} heads:")
    for layer, head, mean, low, high, permuted in found[:RECOMMENDED]:
        interval = f"{mean:.3f} [{max(0.0, low):.3f}, {min(1.0, high):.3f}], control {permuted:.3f}"
        print(f"  {interval}: --alignment {alignment} --layers {layer} --heads {head}")
    if chosen := head_of_right_answers(tables, correct):
        layer, head, gap, half = chosen
        flags = f"--alignment {alignment} --layers {layer} --heads {head}"
        print(f"AUROC gap, right minus wrong answers: {gap:+.3f} +- {half:.3f}: {flags}")
