"""`probe`: how well does the attention of each layer and head find the region before training?"""

from pathlib import Path
from statistics import NormalDist

import torch
from tqdm import tqdm

import reward
from attention import Capture
from checkpoint import check_folder
from config import build_config
from data import encode_example, example_region, load_datasets, next_image
from evaluate import trace_attention
from extras.pictures import plot_heatmap
from model import load_model

RECOMMENDED = 3  # heads, at most
MIN_QUESTIONS = 30  # minimum for an interval


def run_probe(given):
    """Probe the first training examples, by default 64; print a table and draw it as probe.png.
    Held-out examples are kept for the evaluation, except with --eval_examples 0.

    Args: given, a dict of flags. Returns: the exit code. Raises: InputError.
    """
    cfg = build_config(given)
    picture = Path(cfg.output_dir) / "probe.png"
    check_folder(picture.parent, started=True)
    train_set = load_datasets(cfg)[0]
    count = min(len(train_set), cfg.eval_examples if cfg.eval_examples > 0 else 64)
    examples = [train_set[i] for i in range(count)]
    others = [train_set[next_image(train_set, i)] for i in range(count)]
    tables = measure_heads(load_model(cfg), examples, others, cfg)
    auroc, permuted = tables.nanmean(0)
    columns = f"columns: head 0 to {auroc.shape[1] - 2}, all"
    print(f"AUROC of {len(examples)} questions, --alignment {cfg.alignment}; {columns}")
    for i, row in enumerate(auroc.tolist()):
        name = "all" if i == len(auroc) - 1 else f"layer {i}"
        print(f"{name:>8} " + " ".join(f"{value:.2f}" for value in row))
    print(f"chance: 0.50; control with the next example's box: {permuted.nanmean():.2f}")
    print_recommendation(tables, cfg.alignment)
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_heatmap(auroc.tolist(), picture)
    print(f"heat map: {picture}")
    return 0


def measure_heads(vlm, examples, others, cfg):
    """How well every layer and head finds the region in greedy answers.

    Args: others, an example about another image for each, as a control.
    Returns: AUROCs (examples, 2, L + 1, H + 1), with the example's own region and with the other's.
    A row per layer and a column per head; the last row and column are for the mean map over all.
    """
    tables = []
    for example, other in zip(tqdm(examples, desc="probe"), others):
        prompt = encode_example(vlm, example, cfg)
        trace = trace_attention(vlm, prompt, cfg)
        rows, prompt_row = attention_maps(vlm, prompt, trace.completion)
        maps = reward.align_attention(rows, prompt_row, cfg.alignment).cpu()  # (L, H, C, N)
        maps = maps[:, :, trace.selected].mean(2)  # (L, H, N)
        for dim in (0, 1):
            maps = torch.cat([maps, maps.mean(dim, keepdim=True)], dim)  # (L + 1, H + 1, N)
        regions = [example_region(each, prompt.grid) for each in (example, other)]
        tables.append([auroc_table(maps, region) for region in regions])
    return torch.tensor(tables)


def auroc_table(maps, region):
    """The AUROC of maps (L + 1, H + 1, N), as nested lists."""
    return [[reward.localization(map, region)["auroc"] for map in layer] for layer in maps]


@torch.no_grad()
def attention_maps(vlm, prompt, completion):
    """The attention of every layer and head to the image, for one answer of C tokens.

    Returns: (L, H, C, N), and (L, H, N) of the prompt's last token.
    """
    text = vlm.core.config.text_config
    layers, heads = range(text.num_hidden_layers), range(text.num_attention_heads)
    capture = Capture(layers, heads, average_heads=False)
    vlm._packed_forward([prompt], vlm._move(completion.ids), capture)
    maps = torch.stack([capture.maps[layer][0] for layer in layers])  # (L, H, 1 + C, N)
    return maps[:, :, 1:], maps[:, :, 0]


def heads_above_chance(tables):
    """The single heads whose AUROC is significantly above 0.5 and above the control.

    The best of many heads exceeds 0.5 by chance, so the 95 % intervals are simultaneous for all
    heads (Bonferroni). NaNs, for regions that cover the whole image, are ignored.

    Args: tables, see `measure_heads`.
    Returns: a list of (layer, head, AUROC, low, high, AUROC of the control), best first.
    """
    own, control = tables[:, 0, :-1, :-1], tables[:, 1, :-1, :-1].nanmean(0)
    count, mean = own.isfinite().sum(0), own.nanmean(0)  # (L, H)
    error = ((own - mean).square().nansum(0) / (count - 1) / count).sqrt()
    half = NormalDist().inv_cdf(1 - 0.025 / mean.numel()) * error
    found = []
    for layer, head in (mean - half > control.clamp(min=0.5)).nonzero().tolist():
        values = mean[layer, head].item(), half[layer, head].item()
        low, high = values[0] - values[1], values[0] + values[1]
        found.append((layer, head, values[0], low, high, control[layer, head].item()))
    return sorted(found, key=lambda row: -row[2])


def print_recommendation(tables, alignment):
    """Print the best single heads with their intervals, and the flags that select them."""
    more = "use more questions (--eval_examples; a data set keeps some held out)"
    if len(tables) < MIN_QUESTIONS:
        return print(f"no recommendation from fewer than {MIN_QUESTIONS} questions: {more}")
    found = heads_above_chance(tables)
    if not found:
        return print(f"no head is above chance and above the control: {more}")
    count = tables[0, 0, :-1, :-1].numel()
    print(f"best single heads, with simultaneous 95 % intervals for all {count} heads:")
    for layer, head, mean, low, high, control in found[:RECOMMENDED]:
        interval = f"{mean:.3f} [{max(0.0, low):.3f}, {min(1.0, high):.3f}], control {control:.3f}"
        print(f"  {interval}: --alignment {alignment} --layers {layer} --heads {head}")
