"""The metrics of a training step. docs/logging.md explains each of them."""

import math
import re
from statistics import fmean as mean

import torch

import reward


def json_row(row):
    """The row with NaN and infinity replaced by None, because JSON has neither. They occur in steps
    whose update was skipped."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def mean_rewards(metrics):
    """{name: mean} of every reward, for the progress bar."""
    return {name: metrics[f"rewards/{name}/mean"] for name in reward.REWARDS}


def sample_rows(group):
    """Yield a group's rows of samples.jsonl, one per completion."""
    example = group.example
    for i, text in enumerate(group.completions.texts):
        row = {"id": example.id, "question": example.question, "answer": example.answer}
        row |= {"text": text} | {name: value[i].item() for name, value in group.rewards.items()}
        yield row | {"advantage": group.advantages[i].item()}


def attention_metrics(entropy, mask, inputs):
    """A group's metrics of entropy (G, C) and attention, averaged over the group.

    Args: mask (G, C) bool, the real tokens; inputs, the group's RewardInputs.
    """
    attention, region, selected = inputs.attention, inputs.region, inputs.selected
    maps = [a[s].mean(0) for a, s in zip(attention, selected)]  # G of (N,)
    auroc = torch.tensor([reward.localization(map, region)["auroc"] for map in maps])
    auroc = torch.where(torch.stack(maps).isfinite().all(1).cpu(), auroc.nan_to_num(0.5), math.nan)
    log_rho = reward.attention_ratio(attention, region, selected).log()  # (G,)
    return {
        "entropy": entropy[mask].mean().item(),
        "attention/auroc": auroc.mean().item(),
        "attention/log_rho": log_rho.mean().item(),
        "attention/image_mass": attention.sum(-1)[mask].mean().item(),
    }


def step_metrics(groups, updates):
    """One row of metrics.jsonl. Metrics that TRL also logs have TRL's names.

    Args: groups, the Groups of a step; updates, a dict per optimizer update with `losses` (a dict
    per micro-batch: loss, tokens and the stats of `grpo_loss`), `grad_norm` and `finite`.
    """
    losses = [loss for update in updates for loss in update["losses"]]
    total = torch.stack([g.total_reward for g in groups])  # (groups, G)
    row = {
        "loss": sum(x["loss"] for x in losses) / len(updates),
        "grad_norm": mean([u["grad_norm"] for u in updates]),
        "skipped_updates": sum(not u["finite"] for u in updates),
        "reward": total.mean().item(),
        "reward_std": total.std(1).mean().item(),
        "frac_reward_zero_std": mean([g.zero_std for g in groups]),
    }
    row |= {name: mean([g.log[name] for g in groups]) for name in groups[0].log}
    row |= completion_metrics(groups)
    tokens = max(1, sum(x["tokens"] for x in losses))
    for name in ("kl", "ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        row[name] = (
            sum(x[name] * x["tokens"] for x in losses) / tokens
        )  # mean over tokens trained on
    rewards = {n: torch.stack([g.rewards[n] for g in groups]).cpu() for n in groups[0].rewards}
    for name, value in rewards.items():  # (groups, G)
        row[f"rewards/{name}/mean"] = value.mean().item()
        row[f"rewards/{name}/std"] = value.std(1).mean().item()
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float().cpu()
    for name, other in (("accuracy", rewards["accuracy"].flatten()), ("length", lengths)):
        pair = torch.stack([rewards["attention"].flatten(), other])
        row[f"attention/corr_{name}"] = torch.corrcoef(pair)[0, 1].nan_to_num().item()
    return row


def completion_metrics(groups):
    """Completion lengths, and signs of reward hacking in the text."""
    texts = [text for g in groups for text in g.completions.texts]
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float().cpu()
    finished = torch.cat([g.completions.finished for g in groups])
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - finished.float().mean().item(),
        "completions/repeated_sentences": mean([repeated_sentences(t) for t in texts]),
        "completions/seq_rep_3": mean([seq_rep_3(t) for t in texts]),
        "completions/unclosed_tags": mean([has_unclosed_tag(t) for t in texts]),
        "num_tokens": int(lengths.sum()),
    }


def repeated_sentences(text):
    """The fraction of sentences that repeat an earlier one, a sign of filler. Float in [0, 1)."""
    sentences = [s.strip() for s in re.split(r"[.!?]+(?:\s|$)|\n+", text.casefold()) if s.strip()]
    return 1 - len(set(sentences)) / len(sentences) if sentences else 0.0


def seq_rep_3(text):
    """The fraction of word triples that repeat an earlier one (Welleck et al. 2020). It detects
    endless lists, which have no sentences. Float in [0, 1)."""
    words = text.casefold().split()
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def has_unclosed_tag(text):
    return text.count("<answer>") > text.count("</answer>")
