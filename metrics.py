"""The metrics of a training step, and alarms about them. docs/logging.md explains each metric."""

import math
from collections import deque
from statistics import fmean

import torch
from tqdm import tqdm

import reward
from config import InputError

MAX_SKIPPED = 10  # steps in a row in which an update was skipped
RECENT_QUESTIONS = 128  # over which the share of right samples is averaged
DECLINE = 0.15  # of that share, from its best
ALARMS = {  # metric -> (threshold, what it means)
    "frac_reward_zero_std": (
        0.9,
        "all completions of a question get equal reward, so there is nothing to learn",
    ),
    "completions/seq_rep_3": (0.3, "completions repeat the same words"),
    "completions/unclosed_tags": (0.3, "completions open <answer> without closing it"),
    "completions/clipped_ratio": (0.5, "most completions are cut off at --max_completion_length"),
}


def sample_rows(groups):
    """The rows of samples.jsonl, one per completion."""
    rows = []
    for group in groups:
        example = group.example
        for i, text in enumerate(group.completions.texts):
            row = {"id": example.id, "question": example.question, "answer": example.answer}
            row |= {"text": text, "advantage": group.advantages[i].item()}
            rows.append(row | {name: value[i].item() for name, value in group.rewards.items()})
    return rows


def attention_metrics(entropy, mask, inputs):
    """A group's metrics of entropy (G, C) and attention, averaged over the group.

    Args: mask (G, C) bool, the real tokens; inputs, the group's RewardInputs.
    """
    attention, region, selected = inputs.attention, inputs.region, inputs.selected
    maps = [a[s].mean(0) for a, s in zip(attention, selected)]  # G of (N,)
    auroc = torch.tensor([reward.localization(mean, region)["auroc"] for mean in maps])
    auroc = torch.where(torch.stack(maps).isfinite().all(1), auroc.nan_to_num(0.5), math.nan)
    log_rho = reward.attention_ratio(attention, region, selected).log()  # (G,)
    return {
        "entropy": entropy[mask].mean().item(),
        "attention/auroc": auroc.mean().item(),
        "attention/log_rho": log_rho.mean().item(),
        "attention/image_mass": attention.sum(-1)[mask].mean().item(),
    }


def step_metrics(groups, updates):
    """One row of metrics.jsonl. Metrics that TRL also logs have TRL's names.

    Args: groups, the Groups of a step; updates, a dict per optimizer update with `stats` (a dict
    per group: loss, tokens and the stats of `grpo_loss`), `grad_norm` and `finite`.
    """
    stats = [group for update in updates for group in update["stats"]]
    total = torch.stack([g.total_reward for g in groups])  # (groups, G)
    row = {
        "loss": sum(x["loss"] for x in stats) / len(updates),
        "grad_norm": fmean(u["grad_norm"] for u in updates),
        "skipped_updates": sum(not u["finite"] for u in updates),
        "reward": total.mean().item(),
        "reward_std": total.std(1).mean().item(),
        "frac_reward_zero_std": fmean(not g.in_loss for g in groups),
    }
    row |= {name: fmean(g.metrics[name] for g in groups) for name in groups[0].metrics}
    row |= completion_metrics(groups)
    tokens = max(1, sum(x["tokens"] for x in stats))  # that were trained on
    for name in ("kl", "ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        row[name] = sum(x[name] * x["tokens"] for x in stats) / tokens
    rewards = {n: torch.stack([g.rewards[n] for g in groups]) for n in groups[0].rewards}
    for name, value in rewards.items():  # (groups, G)
        row[f"rewards/{name}/mean"] = value.mean().item()
        row[f"rewards/{name}/std"] = value.std(1).mean().item()
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float()
    for name, other in (("accuracy", rewards["accuracy"].flatten()), ("length", lengths)):
        pair = torch.stack([rewards["attention"].flatten(), other])
        row[f"attention/corr_{name}"] = torch.corrcoef(pair)[0, 1].nan_to_num().item()
    return row


def completion_metrics(groups):
    """Completion lengths, and signs of reward hacking in the text."""
    texts = [text for g in groups for text in g.completions.texts]
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float()
    finished = torch.cat([g.completions.finished for g in groups])
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - finished.float().mean().item(),
        "completions/seq_rep_3": fmean(seq_rep_3(t) for t in texts),
        "completions/unclosed_tags": fmean(
            t.count("<answer>") > t.count("</answer>") for t in texts
        ),
        "num_tokens": int(lengths.sum()),
    }


