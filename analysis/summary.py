"""The table that a run prints at its end. Only the standard library is imported here."""

import math
from statistics import fmean, stdev


def results_table(before, after):
    """The results before and after training as a text table.

    Args: before, after, lists of the per-example results of `evaluate`.
    Returns: a string, one line per metric: mean and 95 % confidence interval before and after, and
    the value expected by chance.
    """
    metrics = [  # title, key, chance
        ("greedy accuracy", "correct", ""),
        ("attention on the region, AUROC", "auroc", "0.500"),
        ("  held against another's box", "permuted_auroc", "0.500"),
        ("  mass / area", "mass_over_area", "1.000"),
        ("  pointing game", "pointing", f"{fmean([result['area'] for result in before]):.3f}"),
        ("  TAS", "tas", "0.500"),
        ("the same on fixed text, AUROC", "fixed_auroc", "0.500"),
        ("  mass / area", "fixed_mass_over_area", "1.000"),
        ("attention to the whole image", "image_mass", ""),
        ("tokens of an answer", "length", ""),
    ]
    header = f"held-out examples: {len(before)}"
    lines = [f"{header:32}{'before':>25}{'after':>25}{'chance':>8}"]
    for title, key, chance in metrics:
        cells = [
            confidence_interval([result[key] for result in results], proportion=key == "correct")
            for results in (before, after)
        ]
        lines.append(f"{title:32}{cells[0]:>25}{cells[1]:>25}{chance:>8}")
    return "\n".join(lines)


def confidence_interval(values, proportion=False):
    """The mean and its 95 % confidence interval as text, e.g. "0.523 [0.461, 0.584]".

    Args: values, floats; NaNs are ignored; proportion, true if every value is 0 or 1: the interval
    is then Wilson's, else the normal one. Returns: "-" for fewer than two values.
    """
    values = [v for v in values if not math.isnan(v)]
    if len(values) < 2:
        return "-"
    n, mean, z = len(values), fmean(values), 1.96
    if proportion:  # near 0 and 1 the normal interval would leave [0, 1]
        center = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    else:
        center, half = mean, z * stdev(values) / math.sqrt(n)
    return f"{mean:.3f} [{center - half:.3f}, {center + half:.3f}]"
