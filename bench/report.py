"""Tables and picture of `ablation.py`, from its JSON alone."""

import os
import platform
from collections import defaultdict
from importlib.metadata import version
from math import isnan, sqrt
from pathlib import Path
from statistics import fmean as mean
from statistics import stdev

import torch

ROOT = Path(__file__).parent.parent
HEADLINE = {  # column -> metric
    "greedy accuracy": "accuracy",
    "right place named": "place",
    "AUROC, own text": "auroc",
    "mass / area": "mass_over_area",
    "AUROC, fixed text": "fixed_auroc",
    "one head's AUROC": "telling_auroc",
}


def machine():
    """Where numbers come from: processor, cores, card, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "bitsandbytes", "peft")
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), **card,
            "python": platform.python_version(), **{name: version(name) for name in packages}}  # fmt: skip


def best_rate(results):
    """The learning rate whose validation accuracy, averaged over the arms tried, is highest."""
    found = defaultdict(list)
    for row in results["runs"]:
        if row["kind"] == "choice":
            found[row["arm"].split()[0]].append(row["validation_accuracy"])
    return max(found, key=lambda rate: mean(found[rate]))


def by_arm(results, kind="arm"):
    """{arm: {seed: what was measured}}, in the order of the first rows."""
    found = defaultdict(dict)
    for row in sorted(results["runs"], key=lambda row: row["seed"]):
        if row["kind"] == kind:
            found[row["arm"]][row["seed"]] = row["measured"]
    return found


def half_width(values):
    """Half of the 95 % interval of the mean, by Student's t over the seeds; None for one value."""
    from scipy.stats import t

    n = len(values)
    return t.ppf(0.975, n - 1).item() * stdev(values) / sqrt(n) if n > 1 else None


def cell(values, digits=3):
    half = half_width(values)
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def paired(ours, theirs, metric):
    """The difference of two arms over the seeds they share: mean, half of its 95 % interval, p of the paired t-test."""
    from scipy.stats import ttest_rel

    seeds = sorted(set(ours) & set(theirs))
    a, b = [ours[s][metric] for s in seeds], [theirs[s][metric] for s in seeds]
    differences = [x - y for x, y in zip(a, b)]
    return mean(differences), half_width(differences), ttest_rel(a, b).pvalue.item() if len(seeds) > 1 else float("nan")


def markdown(head, rows):
    """A Markdown table, its columns padded to be read as text too."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def headline(results, order):
    """Every arm by the metrics that matter most."""
    arms = by_arm(results) | by_arm(results, "variant")
    rows = [[f"{name} ({len(arms[name])})", *(cell([m[key] for m in arms[name].values()]) for key in HEADLINE.values())]
            for name in order if name in arms]  # fmt: skip
    return markdown(["arm (seeds)", *HEADLINE], rows)


def comparisons(results, ours, others):
    """`ours` less each of `others`, paired by seed."""
    arms, rows = by_arm(results), []
    for other in others:
        if other in arms and ours in arms:
            row = [other]
            for metric in ("accuracy", "auroc"):
                difference, half, p = paired(arms[ours], arms[other], metric)
                chance = "-" if isnan(p) else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"
                row += [f"{difference:+.3f}" + (f" ± {half:.3f}" if half is not None else ""), chance]
            rows.append(row)
    return markdown([f"{ours}, less", "greedy accuracy", "p", "AUROC, own text", "p"], rows)


def everything(results, kind, order):
    """All that was measured: a metric a row, an arm a column."""
    found = by_arm(results) | by_arm(results, "variant")
    order = ["base", *order] if kind == "arm" else [order[0], *by_arm(results, "variant")]
    arms = {name: found[name] for name in order if name in found}
    metrics = [*list(arms.values())[-1].values()][0]  # variants have fewer
    rows = [[m, *(cell([values[m] for values in seeds.values()]) for seeds in arms.values())] for m in metrics]
    return markdown(["", *arms], rows)


def tables(results, ours, others):
    """What the terminal shows, and the README."""
    arms = [*dict.fromkeys(["base", ours, *others])]
    parts = [headline(results, arms), comparisons(results, ours, others)]
    if variants := by_arm(results, "variant"):
        parts.insert(1, headline(results, [ours, *variants]))
    return "\n\n".join(parts)


def insert(path, name, text):
    """Put `text` between the file's comments <!-- name --> and <!-- end name -->."""
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- end {name} -->{rest.split(f'<!-- end {name} -->')[1]}")


def publish(results, ours, others):
    """The README's tables and picture, and the long tables of bench/README.md."""
    insert(ROOT / "README.md", "ablation", tables(results, ours, others))
    insert(ROOT / "bench" / "README.md", "arms", everything(results, "arm", [ours, *others]))
    insert(ROOT / "bench" / "README.md", "variants", everything(results, "variant", [ours, *others]))
    picture(results, [ours, *others], ROOT / "docs" / "ablation.png")


def picture(results, order, path):
    """Left: test accuracy, a dot a seed and the mean with its interval. Right: accuracy of the samples in training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = by_arm(results)
    order = [name for name in order if name in arms]
    colors = dict(zip(order, ["#0072b2", "#009e73", "#56b4e9", "#999999", "#d55e00", "#e69f00", "#cc79a7"]))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1.15, 1), layout="constrained")
    base = mean(m["accuracy"] for m in arms["base"].values())
    left.axvline(base, color="black", linestyle=":")
    left.text(base, -0.65, " base", va="center")
    for y, name in enumerate(order):
        values = [m["accuracy"] for m in arms[name].values()]
        left.errorbar(mean(values), y, xerr=half_width(values), fmt="|", ms=14, color=colors[name], capsize=3)
        left.plot(values, [y] * len(values), "o", color=colors[name], alpha=0.4, mec="none")
        curves = [row["curve"]["rewards/accuracy/mean"] for row in results["runs"]
                  if row["arm"] == name and row["kind"] == "arm"]  # fmt: skip
        line = [mean(values) for values in zip(*curves)]
        smooth = [mean(line[max(0, i - 4) : i + 1]) for i in range(len(line))]
        right.plot(range(1, len(line) + 1), smooth, color=colors[name], linewidth=2)
    left.set_yticks(range(len(order)), order)
    left.set_ylim(len(order) - 0.5, -1)
    left.set_xlabel("greedy accuracy on 1,000 test scenes; mean and 95 % interval over seeds")
    right.set_xlabel("step; colours as on the left")
    right.set_ylabel("accuracy of the samples, last 5 steps")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