def seq_rep_3(text):
    """The fraction of word triples that repeat an earlier one (Welleck et al. 2020), a sign of
    filler and endless lists. Float in [0, 1)."""
    words = text.casefold().split()
    triples = list(zip(words, words[1:], words[2:]))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


class Alarms:
    """Prints each sign of a bad run the first time it occurs, and every skipped update. It only
    uses logged rows, so a resumed run raises the same alarms. Args: cfg, a Config; history, the
    rows before a resume."""

    def __init__(self, cfg, history):
        self.printed = set()  # names of alarms
        self.skipped, self.most_skipped = 0, min(MAX_SKIPPED, cfg.max_steps)  # steps in a row
        # Shares of right samples, one per step: of the RECENT_QUESTIONS, for the alarm, and of the
        # steps since the last checkpoint, for --keep_best.
        self.recent = deque(maxlen=math.ceil(RECENT_QUESTIONS / cfg.prompts_per_step))
        self.best_recent = 0.0
        self.since_save, self.best_save, self.save_steps = [], -1.0, cfg.save_steps
        self.advice = "best/ is kept" if cfg.keep_best else "stop here, or use --keep_best"
        for row in history:
            self.printed |= self.add(row).keys()

    def check(self, row, step):
        """Print the new alarms of a step. Raises: InputError after many steps with skipped updates,
        because loss or gradient were not finite."""
        for name, message in self.add(row).items():
            if name not in self.printed:
                tqdm.write(f"step {step}: {message}")
            self.printed.add(name)
        if self.skipped:
            tqdm.write(f"step {step}: update skipped: loss or gradient is not finite")
        if self.skipped >= self.most_skipped:
            advice = "lower --learning_rate or try --no-load_in_4bit, with a new --output_dir"
            problem = f"loss or gradient was not finite in {self.skipped} steps in a row"
            raise InputError(f"stopped after step {step}: {problem}; {advice}")

    def add(self, row):
        """Add the next row of metrics.jsonl. Returns: its alarms, {name: message}."""
        found = {
            name: f"{name} {row[name]:.2f}: {why}"
            for name, (minimum, why) in ALARMS.items()
            if row[name] >= minimum
        }
        self.skipped = self.skipped + 1 if row["skipped_updates"] else 0
        right = row["rewards/accuracy/mean"]
        if len(self.since_save) == self.save_steps:
            self.best_save = max(self.best_save, fmean(self.since_save))
            self.since_save = []
        self.since_save.append(right)
        self.recent.append(right)
        if len(self.recent) == self.recent.maxlen:
            now = fmean(self.recent)
            best = self.best_recent = max(self.best_recent, now)
            if best - now >= DECLINE:
                why = f"{now:.0%} of the recent samples are right, down from {best:.0%}"
                found["accuracy"] = f"answers get worse: {why}; {self.advice}"
        return found

    def forget_best(self):
        """Restart the search for the best steps at the last checkpoint."""
        self.best_save = -1.0
        if len(self.since_save) == self.save_steps:
            self.since_save = []

    def is_best(self):
        """Whether the samples of the last `save_steps` steps were right at least as often as those
        of any earlier ones. Fewer steps, at the end of a run, only count if there were no others.
        """
        enough = len(self.since_save) == self.save_steps or self.best_save < 0
        return enough and fmean(self.since_save) >= self.best_save
