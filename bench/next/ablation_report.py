"""The tables and the pictures of `ablation.py`, made from its JSON alone."""

from collections import defaultdict
from statistics import fmean as mean

from bench.ablation_report import format_interval, format_mean, half_width, paired_difference
from bench.doc_tables import markdown_table
from bench.next.ablation_arms import (
    ACCURACY,
    ARMS,
    BOTH,
    LOSS,
    LOSS_AND_ACCURACY,
    MAIN_ARMS,
    SAYO,
    SHUFFLED_SCORES,
)

MAX_RATES = 9  # tried per arm
COLUMNS = {
    "greedy accuracy": "accuracy",
    "names a cell of the card": "on_card",
    "AUROC, own text": "auroc",
    "mass / area": "mass_over_area",
    "AUROC, ground-truth text": "ground_truth_auroc",
    "mass / area, ground-truth text": "ground_truth_mass_over_area",
    "AUROC, discriminative head": "discriminative_head_auroc",
}
COMPARISONS = [  # planned before the study: (ours, theirs, metric)
    *((SAYO, other, "accuracy") for other in ARMS if other != SAYO),
    (BOTH, ACCURACY, "accuracy"),
    (LOSS_AND_ACCURACY, ACCURACY, "accuracy"),
    (LOSS, SHUFFLED_SCORES, "ground_truth_auroc"),
    (SAYO, SHUFFLED_SCORES, "ground_truth_auroc"),
]
POINTS_LOST = 0.2  # accuracy below its best: a collapse


# --- rates ---


def rate_scores(results):
    """{arm: {rate: validation accuracy, averaged over the seeds}}."""
    scores = defaultdict(lambda: defaultdict(list))
    for row in results["runs"]:
        if row["kind"] == "rate":
            scores[row["arm"]][row["rate"]].append(row["validation_accuracy"])
    return {arm: {r: mean(v) for r, v in sorted(by.items())} for arm, by in scores.items()}


def chosen_rates(results):
    """{arm: the rate with the highest validation accuracy}."""
    return {arm: max(by, key=by.get) for arm, by in rate_scores(results).items()}


def rates_beyond_the_edge(results):
    """The rates to try next, a list of (arm, rate): half the lowest or twice the highest, for arms
    whose best rate is the lowest or the highest that was tried."""
    more, scores = [], rate_scores(results)
    for arm, best in chosen_rates(results).items():
        lowest, *_, highest = scores[arm]
        if len(scores[arm]) == MAX_RATES:
            continue
        more += [(arm, best / 2)] if best == lowest else []
        more += [(arm, best * 2)] if best == highest else []
    return more


def rate_table(results):
    scores, chosen = rate_scores(results), chosen_rates(results)
    rates = sorted({rate for by in scores.values() for rate in by})
    rows = []
    for arm, by in scores.items():
        cells = [f"{by[rate]:.3f}" if rate in by else "" for rate in rates]
        cells = [f"**{c}**" if r == chosen[arm] else c for r, c in zip(rates, cells)]
        rows.append([arm, *cells])
    return markdown_table(["arm", *(f"{rate:.1e}" for rate in rates)], rows)


# --- statistics ---


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


# --- tables ---


def means(arm, metrics):
    """The cells of one arm, {seed: row}."""
    rows = measured(arm).values()
    return [format_mean([row[metric] for row in rows]) for metric in metrics]


def headline_table(results, kinds=("arm",), order=None):
    """Arms with the metrics that matter most."""
    arms = {}
    for kind in kinds:
        arms |= group_by_arm(results, kind)
    shown = [name for name in order or arms if name in arms]
    rows = [[f"{name} ({len(arms[name])})", *means(arms[name], COLUMNS.values())] for name in shown]
    return markdown_table(["arm (seeds)", *COLUMNS], rows)


def comparison_table(results):
    """The planned comparisons, paired by seed, with p corrected for their number."""
    arms = {name: measured(arm) for name, arm in group_by_arm(results).items()}
    planned = [(a, b, m) for a, b, m in COMPARISONS if a in arms and b in arms]
    found = [paired_difference(arms[a], arms[b], m) for a, b, m in planned]
    corrected = holm([p for *_, p in found])
    names = {"accuracy": "greedy accuracy", "ground_truth_auroc": "AUROC, ground-truth text"}
    rows = []
    for (ours, theirs, metric), (difference, half, p), p_holm in zip(planned, found, corrected):
        cells = [format_interval(difference, half, sign="+"), format_p(p), format_p(p_holm)]
        rows.append([f"{ours} minus {theirs}", names[metric], *cells])
    return markdown_table(["difference", "metric", "mean", "p", "p, Holm"], rows)


def format_p(p):
    return f"{p:.4f}" if p >= 1e-4 else "< 0.0001"


