"""The maths of SAYO and GRPO as pure functions of tensors and text: no model, no files.

Shapes: G completions of one prompt, C completion tokens (padded on the right; `mask` is true on real ones), N image
tokens. Where a formula comes from the paper the docstring says so; [code] is the paper's official code, and where
that is at fault the docstring says what is done instead.
"""

import re

import torch


def select_tokens(entropy, mask, fraction=0.3):
    """The tokens at which the model is least sure: the paper's top 30 % by entropy.

    Args: entropy (G, C) in nats; mask (G, C) bool; fraction of each completion's own n real tokens to take.
    Returns: bool (G, C), true on max(1, floor(fraction * n)) tokens a row, never a masked one; of equal entropies the
    first. A row without real tokens selects nothing. [code] takes 30 % of the padded length, and may pick padding.
    """
    count = mask.sum(1, keepdim=True)  # (G, 1)
    k = (fraction * count.double() + 1e-9).floor().clamp(min=1)  # 1e-9: 0.29 * 100 is 28.999...
    order = entropy.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # (G, C): 0 for the highest entropy of its row
    return (rank < k) & mask


def align_attention(attention, prompt_row, alignment="query"):
    """Which row of attention belongs to token j.

    Entropy j is the doubt *before* token j is written; the row whose query is token j is where the model looks while
    it predicts token j + 1. "query" (the paper, read literally) pairs the two all the same. "predict" pairs entropy j
    with the row that predicts token j: its query is token j - 1, or the prompt's last token if j is the first.

    Args: attention (G, C, N), row j has token j as its query; prompt_row (N,), the prompt's last token's row.
    Returns: (G, C, N). Raises: ValueError for another alignment.
    """
    if alignment == "query":
        return attention
    if alignment != "predict":
        raise ValueError(f"alignment {alignment!r}: choose query or predict")
    first = prompt_row.expand(attention.shape[0], 1, -1)  # (G, 1, N)
    return torch.cat([first, attention[:, :-1]], dim=1)


def attention_reward(attention, region, selected, eps=1e-8):
    """SAYO's reward r_v = tanh(log((a + eps) / (v + eps))): how much more than an average cell does the region get.

    `a` is the mean attention from the selected tokens to the image tokens in the region, `v` to all image tokens: a
    ratio of means, not a mean of ratios. With rho = a / v it is (rho^2 - 1) / (rho^2 + 1), so even attention gives 0.

    Args: attention (G, C, N), already averaged over heads and layers; region (N,) bool; selected (G, C) bool.
    Returns: (G,) in [-1, 1]. A completion with nothing selected gets -1: it looked at nothing, and 0 would let it
    escape a penalty by being empty. Raises: ValueError if the region is empty or the shapes do not fit.
    """
    rho = attention_ratio(attention, region, selected, eps)
    return torch.where(selected.any(1), torch.tanh(rho.log()), -1.0)


def attention_ratio(attention, region, selected, eps=1e-8):
    """rho = (a + eps) / (v + eps) of `attention_reward`, (G,): the share of attention over the share of area."""
    if attention.shape != (*selected.shape, len(region)):
        raise ValueError(f"attention {(*attention.shape,)} is not {(*selected.shape, len(region))}, (G, C, N)")
    if not region.any():
        raise ValueError("the region marks no image token")
    kept = attention.masked_fill(~selected.unsqueeze(-1), 0)
    looked = kept.sum(1) / selected.sum(1, keepdim=True).clamp(min=1)  # (G, N): mean over the selected tokens
    return (looked[:, region].mean(1) + eps) / (looked.mean(1) + eps)


