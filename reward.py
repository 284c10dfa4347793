"""The math of SAYO and GRPO as pure functions of tensors and text. `REWARDS` lists the rewards.

Shapes: G completions of one prompt, C completion tokens (padded on the right, `mask` is true on
real ones), N image tokens. [code] marks the official code, and what is done differently here.
"""

from dataclasses import dataclass

import torch


def _fp32(values, **masks):
    """`values` in fp32, or as they are if more exact. Raises: ValueError naming a mask not bool."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:  # 0 and 1 would be taken for positions
            raise ValueError(f"{name} is {mask.dtype}: a mask must be bool")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def select_tokens(entropy, mask, fraction=0.3):
    """Select the tokens at which the model is least certain: the paper's top 30 % by entropy.

    Args: entropy (G, C) in nats; mask (G, C) bool; fraction of each completion's own n real tokens.
    Returns: bool (G, C), true on max(1, floor(fraction * n)) real tokens of each row; among equal
    entropies the first. A row without real tokens selects none. [code] counts and selects padding.
    """
    entropy = _fp32(entropy, mask=mask)
    count = mask.sum(1, keepdim=True)  # (G, 1)
    k = (fraction * count.double() + 1e-9).floor().clamp(min=1)  # 1e-9: 0.29 * 100 is 28.999...
    order = entropy.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (G, C): 0 for the highest entropy of its row
    return (rank < k) & mask


def align_attention(attention, prompt_row, alignment="query"):
    """Choose the attention row that goes with token j.

    The entropy of token j is the uncertainty *before* it is written. "query", the paper's reading,
    pairs it with the row whose query is token j, which predicts token j + 1; "predict" with the row
    that predicts token j: the query is token j - 1, or the prompt's last token if j is the first.

    Args: attention (..., C, N), row j has token j as its query; prompt_row (..., N), the row of the
    prompt's last token. Returns: (..., C, N). Raises: ValueError for another alignment.
    """
    if alignment == "query":
        return attention
    if alignment != "predict":
        raise ValueError(f"alignment {alignment!r}: choose query or predict")
    *lead, _, N = attention.shape
    first = prompt_row.unsqueeze(-2).expand(*lead, 1, N)
    return torch.cat([first, attention[..., :-1, :]], dim=-2)


def attention_reward(attention, region, selected, eps=1e-8):
    """SAYO's reward r_v = tanh(log((a + eps) / (v + eps))): does the model look at the region?

    `a` is the mean attention from the selected tokens to the image tokens in the region, `v` to all
    (a ratio of means, not a mean of ratios). With rho = a / v this is (rho^2 - 1) / (rho^2 + 1).

    Args: attention (G, C, N), mean over heads and layers; region (N,) bool; selected (G, C) bool.
    Returns: (G,) in [-1, 1]; 0 for uniform attention, -1 for nothing selected: with 0, an empty one
    would escape the penalty. Raises: ValueError if the region is empty or the shapes do not match.
    """
    rho = attention_ratio(attention, region, selected, eps)
    return torch.where(selected.any(1), torch.tanh(rho.log()), -1.0)


def attention_ratio(attention, region, selected, eps=1e-8):
    """rho = (a + eps) / (v + eps) of `attention_reward`, (G,)."""
    attention = _fp32(attention, region=region, selected=selected)
    if attention.shape != (expected := (*selected.shape, len(region))):
        raise ValueError(f"attention {(*attention.shape,)} is not {expected}, (G, C, N)")
    if not region.any():
        raise ValueError("the region marks no image token")
    kept = attention.masked_fill(~selected.unsqueeze(-1), 0)
    mean_map = kept.sum(1) / selected.sum(1, keepdim=True).clamp(min=1)  # (G, N)
    return (mean_map[:, region].mean(1) + eps) / (mean_map.mean(1) + eps)


def find_answer(text):
    """The text in <answer>...</answer>, if there is exactly one and it is not blank; else None."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return (inside.strip() or None) if closed else None


def format_reward(text, n_tokens, shortest=60, longest=100):
    """1 for exactly one well-formed answer; 0.6 * n / shortest below `shortest` tokens and
    0.6 * longest / n above `longest`, as in [code]. Returns: float in [0, 1]."""
    if find_answer(text) is None:
        return 0.0
    if n_tokens < shortest:
        return 0.6 * n_tokens / shortest
    return 0.6 * longest / n_tokens if n_tokens > longest else 1.0


