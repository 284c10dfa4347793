"""`probe`: how well does the attention of each layer and head find the region, before training?"""

from pathlib import Path

import torch
from tqdm import tqdm

import reward
from analysis.evaluate import trace_attention
from analysis.plots import plot_heatmap
from config import InputError
from data import encode_example, example_region


def run_probe(vlm, examples, cfg):
    """Probe the first `--eval_examples` examples, print the table, and draw it as probe.png.

    Args: examples, the training set: the held-out questions stay unused until the evaluation.
    Returns: the exit code. Raises: InputError if probe.png cannot be written.
    """
    count = min(len(examples), cfg.eval_examples or 64)
    auroc, permuted, gap = probe(vlm, [examples[i] for i in range(count)], cfg)
    print_table(auroc, f"AUROC of {count} questions, {cfg.alignment} rows")
    print_recommendation(auroc, permuted, gap, cfg.alignment)
    folder = Path(cfg.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plot_heatmap(auroc.tolist(), folder / "probe.png")
    except OSError as error:
        message = f"cannot write probe.png to --output_dir {folder}: {error.strerror}"
        raise InputError(message) from None
    print(f"the table as a picture: {folder / 'probe.png'}")
    return 0


def probe(vlm, examples, cfg):
    """Measure how well every layer and head finds the region, in greedy answers.

    Returns: auroc, permuted, gap, each (L + 1, H + 1): a row per layer and a column per head, the
    last of each for the mean map of all of them. `permuted`: the same maps and the next example's
    region. `gap`: the mean AUROC of right answers minus that of wrong ones. A head that looks at
    the same place whether the answer is right or wrong gives the reward nothing to teach.
    """
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
    tables, correct = torch.tensor(tables), torch.tensor(correct)  # (examples, 2, L + 1, H + 1)
    auroc, permuted = tables.nanmean(0)
    gap = tables[correct, 0].nanmean(0) - tables[~correct, 0].nanmean(0)
    return auroc, permuted, gap


def layer_head_attention(vlm, prompt, completion, cfg):
    """The aligned attention (L + 1, H + 1, C, N) of one answer, with the means over all layers and
    over all heads appended."""
    maps, prompt_maps = vlm.attention_maps(prompt, completion)  # (L, H, 1, C, N), (L, H, N)
    attention = reward.align_attention(maps[:, :, 0], prompt_maps, cfg.alignment).cpu()
    for dim in (0, 1):
        attention = torch.cat([attention, attention.mean(dim, keepdim=True)], dim)
    return attention


def auroc_table(maps, region):
    """The AUROC of maps (L + 1, H + 1, N), as nested lists."""
    return [[reward.localization(map, region)["auroc"] for map in layer] for layer in maps]


def best_layer_and_heads(auroc):
    """The layer in which the mean over all heads finds the region best, and its best three heads,
    sorted (fewer if the model has fewer).

    Args: auroc (L + 1, H + 1), see `probe`.
    """
    layer = auroc[:-1, -1].argmax().item()
    heads = auroc[layer, :-1]
    return layer, sorted(heads.topk(min(3, len(heads))).indices.tolist())


def most_discriminative_head(gap):
    """The (layer, head) with the largest gap between right and wrong answers; None if all answers
    are right, or all wrong.

    Args: gap (L + 1, H + 1), see `probe`.
    """
    heads = gap[:-1, :-1]
    return None if heads.isnan().any() else divmod(heads.argmax().item(), heads.shape[1])


def print_table(auroc, title):
    print(f"{title}; columns: head 0 to {auroc.shape[1] - 2}, all")
    for i, row in enumerate(auroc.tolist()):
        name = "all" if i == len(auroc) - 1 else f"layer {i}"
        print(f"{name:>8} " + " ".join(f"{value:.2f}" for value in row))


def print_recommendation(auroc, permuted, gap, alignment):
    """Print the best layer and heads, and the flags that select them."""
    layer, heads = best_layer_and_heads(auroc)
    other, overall = permuted[layer, -1], permuted.nanmean()
    print(f"with the next example's box: {other:.2f} in layer {layer}, {overall:.2f} overall")
    print("chance: 0.50")
    flags = f"--alignment {alignment} --layers {layer} --heads {','.join(map(str, heads))}"
    print(f"best layer {layer} ({auroc[layer, -1]:.2f}), best heads in it {heads}: {flags}")
    if discriminative := most_discriminative_head(gap):
        layer, head = discriminative
        flags = f"--alignment {alignment} --layers {layer} --heads {head}"
        print(f"most discriminative head (AUROC right - wrong: {gap[layer, head]:+.2f}): {flags}")