def naming_and_reading(base, arm):
    """How much of the gain in accuracy comes from naming a cell of the card more often, and how
    much from being right more often given the name. The two parts add up to the gain: each is
    weighted by the average of before and after.
    Args: two dicts of measurements. Returns: (gain, naming, reading)."""

    def part(row):
        return row["on_card"], row["accuracy_if_on_card"], row["accuracy_if_not_on_card"]

    (n0, on0, off0), (n1, on1, off1) = part(base), part(arm)
    n = (n0 + n1) / 2
    naming = (n1 - n0) * ((on0 - off0) + (on1 - off1)) / 2
    reading = n * (on1 - on0) + (1 - n) * (off1 - off0)
    return arm["accuracy"] - base["accuracy"], naming, reading


def mediation_table(results, shown):
    arms, rows = group_by_arm(results), []
    (base,) = measured(arms["base"]).values()
    for name in shown:
        parts = [naming_and_reading(base, row) for row in measured(arms[name]).values()]
        cells = [format_interval(mean(v), half_width(v), sign="+") for v in zip(*parts)]
        rest = ("on_card", "accuracy_if_on_card", "accuracy_if_not_on_card")
        rows.append([name, *means(arms[name], rest), *cells])
    names = "names the card", "right if so", "right if not", "gain", "by naming", "by reading"
    rows.insert(0, ["base", *means(arms["base"], rest), "", "", ""])
    return markdown_table(["arm", *names], rows)


def looks_table(results, shown):
    """The early and the late look of two heads, and the accuracy of each combination."""
    arms, rows = group_by_arm(results), []
    for name in shown:
        row = [
            name,
            *means(arms[name], ["early_look", "early_look_if_right", "early_look_if_wrong"]),
        ]
        for cell in ("on_on", "on_off", "off_on", "off_off"):
            share = mean(m[f"looks_{cell}"] for m in measured(arms[name]).values())
            right = mean(m[f"accuracy_looks_{cell}"] for m in measured(arms[name]).values())
            row.append(f"{share:.3f} ({right:.2f})")
        rows.append(row)
    looks = "on, on", "on, off", "off, on", "off, off"
    return markdown_table(["arm", "early look on", "if right", "if wrong", *looks], rows)


def curve(row, metric="accuracy"):
    return [point[metric] for point in row["curve"]]


def collapse_step(row, lost=POINTS_LOST):
    """The first step at which a run's validation accuracy is `lost` below its best so far, if it
    never recovers to within half of that; else None."""
    best = 0.0
    values = curve(row)
    for i, point in enumerate(row["curve"]):
        best = max(best, point["accuracy"])
        if best - point["accuracy"] >= lost and best - max(values[i:]) >= lost / 2:
            return point["step"]
    return None


def length_table(results):
    """Accuracy of the main arms after more steps."""
    rows = []
    for name in MAIN_ARMS:
        row = [name]
        for kind, steps in (("arm", 60), ("length", 120), ("length", 180), ("length", 300)):
            arm = {
                s: r for s, r in group_by_arm(results, kind, steps).get(name, {}).items() if s < 5
            }
            values = [r["measured"]["accuracy"] for r in arm.values()]
            lost = sum(collapse_step(r) is not None for r in arm.values())
            worst = f", lowest {min(values):.3f}, {lost} of {len(values)} collapsed"
            row.append(format_mean(values) + worst if values else "")
        rows.append(row)
    return markdown_table(["arm", *(f"{n} steps" for n in (60, 120, 180, 300))], rows)


def remedy_table(results):
    """Validation accuracy of every remedy after 300 steps, and its best during training."""
    arms = {SAYO: group_by_arm(results, "length", 300)[SAYO]} | group_by_arm(results, "remedy")
    rows = []
    for name, arm in arms.items():
        last = [curve(row)[-1] for row in arm.values()]
        lost = sum(collapse_step(row) is not None for row in arm.values())
        best = [max(curve(row)) for row in arm.values()]
        cells = [format_mean(best), format_mean(last), f"{min(last):.3f}", f"{lost} of {len(arm)}"]
        rows.append([f"{name} ({len(arm)})", *cells])
    header = ["remedy (seeds)", "best on the way", "after 300 steps", "lowest seed", "collapsed"]
    return markdown_table(header, rows)


def noise_table(results):
    arms = group_by_arm(results, "noise")
    rows = [[name, *means(arm, ["accuracy", "on_card", "auroc"])] for name, arm in arms.items()]
    return markdown_table(["arm", "greedy accuracy", "names the card", "AUROC, own text"], rows)


def summary(results):
    """The tables of the stages that have results, for the terminal."""
    stages, shown = {row["kind"] for row in results["runs"]}, list(group_by_arm(results))
    parts = [rate_table(results)] if "rate" in stages else []
    if len(shown) > 1:
        parts += [headline_table(results), comparison_table(results)]
        trained = [name for name in shown if name != "base"]
        parts += [mediation_table(results, trained), looks_table(results, shown)]
    parts += [length_table(results)] if "length" in stages else []
    parts += [remedy_table(results)] if "remedy" in stages else []
    parts += [noise_table(results)] if "noise" in stages else []
    parts += [headline_table(results, ["variant"])] if "variant" in stages else []
    return "\n\n".join(parts)
