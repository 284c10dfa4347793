"""The tables and the pictures of `ablation.py`, made from its JSON alone."""

from statistics import fmean as mean

from bench.ablation_arms import (
    ACCURACY,
    ACCURACY_SLOWER,
    ARMS,
    BOTH,
    BOTH_SLOWER,
    FORMAT,
    LOSS_AND_ACCURACY,
    LOSS_FASTER,
    LOWEST_ENTROPY,
    MAIN_ARMS,
    PLACE,
    ROLLED_BOX,
    SAYO,
    SHUFFLED_SCORES,
)
from bench.ablation_collapse import (
    alarm_table,
    collapse_table,
    last_samples,
    length_table,
    remedy_table,
)
from bench.ablation_stats import (
    chosen_rates,
    format_interval,
    format_mean,
    group_by_arm,
    half_width,
    holm,
    means,
    measured,
    paired_difference,
    rate_scores,
)
from bench.doc_tables import markdown_table

README_ARMS = ["base", SAYO, ACCURACY, BOTH, PLACE, ROLLED_BOX, SHUFFLED_SCORES]
README_COLUMNS = {  # column -> metric
    "accuracy, 60 steps": "accuracy",
    "AUROC, own text": "auroc",
    "AUROC, ground-truth text": "ground_truth_auroc",
}
COLUMNS = {
    "greedy accuracy": "accuracy",
    "names a cell of the card": "on_card",
    "AUROC, own text": "auroc",
    "mass / area": "mass_over_area",
    "AUROC, ground-truth text": "ground_truth_auroc",
    "mass / area, ground-truth text": "ground_truth_mass_over_area",
    "AUROC, discriminative head": "discriminative_head_auroc",
}
TWO_BY_TWO = {"on_on": "on, on", "on_off": "on, off", "off_on": "off, on", "off_off": "off, off"}
ADDED_LATER = (BOTH_SLOWER, ACCURACY_SLOWER)
COMPARISONS = [  # fixed before the arms ran: (ours, theirs, metric)
    *((SAYO, other, "accuracy") for other in ARMS if other not in (SAYO, *ADDED_LATER)),
    (BOTH, ACCURACY, "accuracy"),
    (LOSS_AND_ACCURACY, ACCURACY, "accuracy"),
    (LOSS_FASTER, SHUFFLED_SCORES, "ground_truth_auroc"),
    (SAYO, SHUFFLED_SCORES, "ground_truth_auroc"),
]


def rate_table(results, kind="rate"):
    scores, chosen = rate_scores(results, kind), chosen_rates(results, kind)
    rates = sorted({rate for by in scores.values() for rate in by})
    rows = []
    for arm, by in scores.items():
        cells = [f"{by[rate]:.3f}" if rate in by else "" for rate in rates]
        cells = [f"**{c}**" if r == chosen[arm] else c for r, c in zip(rates, cells)]
        rows.append([arm, *cells])
    return markdown_table(["arm", *(f"{rate:.1e}" for rate in rates)], rows)


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
    rest = ("on_card", "accuracy_if_on_card", "accuracy_if_not_on_card")
    explained = ["r_v_explained_by_cell"]
    (base,) = measured(arms["base"]).values()
    for name in shown:
        parts = [naming_and_reading(base, row) for row in measured(arms[name]).values()]
        cells = [format_interval(mean(v), half_width(v), sign="+") for v in zip(*parts)]
        rows.append([name, *means(arms[name], rest), *cells, *means(arms[name], explained)])
    names = "names the card", "right if so", "right if not", "gain", "by naming", "by reading"
    names = *names, "r_v explained by the named cell"
    rows.insert(
        0, ["base", *means(arms["base"], rest), "", "", "", *means(arms["base"], explained)]
    )
    return markdown_table(["arm", *names], rows)


def looks_table(results, shown):
    """The early and the late look of two heads, and the accuracy of each combination."""
    arms, rows = group_by_arm(results), []
    for name in shown:
        row = [
            name,
            *means(arms[name], ["early_look", "early_look_if_right", "early_look_if_wrong"]),
        ]
        rows.append([*row, *two_by_two(measured(arms[name]).values(), "looks")])
    return markdown_table(
        ["arm", "early look on", "if right", "if wrong", *TWO_BY_TWO.values()], rows
    )


def second_looks_table(results):
    """The arms in the world of second looks."""
    arms = group_by_arm(results, "looks")
    metrics = {
        "greedy accuracy": "accuracy",
        "first look on the card": "first_on_card",
        "last look on the card": "last_on_card",
        "wrong first looks corrected": "corrected",
        "samples look again": "sampled_looked_again",
        "if the first look is off": "sampled_looked_again_if_first_off",
        "AUROC, own text": "auroc",
    }
    rows = [[f"{name} ({len(arm)})", *means(arm, metrics.values())] for name, arm in arms.items()]
    return markdown_table(["arm (seeds)", *metrics], rows)


def first_and_last_look_table(results):
    """The first and the last look on the card or off it, and how many answers are right then."""
    arms, rows = group_by_arm(results, "looks"), []
    for name in arms:
        rows.append([name, *two_by_two(measured(arms[name]).values(), "named")])
    return markdown_table(["arm", *TWO_BY_TWO.values()], rows)


