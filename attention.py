"""Attention of the language model: one prompt shared by G completions, and a record of who looks at the image.

`sayo_attention` is registered with transformers and stands in every layer. The output comes from the library's own
SDPA; in the layers that a `Capture` names, the attention to the image is kept on the side. A completion sees the prompt
and itself, never its siblings: time and memory grow with G * C * (P + C), and never with the square of the whole.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


@dataclass
class Capture:
    """What to keep of one packed forward: of `layers`, the attention to the tokens at `columns`, mean over `heads` or
    each head apart."""

    layers: list[int]
    heads: list[int]
    columns: torch.Tensor  # (N,) positions of the image tokens
    each_head: bool = False
    maps: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (1 + G*C, N), or (H, 1 + G*C, N)


def sayo_attention(module, query, key, value, attention_mask, packed=None, capture=None, prefix=None, **kwargs):
    """Three ways to come here. *Packed*: (P, G, C) of one sequence `[prompt | c_1 | ... | c_G]`, with `attention_mask`
    what a completion sees of the prompt and itself, (1, 1, C, P + C). *Decoding*: one new token of each completion,
    with the prompts' keys and values as `prefix`, see `stack`. Neither: a prompt alone, or the vision tower; the
    library's own attention.

    Returns: (B, S, H, D) and None, as the library's functions do.
    """
    if prefix is not None:
        return decode_attention(query, key, value, *prefix[module.layer_idx], module.scaling), None
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Gradient checkpointing calls this twice; the second time the map is there already.
    if capture is not None and module.layer_idx in capture.layers and module.layer_idx not in capture.maps:
        capture.maps[module.layer_idx] = image_attention(query, key, packed, capture, module.scaling)
    P, G, C = packed

    def own(x):
        return x[0, :, P:].unflatten(1, (G, C)).transpose(0, 1)  # (G, H, C, D): a batch of completions

    def visible(x):
        return torch.cat([x[:, :, :P].expand(G, -1, -1, -1), own(x)], 2)  # (G, H_kv, P + C, D)

    of_prompt, _ = sdpa_attention_forward(module, query[:, :, :P], key[:, :, :P], value[:, :, :P], None, **kwargs)
    of_own, _ = sdpa_attention_forward(module, own(query), visible(key), visible(value), attention_mask, **kwargs)
    return torch.cat([of_prompt, of_own.flatten(0, 1)[None]], 1), None  # (1, P + G*C, H, D)


def stack(caches):
    """The caches of B prompts for `decode_attention`: a layer each of keys (B, H_kv, P, D), values, and (B, P), where
    a shorter prompt has been padded. Every prompt is kept once, however many completions look at it."""
    lengths = [cache.get_seq_length() for cache in caches]

    def together(tensors):
        return torch.cat([pad(t, (0, 0, 0, max(lengths) - t.shape[2])) for t in tensors])

    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    padding = padding.to(caches[0].layers[0].keys.device)
    layers = zip(*(cache.layers for cache in caches))
    return [(together([x.keys for x in layer]), together([x.values for x in layer]), padding) for layer in layers]


def decode_attention(query, key, value, prompt_key, prompt_value, padding, scaling):
    """One new token of every completion looks at its prompt, whose keys are kept once for all G, and at its own past.

    Args: query (B*G, H, 1, D); key and value (B*G, H_kv, t, D); the others of B prompts, see `stack`.
    Returns: (B*G, 1, H, D).
    """
    B, kv_heads, P, D = prompt_key.shape
    q = query.view(B, -1, kv_heads, query.shape[1] // kv_heads, D) * scaling  # (B, G, H_kv, H / H_kv, D)
    key, value = key.unflatten(0, (B, -1)), value.unflatten(0, (B, -1))
    to_prompt = torch.einsum("bgkhd,bkpd->bgkhp", q, prompt_key)
    to_prompt = to_prompt.masked_fill(padding[:, None, None, None], -torch.inf)
    to_own = torch.einsum("bgkhd,bgktd->bgkht", q, key)
    weights = torch.cat([to_prompt, to_own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)  # over P + t
    seen = torch.einsum("bgkhp,bkpd->bgkhd", weights[..., :P], prompt_value)
    seen = seen + torch.einsum("bgkht,bgktd->bgkhd", weights[..., P:], value)
    return seen.reshape(query.shape).transpose(1, 2)


@torch.no_grad()
def image_attention(query, key, packed, capture, scaling):
    """softmax(q k^T) in fp32 of the prompt's last token and of all completions, one head at a time; the image columns,
    averaged over the heads.

    Args: query (1, H, S, D) and key (1, H_kv, S, D), S = P + G*C; packed, (P, G, C).
    Returns: (1 + G*C, N) fp32, or (H, 1 + G*C, N) if `capture.each_head`. Memory beside it: 1 + G*C times P + C floats,
    a few times over, however many the heads.
    """
    P, G, C = packed
    share = query.shape[1] // key.shape[1]  # query heads that share a key head
    later = torch.ones(C, C, dtype=torch.bool, device=query.device).triu(1)

    def map_of(head):
        q, k = query[0, head].float(), key[0, head // share].float()  # (S, D)
        own = q[P:].view(G, C, -1) @ k[P:].view(G, C, -1).mT  # (G, C, C)
        own = own.masked_fill_(later, -torch.inf).flatten(0, 1)  # (G*C, C)
        own = torch.cat([own.new_full((1, C), -torch.inf), own])  # the prompt's last token sees no completion
        scores = torch.cat([q[P - 1 :] @ k[:P].T, own], 1)  # (1 + G*C, P + C)
        return scores.mul_(scaling).softmax(-1)[:, capture.columns]  # (1 + G*C, N)

    if capture.each_head:
        return torch.stack([map_of(head) for head in capture.heads])
    return sum(map_of(head) for head in capture.heads) / len(capture.heads)


AttentionInterface.register("sayo", sayo_attention)
AttentionMaskInterface.register("sayo", sdpa_mask)  # without it the mask is silently None, and causality lost
