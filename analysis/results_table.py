"""The results table that a run prints. Imports only the standard library."""

import math
from statistics import fmean, stdev

PROPORTIONS = "correct", "early", "late"  # every value is 0 or 1
# The largest possible value of a metric, if it is not 1. The smallest is always 0.
LARGEST = {"mass_over_area": math.inf, "fixed_mass_over_area": math.inf, "length": math.inf}


def results_table(before, after):
    """The results before and after training as a text table.

    Args: before, after, lists of per-example results of `evaluate`.
    Returns: text with one line per metric: mean and 95 % confidence interval before and after
    training, and the chance level.
    """
    rows = list(table_rows(before, after).values())
    header = f"held-out examples: {len(before)}", "before", "after", "chance"
    width = max(25, 2 + max(len(cell) for row in rows for cell in row[1:3]))
    lines = [f"{row[0]:32}{row[1]:>{width}}{row[2]:>{width}}{row[3]:>8}" for row in [header, *rows]]
    if len(before) == 1:
        lines.append("no confidence interval for one example: use --eval_examples 2 or more")
    if any("-" in row for row in rows):
        lines.append("-: the AUROC is undefined if the region covers the whole image")
    return "\n".join([*lines, *looks_table(before, after)])


def table_rows(before, after):
    """The rows of the table. Returns: {metric: (title, before, after, chance)}, all text."""
    metrics = [  # title, key, chance
        ("greedy accuracy", "correct", ""),
        ("attention on the region, AUROC", "auroc", "0.500"),
        ("  with the next example's box", "permuted_auroc", "0.500"),
        ("  mass / area", "mass_over_area", "1.000"),
        ("  pointing game", "pointing", f"{fmean([result['area'] for result in before]):.3f}"),
        ("  TAS", "tas", "0.500"),
        ("the same on fixed text, AUROC", "fixed_auroc", "0.500"),
        ("  mass / area", "fixed_mass_over_area", "1.000"),
        *look_metrics(before, after),
        ("attention to the whole image", "image_mass", ""),
        ("answer length, tokens", "length", ""),
    ]
    rows = {}
    for title, key, chance in metrics:
        options = dict(proportion=key in PROPORTIONS, largest=LARGEST.get(key, 1.0))
        cells = [
            confidence_interval([result[key] for result in results], **options)
            for results in (before, after)
        ]
        rows[key] = title, *cells, chance
    return rows


def have_looks(*results):
    """Runs of earlier versions did not record early and late looks."""
    return all("early" in row for rows in results for row in rows)


def look_metrics(before, after):
    """The rows for early and late looks. Chance: how often they find the next example's region."""
    if not have_looks(before, after):
        return []
    chance = {name: fmean(r[f"permuted_{name}"] for r in before) for name in ("early", "late")}
    return [
        ("early look on the region", "early", f"{chance['early']:.3f}"),
        ("late look on the region", "late", f"{chance['late']:.3f}"),
    ]


def looks_table(before, after):
    """The 2 x 2 of early and late looks, as lines of text: for each combination, the number of
    answers and their accuracy; and how many wrong early looks are corrected."""
    if not have_looks(before, after):
        return []
    lines = ["", f"{'early look, late look':32}{'before':>25}{'after':>25}"]
    for early, late in ((1, 1), (0, 1), (1, 0), (0, 0)):
        title = ", ".join("on the region" if look else "off" for look in (early, late))
        cells = [count_looks(results, early, late) for results in (before, after)]
        lines.append(f"{title:32}{cells[0]:>25}{cells[1]:>25}")
    cells = [count_corrected(results) for results in (before, after)]
    return [*lines, f"{'wrong early looks corrected':32}{cells[0]:>25}{cells[1]:>25}"]


def count_looks(results, early, late):
    """The number of answers with these looks (0 or 1) and their accuracy, as text."""
    kept = [r["correct"] for r in results if (r["early"], r["late"]) == (early, late)]
    count = f"{len(kept)} answer{'s' * (len(kept) != 1)}"
    return f"{count}, {fmean(kept):.0%} right" if kept else count


def count_corrected(results):
    """How many of the answers that look elsewhere early look at the region late, as text."""
    late = [r["late"] for r in results if not r["early"]]
    return f"{sum(late):.0f} of {len(late)}"


def confidence_interval(values, proportion=False, largest=1.0):
    """The mean and its 95 % confidence interval as text, e.g. "0.523 [0.461, 0.584]".

    The interval is normal, mean +- 1.96 standard errors, unless it reaches an end of the possible
    range. Then it is Wilson's interval, which stays inside the range and has a nonzero width
    even if all values are equal. It uses the variance mean * (1 - mean), the largest possible for
    values in [0, 1], so it is never too narrow. Metrics without an upper bound are clipped at 0.

    Args: values, floats from 0 to `largest`, which is 1 or infinity; NaNs are ignored; proportion,
    true if every value is 0 or 1, always uses Wilson's interval.
    Returns: text; only the mean for a single value, "-" for no values.
    """
    values = [v for v in values if not math.isnan(v)]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    n, mean, z = len(values), fmean(values), 1.96
    half = z * stdev(values) / math.sqrt(n)
    low, high = mean - half, mean + half
    if proportion or (largest == 1 and not 0 < low <= high < 1):
        p = min(max(mean, 0.0), 1.0)  # rounding can push a mean above 1
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        low, high = center - half, center + half
    return f"{mean:.3f} [{max(0.0, low):.3f}, {min(largest, high):.3f}]"
