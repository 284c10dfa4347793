"""The tables and the picture of `ablation.py`, made from its JSON alone."""

from collections import defaultdict
from math import isnan, sqrt
from statistics import fmean as mean
from statistics import stdev

from bench.ablation_arms import ACCURACY, BOTH, ROLLED_BOX, SAYO, SHUFFLED_SCORES, TABLE_ORDER
from bench.doc_tables import ROOT, insert, markdown_table

README_ARMS = ["base", SAYO, ACCURACY, BOTH, ROLLED_BOX, SHUFFLED_SCORES]
README_COLUMNS = {  # column -> metric
    "greedy accuracy": "accuracy",
    "AUROC, own text": "auroc",
    "AUROC, ground-truth text": "ground_truth_auroc",
}
COLUMNS = {
    "greedy accuracy": "accuracy",
    "right place named": "right_place",
    "AUROC, own text": "auroc",
    "mass / area": "mass_over_area",
    "AUROC, ground-truth text": "ground_truth_auroc",
    "AUROC, discriminative head": "discriminative_head_auroc",
}
COLORS = ["#0072b2", "#009e73", "#56b4e9", "#999999", "#d55e00", "#e69f00", "#cc79a7"]


def best_learning_rate(results):
    """The learning rate with the highest validation accuracy, averaged over its arms."""
    accuracy = defaultdict(list)
    for row in results["runs"]:
        if row["kind"] == "learning rate":
            accuracy[row["arm"].split()[0]].append(row["validation_accuracy"])
    return max(accuracy, key=lambda rate: mean(accuracy[rate]))


def group_by_arm(results, kind="arm"):
    """{arm: {seed: metrics}}, ordered by the first run of each arm."""
    arms = defaultdict(dict)
    for row in sorted(results["runs"], key=lambda row: row["seed"]):
        if row["kind"] == kind:
            arms[row["arm"]][row["seed"]] = row["measured"]
    return arms


def half_width(values):
    """Half of the 95 % confidence interval of the mean (Student's t); None for a single value."""
    from scipy.stats import t

    n = len(values)
    return t.ppf(0.975, n - 1).item() * stdev(values) / sqrt(n) if n > 1 else None


def format_interval(value, half, sign=""):
    return f"{value:{sign}.3f}" + (f" ± {half:.3f}" if half is not None else "")


def format_mean(values):
    return format_interval(mean(values), half_width(values))


def paired_difference(ours, theirs, metric):
    """The difference of two arms, over the seeds that both have.
    Returns: its mean, half of its 95 % confidence interval, and p of the paired t-test."""
    from scipy.stats import ttest_rel

    seeds = sorted(set(ours) & set(theirs))
    a, b = [ours[s][metric] for s in seeds], [theirs[s][metric] for s in seeds]
    differences = [x - y for x, y in zip(a, b)]
    p = ttest_rel(a, b).pvalue.item() if len(seeds) > 1 else float("nan")
    return mean(differences), half_width(differences), p


def means(arm, metrics):
    """The cells of one arm, {seed: metrics}."""
    return [format_mean([seed[metric] for seed in arm.values()]) for metric in metrics]


def headline_table(results, order):
    """Arms and variants with the metrics that matter most."""
    arms = group_by_arm(results) | group_by_arm(results, "variant")
    shown = [name for name in order if name in arms]
    rows = [[f"{name} ({len(arms[name])})", *means(arms[name], COLUMNS.values())] for name in shown]
    return markdown_table(["arm (seeds)", *COLUMNS], rows)


def comparison_table(results, ours, others):
    """The arm `ours` minus each of the `others`, paired by seed."""
    arms, rows = group_by_arm(results), []
    for other in others:
        if other in arms and ours in arms:
            row = [other]
            for metric in ("accuracy", "auroc"):
                difference, half, p = paired_difference(arms[ours], arms[other], metric)
                significance = "-" if isnan(p) else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"
                row += [format_interval(difference, half, sign="+"), significance]
            rows.append(row)
    header = [f"{ours} minus ...", "greedy accuracy", "p", "AUROC, own text", "p"]
    return markdown_table(header, rows)


