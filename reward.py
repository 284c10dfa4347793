"""The math of SAYO and GRPO as pure functions of tensors and text. `REWARDS` lists the rewards.
G completions of one prompt, C tokens (padded on the right; `mask` marks real ones), N image tokens.
"""

import math
import unicodedata
from dataclasses import dataclass

import torch


def _fp32(values, **masks):
    """`values` in fp32, or unchanged if more precise. Raises: ValueError naming a non-bool mask."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:  # an integer mask would index, not select
            raise ValueError(f"{name} is {mask.dtype}: a mask must be bool")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def select_tokens(entropy, mask, fraction=0.3):
    """Select the tokens at which the model is least certain: the paper's top 30 % by entropy.
    Args: entropy (G, C) in nats; mask (G, C) bool; fraction of each completion's own n real tokens.
    Returns: bool (G, C), true on max(1, floor(fraction * n)) real tokens of each row. Ties go to
    the earlier token. Nothing is selected in an empty row. The official code takes the fraction of
    the padded length.
    """
    entropy = _fp32(entropy, mask=mask)
    count = mask.sum(1, keepdim=True)  # (G, 1)
    k = (fraction * count.double() + 1e-9).floor().clamp(min=1)  # 1e-9: 0.29 * 100 is 28.999...
    order = entropy.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (G, C): 0 for the highest entropy of its row
    return (rank < k) & mask


def align_attention(attention, prompt_row, alignment="query"):
    """Pair each token j with an attention row.

    Row j has token j as its query, so it predicts token j + 1. Entropy j is the uncertainty
    *before* token j is written. "query", the paper's reading, pairs entropy j with row j. "predict"
    pairs it with row j - 1, which predicts token j; for the first token, the prompt's last row.
    Args: attention (..., C, N), row j has token j as its query; prompt_row (..., N), the row of the
    prompt's last token. Returns: (..., C, N). Raises: ValueError for an unknown alignment.
    """
    if alignment == "query":
        return attention
    if alignment != "predict":
        raise ValueError(f"alignment {alignment!r}: choose query or predict")
    first = prompt_row.unsqueeze(-2).expand_as(attention[..., :1, :])
    return torch.cat([first, attention[..., :-1, :]], dim=-2)


def attention_reward(attention, region, selected, eps=1e-8):
    """SAYO's reward r_v = tanh(log((a + eps) / (v + eps))): does the model look at the region?

    `a` is the mean attention from the selected tokens to image tokens in the region, `v` to all
    image tokens. With rho = (a + eps) / (v + eps), r_v = (rho^2 - 1) / (rho^2 + 1).
    Args: attention (G, C, N), mean over heads and layers; region (N,) bool; selected (G, C) bool.
    eps keeps the logarithm finite if there is no attention to the region.
    Returns: (G,) in [-1, 1]; 0 for uniform attention, -1 if nothing is selected. Raises: ValueError
    for an empty region or wrong shapes.
    """
    rho = attention_ratio(attention, region, selected, eps)
    return torch.where(selected.any(1), torch.tanh(rho.log()), -1.0)


def attention_ratio(attention, region, selected, eps=1e-8):
    """rho = (a + eps) / (v + eps), (G,). Arguments and errors as in `attention_reward`."""
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
    """0 unless there is exactly one well-formed answer. Then 0.6 * n / shortest for n < shortest
    tokens, 0.6 * longest / n for n > longest, else 1, as in the official code. Returns: float."""
    if find_answer(text) is None:
        return 0.0
    if n_tokens < shortest:
        return 0.6 * n_tokens / shortest
    return 0.6 * longest / n_tokens if n_tokens > longest else 1.0


def accuracy_reward(text, answer):
    """1.0 if the one well-formed answer equals `answer`, or one of a tuple of accepted answers;
    else 0.0. See `comparable` for what is ignored. SAYO itself does not use this reward."""
    found = find_answer(text)
    accepted = answer if isinstance(answer, (list, tuple)) else [answer or ""]
    return float(found is not None and comparable(found) in map(comparable, accepted))


def comparable(text):
    """An answer casefolded, in NFKC, without extra spaces, zero-width characters and trailing
    punctuation. If it is only punctuation, it stays."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    return text.rstrip(" .!?,;:。") or text