def two_by_two(rows, looks):
    """Cells "share (accuracy)" of each combination of a first and a last look, over all answers of
    all seeds."""
    cells = []
    for cell in TWO_BY_TWO:
        pairs = [(row[f"{looks}_{cell}"], row[f"accuracy_{looks}_{cell}"]) for row in rows]
        share = mean(share for share, _ in pairs)
        right = sum(share * accuracy for share, accuracy in pairs) / len(pairs)
        cells.append(f"{share:.3f} ({right / share:.2f})" if share else "0")
    return cells


def second_looks_samples(results):
    """Two samples of the last step of each arm, with seed 0, as Markdown."""
    arms = group_by_arm(results, "looks")
    lines = [
        f"- {name}: " + "; ".join(f"`{text}`" for text in arm[0]["samples"])
        for name, arm in arms.items()
        if arm[0].get("samples")
    ]
    return "\n".join(lines)


def noise_table(results):
    arms = group_by_arm(results, "noise")
    rows = [[f"{n} ({len(arm)})", *means(arm, ["accuracy", "on_card"])] for n, arm in arms.items()]
    return markdown_table(["arm (seeds)", "greedy accuracy", "names the card"], rows)


def tables(results, training):
    """{name of the place in docs/evidence.md: Markdown}."""
    stages, shown = {row["kind"] for row in results["runs"]}, list(group_by_arm(results))
    trained = [name for name in shown if name != "base"]
    noise = "![Accuracy against wrong labels and boxes, questions and labels](noise.png)\n\n"
    needs = {  # table -> (stages that it needs, how it is made)
        "rates": ({"rate"}, lambda: rate_table(results)),
        "arms": ({"arm"}, lambda: headline_table(results)),
        "comparisons": ({"arm"}, lambda: comparison_table(results)),
        "mediation": ({"arm"}, lambda: mediation_table(results, trained)),
        "looks": ({"arm"}, lambda: looks_table(results, shown)),
        "length": ({"length"}, lambda: length_table(results)),
        "collapse": ({"length"}, lambda: collapse_table(results, training)),
        "samples": ({"length"}, lambda: last_samples(results)),
        "remedies": ({"length", "remedy"}, lambda: remedy_table(results, training)),
        "alarm": ({"arm", "length"}, lambda: alarm_table(results, training)),
        "noise": ({"noise"}, lambda: noise + noise_table(results)),
        "variants": ({"variant"}, lambda: headline_table(results, ["variant"])),
        "second looks rates": ({"looks"}, lambda: rate_table(results, "looks rate")),
        "second looks": ({"looks"}, lambda: second_looks_table(results)),
        "first and last look": ({"looks"}, lambda: first_and_last_look_table(results)),
        "second looks samples": ({"looks"}, lambda: second_looks_samples(results)),
    }
    missing = "Not run yet; `python bench/ablation.py` continues the study."
    made = {name: make() if need <= stages else missing for name, (need, make) in needs.items()}
    return {f"study {name}": text for name, text in made.items()}


def readme_table(results):
    """The table of README.md."""
    arms, rows = group_by_arm(results), []
    long = group_by_arm(results, "length", 300)
    complete = min(len(long.get(name, {})) for name in [*MAIN_ARMS, PLACE]) == 5
    for name in README_ARMS:
        late = [row["measured"]["accuracy"] for row in long.get(name, {}).values()]
        cells = means(arms[name], README_COLUMNS.values())
        if complete:
            cells.insert(1, format_mean(late) if late else "")
        rows.append([name, *cells])
    first, *rest = README_COLUMNS
    return markdown_table(["reward", first, *["accuracy, 300 steps"] * complete, *rest], rows)


def try_this_table(results):
    """The table of "Try this" in docs/algorithm.md."""
    arms, rate = group_by_arm(results) | group_by_arm(results, "variant"), chosen_rates(results)
    region = "`region=example_region(...).view(7, 7).roll((3, 3), (0, 1)).flatten()`"
    faster = f"--learning_rate {rate[ACCURACY]:.1e}"
    changes = [
        (f"{region} in `compute_rewards`", ROLLED_BOX, "it learns to name the wrong place"),
        (
            f"`--reward_weights attention=0,format=1,accuracy=1 {faster}`",
            ACCURACY,
            "it learns more than from attention",
        ),
        (
            "`--reward_weights attention=0,format=1,accuracy=0`",
            FORMAT,
            "the format is right already; `frac_reward_zero_std` says so",
        ),
        ("`--token_fraction 1`", "all tokens", "confident tokens make no difference"),
        (
            "`select_tokens(-scores.entropy, ...)` in `compute_rewards`",
            LOWEST_ENTROPY,
            "rewarding the most certain tokens does not help",
        ),
    ]
    rows = [
        [change, means(arms[arm], ["accuracy"])[0], result]
        for change, arm, result in changes
        if arm in arms
    ]
    return markdown_table(["change", "study mean", "what happens"], rows)
