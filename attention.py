"""Attention of the language model: G completions share a prompt, and image attention is recorded.

A completion attends to the prompt and to itself, never to its siblings. Time and memory therefore
grow with G * C * (P + C), not with the square of the packed length."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@dataclass
class Capture:
    """Records the attention of some layers to the image tokens in one packed forward pass."""

    layers: list[int]
    heads: list[int]
    image_positions: torch.Tensor  # (N,)
    average_heads: bool = True
    maps: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> see image_attention


@dataclass
class PromptCache:
    """One layer's keys and values of B prompts, stored once regardless of how many completions."""

    keys: torch.Tensor  # (B, H_kv, P, D), shorter prompts padded on the right
    values: torch.Tensor  # (B, H_kv, P, D)
    padding: torch.Tensor  # (B, P) bool, true on padding


def sayo_attention(layer, query, key, value, attention_mask, packed=None, prompts=None, **kwargs):
    """The attention function of every layer. Its arguments select one of three cases:
    - `prompts`, a PromptCache per layer: decoding one token of every completion
    - `packed`, (P, G, C): a packed sequence, see `packed_attention`
    - neither: a prompt alone, or the vision tower
    Returns: (B, S, H, D) and None, like every attention function in transformers."""
    capture = kwargs.pop("capture", None)
    if prompts is not None:
        return decode_attention(query, key, value, prompts[layer.layer_idx], layer.scaling), None
    if packed is None:
        return sdpa(layer, query, key, value, attention_mask, **kwargs)
    # Gradient checkpointing runs a layer twice; on recomputation the map already exists.
    if capture and layer.layer_idx in set(capture.layers) - set(capture.maps):
        weights = image_attention(query, key, packed, capture, layer.scaling)
        capture.maps[layer.layer_idx] = weights
    return packed_attention(layer, query, key, value, attention_mask, packed, **kwargs), None


def packed_attention(layer, query, key, value, mask, packed, **kwargs):
    """Attend in `[prompt | c_1 | ... | c_G]`: the prompt to itself, each completion to the prompt
    and its own past. Args: query (1, H, S, D), key and value (1, H_kv, S, D) with
    S = P + G*C; mask (1, 1, C, P + C), for the completions. Returns: (1, S, H, D)."""
    P, G, C = packed

    def completions(x):
        return x[0, :, P:].unflatten(1, (G, C)).transpose(0, 1)  # (G, H, C, D)

    def with_prompt(x):
        return torch.cat([x[:, :, :P].expand(G, -1, -1, -1), completions(x)], 2)  # (G, H, P + C, D)

    q, k, v = (x[:, :, :P] for x in (query, key, value))
    prompt_out, _ = sdpa(layer, q, k, v, None, **kwargs)  # (1, P, H, D)
    q, k, v = completions(query), with_prompt(key), with_prompt(value)
    completion_out, _ = sdpa(layer, q, k, v, mask, **kwargs)  # (G, C, H, D)
    return torch.cat([prompt_out, completion_out.flatten(0, 1)[None]], 1)


def stack_prompts(caches):
    """Stack the transformers caches of B prompts. Returns: a list with a PromptCache per layer."""
    lengths = [cache.get_seq_length() for cache in caches]
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (B, P)
    padding = padding.to(caches[0].layers[0].keys.device)

    def stack(tensors):
        return torch.cat([pad(t, (0, 0, 0, max(lengths) - t.shape[2])) for t in tensors])

    return [
        PromptCache(stack([x.keys for x in xs]), stack([x.values for x in xs]), padding)
        for xs in zip(*(cache.layers for cache in caches))
    ]


def decode_attention(query, key, value, prompt, scaling):
    """Let one new token of every completion attend to its prompt and to its own past.

    Args: query (B*G, H, 1, D); key and value (B*G, H_kv, t, D) of the completions so far; prompt,
    the layer's PromptCache of B prompts. Returns: (B*G, 1, H, D)."""
    B, kv_heads, P, D = prompt.keys.shape
    q = query.view(B, -1, kv_heads, query.shape[1] // kv_heads, D) * scaling  # (B, G, H_kv, h, D)
    key, value = key.unflatten(0, (B, -1)), value.unflatten(0, (B, -1))  # (B, G, H_kv, t, D)
    to_prompt = torch.einsum("bgkhd,bkpd->bgkhp", q, prompt.keys)
    to_prompt = to_prompt.masked_fill(prompt.padding[:, None, None, None], -torch.inf)
    to_own = torch.einsum("bgkhd,bgktd->bgkht", q, key)
    weights = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
    out = torch.einsum("bgkhp,bkpd->bgkhd", weights[..., :P], prompt.values)
    out = out + torch.einsum("bgkht,bgktd->bgkhd", weights[..., P:], value)
    return out.reshape(query.shape).transpose(1, 2)


@torch.no_grad()
def image_attention(query, key, packed, capture, scaling):
    """The attention weights to the image tokens: softmax(q k^T) in fp32, one head at a time.

    Args: query (1, H, S, D) and key (1, H_kv, S, D), S = P + G*C; packed, (P, G, C).
    Returns: (1 + G*C, N), averaged over `capture.heads`, or (H, 1 + G*C, N) if not averaged. Row 0
    is the prompt's last token. Extra memory: a few times (1 + G*C) * (P + C) floats.
    """
    P, G, C = packed
    queries_per_key = query.shape[1] // key.shape[1]
    future = torch.ones(C, C, dtype=torch.bool, device=query.device).triu(1)

    def head_map(head):
        q, k = query[0, head].float(), key[0, head // queries_per_key].float()  # (S, D)
        own = q[P:].view(G, C, -1) @ k[P:].view(G, C, -1).mT  # (G, C, C)
        own = own.masked_fill_(future, -torch.inf).flatten(0, 1)  # (G*C, C)
        own = torch.cat([own.new_full((1, C), -torch.inf), own])  # the prompt sees no completion
        scores = torch.cat([q[P - 1 :] @ k[:P].T, own], 1)  # (1 + G*C, P + C)
        return scores.mul_(scaling).softmax(-1)[:, capture.image_positions]  # (1 + G*C, N)

    if capture.average_heads:
        return sum(head_map(head) for head in capture.heads) / len(capture.heads)
    return torch.stack([head_map(head) for head in capture.heads])


AttentionInterface.register("sayo", sayo_attention)
AttentionMaskInterface.register("sayo", sdpa_mask)  # otherwise padding would get attention
