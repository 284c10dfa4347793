"""The pictures of `ablation.py`, made from its JSON alone."""

import re
from statistics import fmean as mean

from bench.ablation_arms import ACCURACY, BOTH, BOTH_SLOWER, MAIN_ARMS, PLACE, SAYO
from bench.ablation_collapse import curve
from bench.ablation_stats import group_by_arm, half_width, measured

COLORS = {
    SAYO: "#0072b2",
    BOTH: "#009e73",
    BOTH_SLOWER: "#8fd3b6",
    ACCURACY: "#d55e00",
    PLACE: "#cc79a7",
}


def axes(width, count):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(width, 3.8), layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_arms(results, path):
    """Left: the test accuracy of each arm after 60 steps (a dot per seed, the mean and its
    interval). Right: validation accuracy during 300 steps, a line per seed."""
    figure, (left, right) = axes(12, 2)
    arms = group_by_arm(results)
    (base,) = (m["accuracy"] for m in measured(arms.pop("base")).values())
    left.axvline(base, color="black", linestyle=":")
    left.text(base, -0.75, " base", va="center")
    for y, (name, arm) in enumerate(arms.items()):
        values, color = [m["accuracy"] for m in measured(arm).values()], COLORS.get(name, "#777777")
        interval = dict(xerr=half_width(values), capsize=3)
        left.errorbar(mean(values), y, fmt="|", ms=14, color=color, **interval)
        left.plot(values, [y] * len(values), "o", color=color, alpha=0.4, mec="none")
    left.set_yticks(range(len(arms)), list(arms))
    left.set_ylim(len(arms) - 0.5, -1.2)
    left.set_xlim(0, 1)
    left.set_xlabel("greedy accuracy on 1,000 test questions, with 95 % interval")
    for name, arm in group_by_arm(results, "length", 300).items():
        for seed, row in arm.items():
            steps = [point["step"] for point in row["curve"]]
            label = None if seed else name
            right.plot(steps, curve(row), color=COLORS[name], alpha=0.7, label=label)
    right.set_xlabel("step of 300")
    right.set_ylabel("greedy accuracy, validation")
    place = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    right.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8, **place)
    figure.savefig(path, dpi=110)


def plot_noise(results, path):
    """Test accuracy against wrong labels and boxes, the number of questions, and the share of
    questions with a label. The whiskers are the lowest and the highest seed."""
    figure, panels = axes(12, 3)
    clean, noise = group_by_arm(results), group_by_arm(results, "noise")
    patterns = [  # x of the clean arm, x and name of the noisy arms
        ("questions with a wrong label or box, %", 0, r"(\d+)% of (?:labels|boxes).* wrong"),
        ("training questions", 480, r"(\d+) questions"),
        ("share of questions with a label, %", 100, r"(\d+)% of questions labeled"),
    ]
    for panel, (label, clean_x, pattern) in zip(panels, patterns):
        for arm in [*MAIN_ARMS, BOTH_SLOWER]:
            names = {name: re.fullmatch(f"{re.escape(arm)}, {pattern}", name) for name in noise}
            found = {int(match[1]): noise[name] for name, match in names.items() if match}
            if not found:
                continue
            points = sorted((found | {clean_x: clean[arm]}).items())
            values = [[m["accuracy"] for m in measured(runs).values()] for _, runs in points]
            middle = [mean(v) for v in values]
            spread = [[m - min(v) for m, v in zip(middle, values)]]
            spread.append([max(v) - m for m, v in zip(middle, values)])
            x, color = [x for x, _ in points], COLORS[arm]
            panel.errorbar(x, middle, yerr=spread, marker="o", capsize=3, color=color, label=arm)
        panel.set_xlabel(label)
    sayo = mean(m["accuracy"] for m in measured(clean[SAYO]).values())
    panels[2].axhline(sayo, color=COLORS[SAYO], linestyle=":", label=f"{SAYO}, no labels")
    panels[0].set_ylabel("greedy accuracy, test")
    panels[2].legend(frameon=False, fontsize=8)
    panels[1].set_xscale("log", base=2)
    panels[1].set_xticks([16, 64, 256, 480], ["16", "64", "256", "480"])
    figure.savefig(path, dpi=110)
