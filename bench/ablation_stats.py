"""Rows, means and tests of the results of `ablation.py`."""

from collections import defaultdict
from math import sqrt
from statistics import fmean as mean
from statistics import stdev

MAX_RATES = 9  # tried per arm


def half_width(values):
    """Half of the 95 % confidence interval of the mean (Student's t); None for a single value."""
    from scipy.stats import t

    n = len(values)
    return t.ppf(0.975, n - 1).item() * stdev(values) / sqrt(n) if n > 1 else None


def format_interval(value, half, sign=""):
    return f"{value:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")


def format_mean(values):
    """The mean with half of its interval, or with the lowest and the highest value if these differ
    so much that an interval would mislead."""
    half = half_width(values)
    if half is not None and half > 0.1 * max(1, mean(values)):
        return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    return format_interval(mean(values), half)


def paired_difference(ours, theirs, metric):
    """The difference of two arms, over the seeds that both have.
    Returns: its mean, half of its 95 % confidence interval, and p of the paired t-test."""
    from scipy.stats import ttest_rel

    seeds = sorted(set(ours) & set(theirs))
    a, b = [ours[s][metric] for s in seeds], [theirs[s][metric] for s in seeds]
    differences = [x - y for x, y in zip(a, b)]
    p = ttest_rel(a, b).pvalue.item() if len(seeds) > 1 else float("nan")
    return mean(differences), half_width(differences), p


def run_key(row):
    return tuple(row[name] for name in ("kind", "arm", "seed", "steps", "rate"))


def group_by_arm(results, kind="arm", steps=None):
    """{arm: {seed: row}} of the rows of a stage, ordered by the first run of each arm."""
    arms = defaultdict(dict)
    for row in sorted(results["runs"], key=lambda row: row["seed"]):
        if row["kind"] == kind and steps in (None, row["steps"]):
            arms[row["arm"]][row["seed"]] = row
    return arms


def measured(arm):
    """{seed: measurements} of {seed: row}."""
    return {seed: row["measured"] for seed, row in arm.items()}


def holm(p_values):
    """Holm's step-down correction of a family of p values."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def means(arm, metrics):
    """The cells of one arm, {seed: row}."""
    rows = measured(arm).values()
    return [format_mean([row[metric] for row in rows]) for metric in metrics]


# --- rates ---


def rate_scores(results, kind="rate"):
    """{arm: {rate: validation accuracy, averaged over the seeds}}."""
    scores = defaultdict(lambda: defaultdict(list))
    for row in results["runs"]:
        if row["kind"] == kind:
            scores[row["arm"]][row["rate"]].append(row["validation_accuracy"])
    return {arm: {r: mean(v) for r, v in sorted(by.items())} for arm, by in scores.items()}


def chosen_rates(results, kind="rate"):
    """{arm: the rate with the highest validation accuracy}."""
    return {arm: max(by, key=by.get) for arm, by in rate_scores(results, kind).items()}


def rates_beyond_the_edge(results, kind="rate"):
    """The rates to try next, a list of (arm, rate): half the lowest or twice the highest, for arms
    whose best rate is the lowest or the highest that was tried."""
    more, scores = [], rate_scores(results, kind)
    for arm, best in chosen_rates(results, kind).items():
        lowest, *_, highest = scores[arm]
        if len(scores[arm]) == MAX_RATES:
            continue
        more += [(arm, best / 2)] if best == lowest else []
        more += [(arm, best * 2)] if best == highest else []
    return more