def group_advantages(rewards, eps=1e-4):
    """GRPO advantages (r - mean) / (std + eps) of a group, with Bessel's correction as in TRL.
    Args: rewards (G,). Returns: (G,), exactly 0 if all are equal. Raises: ValueError if G < 2."""
    if len(rewards) < 2:
        raise ValueError("a group of one has no advantage: num_generations must be at least 2")
    rewards = _fp32(rewards)
    if rewards.eq(rewards[0]).all():  # rounding can make r - mean nonzero
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def grpo_loss(
    logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.001, denominator=None
):
    """The clipped policy-gradient loss with a KL penalty, normalized by tokens (TRL's "dapo").

    Sum over real tokens of -min(ratio * A, clip(ratio) * A) + beta * k3, divided by `denominator`.
    ratio = exp(logp - old_logp), KL estimate k3 = exp(d) - d - 1, d = ref_logp - logp.
    Args: logps (G, C) with gradient; old_logps (G, C), before the first update; ref_logps (G, C),
    or None for no KL; advantages (G,); mask (G, C) bool; denominator, by default mask.sum(); with
    gradient accumulation, the tokens of the whole step. Log-ratios are clamped to +-20 to keep exp
    finite. Returns: (loss, {kl, ratio, clip_ratio/low_mean, clip_ratio/high_mean: token means}).
    """
    logps = _fp32(logps, mask=mask)  # type promotion converts the others
    A = advantages.unsqueeze(1).expand_as(logps)[mask]  # (tokens,)
    logps, old_logps = logps[mask], old_logps[mask]  # drop padding, so NaNs in it cannot spread
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
    """How well one attention map finds the region. Args: attention (N,), region (N,) bool.
    Returns: a dict of floats:
    - auroc: the probability that a cell inside gets more attention than one outside; ties count
      half. NaN if all cells are inside. Chance: 0.5
    - mass_over_area: rho. Chance: 1
    - pointing: 1 if the highest cell is inside, else 0; the mean over ties. Chance: the region's
      share of the cells
    - tas: the paper's Target Attention Score, (1 + r_v) / 2. Chance: 0.5
    - image_mass: the sum of the map
    """
    attention = _fp32(attention, region=region)
    inside, outside = attention[region].unsqueeze(1), attention[~region].unsqueeze(0)
    wins = (inside > outside).float() + 0.5 * (inside == outside).float()  # (R, N - R)
    one_token = torch.ones(1, 1, dtype=torch.bool, device=region.device)  # (G, C)
    rho = attention_ratio(attention[None, None], region, one_token)
    return {
        "auroc": wins.mean().item(),
        "mass_over_area": rho.item(),
        "pointing": region[attention == attention.max()].float().mean().item(),
        "tas": ((1 + torch.tanh(rho.log())) / 2).item(),
        "image_mass": attention.sum().item(),
    }


def look_maps(attention, before_answer, fraction=0.15):
    """The maps of the first and the last look of one answer, (N,) each.

    The paper finds that early looks go wrong and are rarely corrected. How looks are chosen:
    1. Keep the 15 % of the tokens before <answer> with the most concentrated maps: those with the
       largest Euclidean norm divided by the sum.
    2. Average the maps of the first third of them, and of the last third, at least one token each.
    Args: attention (C, N); before_answer (C,) bool, the tokens before <answer>, or all if there are
    none.
    """
    attention = _fp32(attention, before_answer=before_answer)
    if before_answer.any():
        attention = attention[before_answer]
    concentration = (attention.norm(dim=1) / attention.sum(1).clamp(min=1e-8))[None]  # (1, C)
    everything = torch.ones_like(concentration).bool()
    looks = attention[select_tokens(concentration, everything, fraction)[0]]  # (n, N)
    third = math.ceil(len(looks) / 3)
    return looks[:third].mean(0), looks[len(looks) - third :].mean(0)


def early_and_late(attention, region, before_answer):
    """Whether the brightest cells of `look_maps` are in the region (N,). Returns: [bool, bool]."""
    maps = look_maps(attention, before_answer)
    return [localization(look, region)["pointing"] > 0.5 for look in maps]


@dataclass
class RewardInputs:
    """The inputs available to a reward: G completions of one question."""

    texts: list[str]
    lengths: list[int]  # tokens, the end-of-turn token included
    answer: str | tuple[str, ...]  # the ground truth, or several accepted answers
    attention: torch.Tensor  # (G, C, N), aligned
    region: torch.Tensor  # (N,) bool
    selected: torch.Tensor  # (G, C) bool
    format_lengths: tuple[int, int]  # shortest, longest
    example: object = None  # a data.Example: image, question, answer, boxes, id
    prompt: object = None  # a model.Prompt
    completions: object = None  # a model.Completions: ids and mask (G, C)


REWARDS = {  # name, as in flags, log and report -> function from RewardInputs to G floats
    "attention": lambda x: attention_reward(x.attention, x.region, x.selected),
    "format": lambda x: [
        format_reward(text, n_tokens, *x.format_lengths)
        for text, n_tokens in zip(x.texts, x.lengths)
    ],
    "accuracy": lambda x: [accuracy_reward(text, x.answer) for text in x.texts],
}