def accuracy_reward(text, answer):
    """1.0 if the one well-formed answer equals `answer`, ignoring case, spacing and closing
    punctuation; else 0.0. SAYO itself does not use this reward."""
    found = find_answer(text)
    return float(found is not None and _normalize(found) == _normalize(answer))


def _normalize(answer):
    return " ".join(answer.casefold().split()).rstrip(" .!?,;:")


def group_advantages(rewards, eps=1e-4):
    """GRPO advantages (r - mean) / (std + eps) within a group; Bessel's correction, as in TRL.

    Args: rewards (G,). Returns: (G,), exactly 0 for equal rewards. Raises: ValueError for G < 2.
    """
    if len(rewards) < 2:
        raise ValueError("a group of one has no advantage: num_generations must be at least 2")
    rewards = _fp32(rewards)
    if rewards.eq(rewards[0]).all():  # their mean may differ from them in the last bit
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def grpo_loss(
    logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.001, denominator=None
):
    """The clipped policy-gradient loss with a KL penalty, normalized by tokens (TRL's "dapo").

    Sum over real tokens of -min(ratio * A, clip(ratio) * A) + beta * k3, over `denominator`, with
    ratio = exp(logp - old_logp) and the KL estimate k3 = exp(d) - d - 1, d = ref_logp - logp.

    Args: logps (G, C) with gradient; old_logps (G, C) of the sampling policy; ref_logps (G, C), or
    None for no KL; advantages (G,); mask (G, C) bool; denominator, the tokens of the whole step if
    gradients are accumulated, by default mask.sum(). Log-ratios are clamped to +-20: exp stays
    finite. Returns: (loss; token means, floats: kl, ratio, clip_ratio/low_mean and /high_mean).
    """
    logps = _fp32(logps, mask=mask)  # the others are promoted where they meet it
    A = advantages.unsqueeze(1).expand_as(logps)[mask]  # (tokens,)
    logps, old_logps = logps[mask], old_logps[mask]  # drop padding first: a NaN there stays there
    ratio = (logps - old_logps).clamp(-20, 20).exp()
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = torch.zeros_like(loss)
    if ref_logps is not None:
        d = (ref_logps[mask] - logps).clamp(-20, 20)
        kl = d.exp() - d - 1
        loss = loss + beta * kl
    low, high = (ratio < 1 - clip) & (A < 0), (ratio > 1 + clip) & (A > 0)
    stats = {"kl": kl, "ratio": ratio}
    stats |= {"clip_ratio/low_mean": low.float(), "clip_ratio/high_mean": high.float()}
    stats = {k: v.detach().mean().item() if len(v) else 0.0 for k, v in stats.items()}
    return loss.sum() / max(denominator if denominator is not None else len(loss), 1), stats


def localization(attention, region):
    """How well one attention map finds the region. In brackets: the chance level.

    Args: attention (N,), region (N,) bool. Returns floats: `auroc`, the probability that a cell
    inside gets more than one outside, ties counting half (0.5; NaN if all are inside);
    `mass_over_area`, rho (1); `pointing`, whether the largest cell is inside, ties shared (region /
    image); `tas`, Target Attention Score, (1 + r_v) / 2 (0.5); `image_mass`, the sum.
    """
    attention = _fp32(attention, region=region)
    inside, outside = attention[region].unsqueeze(1), attention[~region].unsqueeze(0)
    wins = (inside > outside).float() + 0.5 * (inside == outside).float()  # (R, N - R)
    rho = attention_ratio(attention[None, None], region, torch.ones_like(region[:1, None]))
    return {
        "auroc": wins.mean().item(),
        "mass_over_area": rho.item(),
        "pointing": region[attention == attention.max()].float().mean().item(),
        "tas": ((1 + torch.tanh(rho.log())) / 2).item(),
        "image_mass": attention.sum().item(),
    }


@dataclass
class RewardInputs:
    """What a reward may look at: G completions of one question."""

    texts: list[str]
    lengths: list[int]  # tokens, the end-of-turn token included
    answer: str  # the ground truth
    attention: torch.Tensor  # (G, C, N), aligned
    region: torch.Tensor  # (N,) bool
    selected: torch.Tensor  # (G, C) bool
    format_lengths: tuple[int, int]  # shortest, longest


REWARDS = {  # name -> function of RewardInputs, returns G floats; flags, log and report follow it
    "attention": lambda x: attention_reward(x.attention, x.region, x.selected),
    "format": lambda x: [format_reward(*y, *x.format_lengths) for y in zip(x.texts, x.lengths)],
    "accuracy": lambda x: [accuracy_reward(text, x.answer) for text in x.texts],
}
