"""Warnings about suspicious metrics of a training step."""

from statistics import fmean

from tqdm import tqdm

from config import parse_weights

RIGHT_WINDOW = 128  # questions over which the share of right samples is averaged
DECLINE = 0.15  # of that share, from its best
CORRELATION_WINDOW = 64  # questions over which the correlation of r_v with being right is averaged
MIXED = 0.1, 0.9  # share of right samples in a step whose correlation counts
UNRELATED, EARLY_DECLINE = 0.25, 0.12  # below this correlation, this decline is enough
MISLEADING = -0.05  # a correlation below this needs no decline

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


def trend_alarms(rows, prompts_per_step, weights):
    """The signs that the reward leads away from right answers.

    - answers get worse: the share of right samples is DECLINE below its best, or EARLY_DECLINE if
      attention is rewarded, accuracy is not, and r_v hardly tells right samples from wrong ones.
    - attention misleads: such a reward is higher for wrong samples. This comes first if a reward is
      wrong from the start.

    Shares and correlations are means over the steps that have RIGHT_WINDOW and CORRELATION_WINDOW
    questions, which must have answers. docs/evidence.md says how many collapses they catch.

    Args: rows of metrics.jsonl; weights, {reward: weight}. Yields: (row number from 1, name of the
    alarm, message), for every row that has it.
    """
    many, few = (-(-n // prompts_per_step) for n in (RIGHT_WINDOW, CORRELATION_WINDOW))  # steps
    only_attention = weights.get("attention", 0) > 0 and not weights.get("accuracy")
    shares, correlations, best, correlation = [], [], 0.0, 1.0
    for number, row in enumerate(rows, 1):
        shares.append(row.get("rewards/accuracy/mean") or 0.0)
        known = row.get("attention/corr_accuracy") is not None
        if only_attention and known and MIXED[0] <= shares[-1] <= MIXED[1]:
            correlations.append(row["attention/corr_accuracy"])
            if len(correlations) >= few:
                correlation = fmean(correlations[-few:])
        if len(shares) >= many:
            recent = fmean(shares[-many:])
            best = max(best, recent)
            if best - recent >= (EARLY_DECLINE if correlation < UNRELATED else DECLINE) - 1e-9:
                why = f"{recent:.0%} of the recent samples are right, {best:.0%} were at best"
                advice = "stop here, or end runs with the best adapter (--keep_best)"
                yield number, "answers get worse", f"{why}; {advice}"
        if correlation < MISLEADING:
            why = f"right samples earn less attention reward (correlation {correlation:.2f})"
            advice = "check the boxes, or reward accuracy, too"
            yield number, "attention misleads", f"{why}; {advice}"


def print_alarms(rows, cfg, warned):
    """Print each alarm once per run. Args: rows of metrics.jsonl so far; warned, the set of alarms
    already printed."""
    found = alarms(rows[-1])
    weights = parse_weights(cfg.reward_weights)
    for number, name, message in trend_alarms(rows, cfg.prompts_per_step, weights):
        if number == len(rows):
            found[name] = f"{name}: {message}"
    for name, message in found.items():
        if name not in warned:
            tqdm.write(f"step {rows[-1]['step']}: {message}")
        warned.add(name)
