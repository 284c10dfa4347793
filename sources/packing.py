"""Several prompts in one forward pass: how many, their images, and their caches."""

from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from attention import PromptCache

TOKENS_PER_FORWARD = 2**12  # when prompts are prefilled or answers evaluated together


def split_by_tokens(items, length):
    """Yield lists of consecutive items with at most TOKENS_PER_FORWARD tokens in total, or of one
    item. Args: items, an iterable; length, a function from an item to its number of tokens."""
    batch, total = [], 0
    for item in items:
        tokens = length(item)
        if batch and total + tokens > TOKENS_PER_FORWARD:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += tokens
    if batch:
        yield batch


def stack_prompts(caches):
    """The keys and values of B prompts as a list of PromptCache, one per layer.

    Args: caches, pairs of a transformers cache and the lengths of the prompts packed in it.
    """
    lengths = [length for _, group in caches for length in group]
    padding = None
    if len(set(lengths)) > 1:
        device = caches[0][0].layers[0].keys.device
        lengths_column = torch.tensor(lengths, device=device)[:, None]
        padding = torch.arange(max(lengths), device=device) >= lengths_column  # (B, P)

    def stack(layer, name):
        parts = [getattr(c.layers[layer], name).split(group, 2) for c, group in caches]
        parts = [part for group in parts for part in group]  # B of (1, H_kv, P, D)
        return torch.cat([pad(x, (0, 0, 0, max(lengths) - x.shape[2])) for x in parts])

    layers = range(len(caches[0][0].layers))
    return [PromptCache(stack(i, "keys"), stack(i, "values"), padding) for i in layers]


@torch.no_grad()
def image_features(model, prompts):
    """The vision tower's output for all `prompts`, as transformers expects it. The frozen tower
    runs once per prompt, on the images of several prompts at once."""
    new = [prompt for prompt in prompts if prompt.features is None]
    if new:
        pixels = torch.cat([prompt.pixel_values for prompt in new])
        grids = torch.cat([prompt.image_grid_thw for prompt in new])
        out = model.get_image_features(pixels, grids)
        levels = out.pooler_output, *(getattr(out, "deepstack_features", None) or ())
        for prompt, *features in zip(new, *levels):
            prompt.features = features
    levels = list(zip(*(prompt.features for prompt in prompts)))
    return SimpleNamespace(pooler_output=levels[0], deepstack_features=levels[1:])
