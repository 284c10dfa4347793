"""Warnings about suspicious metrics of a training step."""

from itertools import accumulate

from tqdm import tqdm

WINDOW = 128  # questions: the share of right samples is averaged over the steps that have so many
DECLINE = 0.1  # of that average below its best: an alarm; not yet judged on real collapses

ALARMS = {  # metric -> (threshold, what it means)
    "frac_reward_zero_std": (
        0.9,
        "all completions of a question get equal reward, so there is nothing to learn",
    ),
    "completions/seq_rep_3": (0.3, "completions repeat the same words"),
    "completions/unclosed_tags": (0.3, "completions open <answer> without closing it"),
    "completions/clipped_ratio": (0.5, "most completions are cut off at --max_completion_length"),
}


def alarms(row):
    """The signs of reward hacks and dead signals in a row of metrics.jsonl, {metric: message}."""
    return {
        name: f"{name} {row[name]:.2f}: {why}"
        for name, (minimum, why) in ALARMS.items()
        if row[name] >= minimum
    }


def decline(rows, prompts_per_step):
    """Whether answers get worse during training, at the last of these steps.

    Args: rows of metrics.jsonl. Returns: (best, recent) share of right samples, both means over
    steps with WINDOW questions, if the recent one is DECLINE lower; else None.
    """
    size = -(-WINDOW // prompts_per_step)
    sums = [0.0, *accumulate(row.get("rewards/accuracy/mean") or 0.0 for row in rows)]
    means = [(b - a) / size for a, b in zip(sums, sums[size:])]
    if len(means) <= size or max(means) - means[-1] < DECLINE - 1e-9:
        return None
    return max(means), means[-1]


def first_decline(rows, prompts_per_step):
    """The step of the first `decline`, or None."""
    steps = range(1, len(rows) + 1)
    return next((step for step in steps if decline(rows[:step], prompts_per_step)), None)


def print_alarms(rows, prompts_per_step, warned):
    """Print each alarm once per run. Args: rows of metrics.jsonl so far; warned, the set of metrics
    already reported."""
    found = alarms(rows[-1])
    if "decline" not in warned and (worse := decline(rows, prompts_per_step)):
        found["decline"] = (
            f"answers get worse: {worse[1]:.0%} of the recent samples are right, {worse[0]:.0%} "
            f"were at best; the rewards may be met without right answers, see --keep_best"
        )
    for name, message in found.items():
        if name not in warned:
            tqdm.write(f"step {rows[-1]['step']}: {message}")
        warned.add(name)
