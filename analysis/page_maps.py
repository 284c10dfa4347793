"""The attention maps of one answer, small enough for report.html: pooled to a few cells per side,
in 64 levels, with limits on layers and heads. C tokens, N image tokens, L layers, H heads."""

from math import isqrt

import torch

from analysis.html_report import MAX_GRID_SIDE, pack_map, pack_maps

# Characters per answer, which keep report.html under 2 MB: for all answers, and for the few whose
# heads are shown.
REWARD_CHARACTERS, LAYER_CHARACTERS, HEAD_CHARACTERS = 16_000, 29_000, 30_000
MAX_LAYERS = 6
LAYER_SIDE, HEAD_SIDES = 8, (8, 4)  # cells per side, at most


def reward_fields(attention, grid):
    """The map of every token in the layers and heads that the reward uses.

    Args: attention (C, N). Returns: a dict for JSON, `maps` is [token] of `pack_map`.
    """
    side = fitting_side(MAX_GRID_SIDE, REWARD_CHARACTERS, len(attention))
    pooled, grid = pool(attention, grid, side)
    return {"grid": grid, "maps": [pack_map(row) for row in pooled.tolist()]}


def layer_fields(attention, grid):
    """The map of every token, averaged over all heads of a layer. Layers are evenly spaced and
    include the last; long answers get fewer layers.

    Args: attention (L, C, N). Returns: a dict for JSON, `maps` is [layer][token] of `pack_map`.
    """
    tokens = attention.shape[1]
    side = fitting_side(LAYER_SIDE, LAYER_CHARACTERS, tokens)
    pooled, grid = pool(attention, grid, side)
    cells = grid[0] * grid[1] * tokens  # per layer
    count = max(1, min(MAX_LAYERS, len(attention), LAYER_CHARACTERS // cells))
    layers = torch.linspace(len(attention) - 1, 0, count).round().long().flip(0).tolist()
    maps = [[pack_map(row) for row in layer] for layer in pooled[layers].tolist()]
    return {"grid": grid, "layers": layers, "maps": maps}


def head_fields(attention, selected, region, grid):
    """The maps of all heads: their mean over the selected tokens and, for as many heads as fit,
    a map per token. The heads with the highest AUROC come first.

    Args: attention (L, H, C, N); selected (C,) bool; region (N,) bool.
    Returns: a dict for JSON. `count` is [L, H]; head h of layer l has the index l * H + h in
    `auroc`, the AUROC of its mean map (None if the region is the whole image), and in `mean`, see
    `pack_maps`. `kept` are the indices of the heads with a map per token; `maps` is [token] of
    `pack_maps` of these heads.
    """
    L, H, C, _ = attention.shape
    heads = attention.flatten(0, 1)  # (L * H, C, N)
    mean = heads[:, selected].mean(1)  # (L * H, N)
    auroc = head_aurocs(mean, region)
    best = auroc.argsort(descending=True, stable=True)
    for side in HEAD_SIDES:
        cells = min(side, grid[0]) * min(side, grid[1])
        kept = best[: HEAD_CHARACTERS // (C * (cells + 1))]
        if len(kept) == len(best):
            break
    pooled, small_grid = pool(heads[kept], grid, side)
    return {
        "grid": small_grid,
        "count": [L, H],
        "auroc": None if auroc.isnan().any() else [round(value, 3) for value in auroc.tolist()],
        "mean": pack_maps(pool(mean, grid, side)[0].tolist()),
        "kept": kept.tolist(),
        "maps": [pack_maps(maps) for maps in pooled.transpose(0, 1).tolist()] if len(kept) else [],
    }


def head_aurocs(maps, region):
    """The AUROC of each map, as in `reward.localization`. Args: maps (n, N), region (N,) bool.
    Returns: (n,), NaN if the region is the whole image."""
    inside, outside = maps[:, region].unsqueeze(2), maps[:, ~region].unsqueeze(1)
    pairs = zip(inside.split(32), outside.split(32))  # n * R * (N - R) comparisons are too many
    return torch.cat([((a > b).float() + 0.5 * (a == b).float()).mean((1, 2)) for a, b in pairs])


def small_map(attention, grid):
    """`pack_map` of one map (N,), pooled to at most MAX_GRID_SIDE cells per side."""
    return pack_map(pool(attention, grid, MAX_GRID_SIDE)[0].tolist())


def pool(attention, grid, side):
    """Average attention (..., N) over blocks, so that no side of the grid has more than `side`
    cells. Returns: ((..., cells), the new grid)."""
    small = tuple(min(side, length) for length in grid)
    maps = attention.reshape(-1, 1, *grid)
    maps = torch.nn.functional.adaptive_avg_pool2d(maps, small)
    return maps.reshape(*attention.shape[:-1], -1), small


def fitting_side(largest, characters, tokens):
    """The largest side of a square grid with which a map per token fits into `characters`."""
    return max(2, min(largest, isqrt(characters // tokens)))
