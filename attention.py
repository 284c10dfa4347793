"""Attention of the language model: G completions share one prompt, and attention to the image is
recorded.

`sayo_attention` runs in every layer, on top of transformers' own SDPA. A completion attends to its
prompt and to itself, never to other completions. The completions cost G * C * (P + C) in time, and
at most that in memory, not (P + G * C)^2; the prompt's attention to itself is extra.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

MAP_FLOATS = 2**25  # 128 MiB: limits how many heads are mapped at once


@dataclass
class PackedGroup:
    """The part `[prompt | c_1 | ... | c_G]` of a packed sequence; G is 0 for a prompt alone."""

    P: int
    G: int
    C: int
    image_positions: torch.Tensor  # (N,)
    mask: torch.Tensor  # (1, 1, C, P + C) bool, for every completion


@dataclass
class Capture:
    """What to record during one packed forward: some layers' attention to the image tokens."""

    layers: list[int]
    heads: list[int]
    average_heads: bool = True
    maps: dict[int, list] = field(default_factory=dict)  # layer -> image_attention of every group


@dataclass
class PromptCache:
    """One layer's keys and values of B prompts, stored once, however many completions."""

    keys: torch.Tensor  # (B, H_kv, P, D), shorter prompts padded on the right
    values: torch.Tensor  # (B, H_kv, P, D)
    padding: torch.Tensor | None  # (B, P) bool, true on padding; None if there is none


def sayo_attention(layer, query, key, value, attention_mask, packed=None, **kwargs):
    """The attention function of every layer: for a packed sequence if `packed` is a list of
    PackedGroup, else for the vision tower or a plain sequence.
    Returns: (B, S, H, D) and None, like every attention function in transformers."""
    capture = kwargs.pop("capture", None)
    if packed is None:
        return sdpa(layer, query, key, value, attention_mask, **kwargs)
    lengths = [group.P + group.G * group.C for group in packed]
    groups = list(zip(packed, *(x.split(lengths, 2) for x in (query, key, value))))
    # Gradient checkpointing runs a layer twice; on recomputation the maps already exist.
    if capture and layer.layer_idx in set(capture.layers) - set(capture.maps):
        maps = [image_attention(q, k, group, capture, layer.scaling) for group, q, k, _ in groups]
        capture.maps[layer.layer_idx] = maps
    return torch.cat([group_attention(layer, *group, **kwargs) for group in groups], 1), None


def group_attention(layer, group, query, key, value, **kwargs):
    """Attend in `[prompt | c_1 | ... | c_G]`: the prompt to itself, each completion to the prompt
    and its own past. Args: query (1, H, S, D), key and value (1, H_kv, S, D) with S = P + G*C.
    Returns: (1, S, H, D)."""
    P, G, C = group.P, group.G, group.C

    def completions(x):  # H: the heads of x, query heads or key heads
        return x[0, :, P:].unflatten(1, (G, C)).transpose(0, 1)  # (G, H, C, D)

    def with_prompt(x):
        return torch.cat([x[:, :, :P].expand(G, -1, -1, -1), completions(x)], 2)  # (G, H, P + C, D)

    q, k, v = (x[:, :, :P] for x in (query, key, value))
    if k.is_cuda and torch.cuda.get_device_capability(k.device) < (8, 0):
        # Before 8.0, only the kernel that stores the (P, P) weights supports grouped heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    prompt_out, _ = sdpa(layer, q, k, v, None, **kwargs)  # causal; (1, P, H, D)
    if not G:
        return prompt_out
    q, k, v = completions(query), with_prompt(key), with_prompt(value)
    completion_out, _ = sdpa(layer, q, k, v, group.mask, **kwargs)  # (G, C, H, D)
    return torch.cat([prompt_out, completion_out.flatten(0, 1)[None]], 1)


def decode_attention(query, keys, values, prompt, scaling, ignored=None):
    """One new token of every completion attends to its prompt and to its own past.

    Args: query (B, H_kv, G, h, D) of B prompts with G completions, h query heads per key head; keys
    and values (B, H_kv, G, t, D) of the completions so far; prompt, the layer's PromptCache of B
    prompts; ignored (B, P + t) bool, true on positions to mask out, or None.
    Returns: the shape of `query`."""
    B, kv_heads, G, h, D = query.shape
    P, q, shape = prompt.keys.shape[2], query.contiguous(), query.shape[:-1]
    to_prompt = fp32_product(q.view(B * kv_heads, G * h, D), prompt.keys.flatten(0, 1).mT)
    to_own = fp32_product(q.view(-1, h, D), keys.flatten(0, 2).mT)  # (B*H_kv*G, h, t)
    scores = torch.cat([to_prompt.view(*shape, P), to_own.view(*shape, -1)], -1)
    scores.mul_(scaling)
    if ignored is not None:
        scores.masked_fill_(ignored[:, None, None, None], -torch.inf)
    weights = scores.softmax(-1).to(values.dtype)
    from_prompt = weights[..., :P].flatten(2, 3).flatten(0, 1) @ prompt.values.flatten(0, 1)
    own = weights[..., P:].flatten(0, 2), values.flatten(0, 2)
    return torch.baddbmm(from_prompt.view(-1, h, D), *own).view(query.shape)


def fp32_product(a, b):
    """Batched a @ b in fp32. In 16 bits, all scores could be wrong, because the keys of Qwen2.5-VL
    have a large bias."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)  # makes no copies, but needs a GPU


@torch.no_grad()
def image_attention(query, key, group, capture, scaling):
    """The attention weights to the image tokens: softmax(q k^T) over all keys that the query sees,
    in fp32, of which only the image columns are kept. MAP_FLOATS limits the heads at once.

    Args: query (1, H, S, D) and key (1, H_kv, S, D) of one PackedGroup, S = P + G*C.
    Returns: (1 + G*C, N), averaged over `capture.heads`, or (H, 1 + G*C, N) if not averaged. Row 0
    is the prompt's last token. Extra memory: a few times MAP_FLOATS floats, or those of one head.
    """
    P, G, C = group.P, group.G, group.C
    queries_per_key = query.shape[1] // key.shape[1]
    future = torch.ones(C, C, dtype=torch.bool, device=query.device).triu(1)

    def head_maps(heads):  # H of them
        q = torch.stack([query[0, head] for head in heads]).float()  # (H, S, D)
        k = torch.stack([key[0, head // queries_per_key] for head in heads]).float()
        own = q[:, P:].unflatten(1, (G, C)) @ k[:, P:].unflatten(1, (G, C)).mT  # (H, G, C, C)
        own = own.masked_fill_(future, -torch.inf).flatten(1, 2)  # (H, G*C, C)
        own = pad(own, (0, 0, 1, 0), value=-torch.inf)  # the prompt sees no completion
        scores = torch.cat([q[:, P - 1 :] @ k[:, :P].mT, own], 2)  # (H, 1 + G*C, P + C)
        return scores.mul_(scaling).softmax(-1)[..., group.image_positions]  # (H, 1 + G*C, N)

    at_once = max(1, MAP_FLOATS // ((1 + G * C) * (P + C)))
    starts = range(0, len(capture.heads), at_once)
    maps = torch.cat([head_maps(capture.heads[i : i + at_once]) for i in starts])
    return maps.mean(0) if capture.average_heads else maps


AttentionInterface.register("sayo", sayo_attention)
AttentionMaskInterface.register("sayo", sdpa_mask)  # otherwise padding would get attention