def full_table(results, kind):
    """Everything that was measured on the arms or on the variants, one row per metric."""
    arms = group_by_arm(results) | group_by_arm(results, "variant")
    if kind == "arm":
        order = ["base", *TABLE_ORDER]
    else:
        order = [SAYO, *group_by_arm(results, "variant")]
    arms = {name: arms[name] for name in order if name in arms}
    metrics = next(iter(list(arms.values())[-1].values()))  # variants have fewer than arms
    rows = [[metric, *(means(arm, [metric])[0] for arm in arms.values())] for metric in metrics]
    return markdown_table(["", *arms], rows)


def summary(results):
    """The tables for the terminal; docs/evidence.md begins with them."""
    parts = [
        headline_table(results, ["base", *TABLE_ORDER]),
        comparison_table(results, SAYO, TABLE_ORDER[1:]),
    ]
    if variants := group_by_arm(results, "variant"):
        parts.insert(1, headline_table(results, [SAYO, *variants]))
    return "\n\n".join(parts)


def doc_tables(results):
    """{name of the place in docs/evidence.md: Markdown}."""
    variants = [SAYO, *group_by_arm(results, "variant")]
    return {
        "ablation arms": headline_table(results, ["base", *TABLE_ORDER]),
        "ablation comparisons": comparison_table(results, SAYO, TABLE_ORDER[1:]),
        "ablation both minus accuracy": comparison_table(results, BOTH, [ACCURACY]),
        "ablation variants": headline_table(results, variants),
        "ablation arms in full": full_table(results, "arm"),
        "ablation variants in full": full_table(results, "variant"),
    }


def readme_table(results):
    """The table of README.md."""
    arms = group_by_arm(results)
    rows = [[name, *means(arms[name], README_COLUMNS.values())] for name in README_ARMS]
    return markdown_table(["reward", *README_COLUMNS], rows)


def write_docs(results):
    """Write the tables of docs/evidence.md, the picture docs/ablation.png and README's table."""
    for name, text in doc_tables(results).items():
        insert(ROOT / "docs" / "evidence.md", name, text)
    plot_arms(results, ROOT / "docs" / "ablation.png")
    insert(ROOT / "README.md", "results", readme_table(results))


def plot_arms(results, path):
    """Plot the test accuracy on the left (a dot per seed, the mean and its interval), and the
    accuracy of the completions sampled in training on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = group_by_arm(results)
    order = [name for name in TABLE_ORDER if name in arms]
    colors = dict(zip(order, COLORS))
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 3.8), width_ratios=(1.15, 1), layout="constrained"
    )
    base = mean(m["accuracy"] for m in arms["base"].values())
    left.axvline(base, color="black", linestyle=":")
    left.text(base, -0.65, " base", va="center")
    for y, name in enumerate(order):
        values, color = [m["accuracy"] for m in arms[name].values()], colors[name]
        interval = dict(xerr=half_width(values), capsize=3)
        left.errorbar(mean(values), y, fmt="|", ms=14, color=color, **interval)
        left.plot(values, [y] * len(values), "o", color=color, alpha=0.4, mec="none")
        line = training_accuracy(results, name)
        right.plot(range(1, len(line) + 1), line, color=color, linewidth=2)
    left.set_yticks(range(len(order)), order)
    left.set_ylim(len(order) - 0.5, -1)
    left.set_xlabel("greedy accuracy on 1,000 test scenes, with 95 % interval")
    right.set_xlabel("step; colors as on the left")
    right.set_ylabel("accuracy of the samples, last 5 steps")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def training_accuracy(results, arm):
    """The accuracy of the sampled completions at each training step, averaged over the seeds and
    the last five steps."""
    rows = [row for row in results["runs"] if row["arm"] == arm and row["kind"] == "arm"]
    curves = [row["curve"]["rewards/accuracy/mean"] for row in rows]
    line = [mean(values) for values in zip(*curves)]
    return [mean(line[max(0, i - 4) : i + 1]) for i in range(len(line))]