def find_answer(text):
    """What stands between <answer> and </answer> if that occurs exactly once and is not blank, else None."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return (inside.strip() or None) if closed else None


def format_reward(text, n_tokens, shortest=60, longest=100):
    """1 for exactly one well-formed <answer>...</answer>, less if the completion is too short or too long.

    As in [code]: below `shortest` tokens 0.6 * n / shortest, above `longest` 0.6 * longest / n. In [0, 1].
    """
    if find_answer(text) is None:
        return 0.0
    if n_tokens < shortest:
        return 0.6 * n_tokens / shortest
    return 0.6 * longest / n_tokens if n_tokens > longest else 1.0


def accuracy_reward(text, answer):
    """1.0 if the one well-formed answer is `answer`, letter case, spaces and closing punctuation aside; else 0.0.

    [code] accepts any substring, so that "a" is right nearly always. SAYO proper does not use this reward.
    """
    found = find_answer(text)
    return float(found is not None and _plain(found) == _plain(answer))


def _plain(answer):
    return " ".join(answer.casefold().split()).rstrip(" .!?,;:")


def repeated_sentences(text):
    """The share of sentences that say again what stood before: padding to please a reward. Float in [0, 1)."""
    sentences = [s.strip() for s in re.split(r"[.!?]+(?:\s|$)|\n+", text.casefold()) if s.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


def seq_rep_3(text):
    """The share of word triples that occurred before (Welleck et al. 2020): catches lists that never end, which have
    no sentences to repeat. Float in [0, 1)."""
    words = text.casefold().split()
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def group_advantages(rewards, eps=1e-4):
    """GRPO: (r - mean) / (std + eps) within the group, std with Bessel's correction, as in TRL.

    Args: rewards (G,). Returns: (G,); exactly 0 for equal rewards. Raises: ValueError for G < 2.
    """
    if len(rewards) < 2:
        raise ValueError("a group of one has no advantage: num_generations must be at least 2")
    if (rewards == rewards[0]).all():  # the mean of equal floats may differ from them in the last bit
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + eps)


def grpo_loss(logps, old_logps, ref_logps, advantages, mask, clip=0.2, beta=0.001, denominator=None):
    """The clipped policy-gradient loss with a KL penalty, summed over tokens ("dapo" normalisation in TRL).

    sum over real tokens of -min(ratio * A, clip(ratio) * A) + beta * k3, divided by `denominator`.
    ratio = exp(logp - old_logp); k3 = exp(d) - d - 1 with d = ref_logp - logp, an estimate of the KL divergence from
    the reference that is never negative. With one update per rollout the ratio is exactly 1 and the loss reads about
    0 (advantages sum to 0 within a group of equal lengths); its gradient does not.

    Args: logps (G, C) with gradient; old_logps (G, C) of the policy that sampled; ref_logps (G, C), or None for no
    KL; advantages (G,); mask (G, C) bool; denominator, by default mask.sum(): give the token count of the whole step
    when groups are accumulated. Log-ratios are clamped to +-20, where exp and its gradient are still finite.
    Returns: (loss, a scalar; stats: floats kl, ratio, clip_ratio/low_mean, clip_ratio/high_mean, token means).
    """
    A = advantages.unsqueeze(1).expand_as(logps)[mask]  # (tokens,)
    logps, old_logps = logps[mask], old_logps[mask]  # padding is dropped first: a NaN there can reach no gradient
    ratio = (logps - old_logps).clamp(-20, 20).exp()
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    kl = torch.zeros_like(loss)
    if ref_logps is not None:
        d = (ref_logps[mask] - logps).clamp(-20, 20)
        kl = d.exp() - d - 1
        loss = loss + beta * kl
    low, high = (ratio < 1 - clip) & (A < 0), (ratio > 1 + clip) & (A > 0)
    stats = {"kl": kl, "ratio": ratio, "clip_ratio/low_mean": low.float(), "clip_ratio/high_mean": high.float()}
    stats = {name: value.detach().mean().item() if len(value) else 0.0 for name, value in stats.items()}
    return loss.sum() / max(denominator if denominator is not None else len(loss), 1), stats


def localization(attention, region):
    """How well one map of attention finds the region. Chance for each stands in brackets.

    Args: attention (N,), region (N,) bool. Returns floats: `auroc`, the probability that a cell inside gets more than
    one outside, ties counting half (0.5; NaN if the region is the whole image); `mass_over_area`, rho (1);
    `pointing`, whether the largest cell lies inside, shared between equal ones (the region's share of the image);
    `tas`, the paper's Target Attention Score (1 + r_v) / 2 (0.5); `image_mass`, the total attention to the image.
    """
    selected = torch.ones(1, 1, dtype=torch.bool, device=attention.device)
    inside, outside = attention[region].unsqueeze(1), attention[~region].unsqueeze(0)
    wins = (inside > outside).float() + 0.5 * (inside == outside).float()  # (R, N - R)
    rho = attention_ratio(attention[None, None], region, selected)
    return {
        "auroc": wins.mean().item(),
        "mass_over_area": rho.item(),
        "pointing": region[attention == attention.max()].float().mean().item(),
        "tas": ((1 + torch.tanh(rho.log())) / 2).item(),
        "image_mass": attention.sum().item(),
    }
