"""The tables and the pictures of `ablation.py`, made from its JSON alone."""

from collections import defaultdict
from math import sqrt
from statistics import fmean as mean
from statistics import stdev

from analysis.alarms import trend_alarms
from bench.ablation_arms import (
    ACCURACY,
    ARMS,
    BOTH,
    FORMAT,
    LOSS_AND_ACCURACY,
    LOSS_FASTER,
    LOWEST_ENTROPY,
    MAIN_ARMS,
    PLACE,
    ROLLED_BOX,
    SAYO,
    SHUFFLED_SCORES,
    remedies,
)
from bench.doc_tables import markdown_table
from config import parse_weights

README_ARMS = ["base", SAYO, ACCURACY, BOTH, PLACE, ROLLED_BOX, SHUFFLED_SCORES]
README_COLUMNS = {  # column -> metric
    "greedy accuracy": "accuracy",
    "AUROC, own text": "auroc",
    "AUROC, ground-truth text": "ground_truth_auroc",
}
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
    (LOSS_FASTER, SHUFFLED_SCORES, "ground_truth_auroc"),
    (SAYO, SHUFFLED_SCORES, "ground_truth_auroc"),
]
POINTS_LOST = 0.2  # accuracy below its best: a collapse
HEALTHY = 0.1  # accuracy never further below its best so far
PROMPTS_PER_STEP = 8


COLLAPSE_CURVE = {  # column -> metric of the learning curve
    "accuracy": "accuracy",
    "names the card": "on_card",
    "right if so": "accuracy_if_on_card",
    "right if not": "accuracy_if_not_on_card",
}
COLLAPSE_TRAINING = {  # column -> metric of training
    "r_v of samples": "rewards/attention/mean",
    "right samples": "rewards/accuracy/mean",
    "correlation of both": "attention/corr_accuracy",
    "KL, nats": "kl",
    "entropy, nats": "entropy",
}


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


def rate_table(results, kind="rate"):
    scores, chosen = rate_scores(results, kind), chosen_rates(results, kind)
    rates = sorted({rate for by in scores.values() for rate in by})
    rows = []
    for arm, by in scores.items():
        cells = [f"{by[rate]:.3f}" if rate in by else "" for rate in rates]
        cells = [f"**{c}**" if r == chosen[arm] else c for r, c in zip(rates, cells)]
        rows.append([arm, *cells])
    return markdown_table(["arm", *(f"{rate:.1e}" for rate in rates)], rows)


# --- statistics ---


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
            arm = group_by_arm(results, kind, steps).get(name, {})
            runs = [run for seed, run in arm.items() if seed < 5]
            values = [run["measured"]["accuracy"] for run in runs]
            lost = sum(collapse_step(run) is not None for run in runs)
            text = f"{lost} of {len(runs)} collapsed"
            row.append(f"{format_mean(values)}; {text}" if runs else "")
        rows.append(row)
    return markdown_table(["arm", *(f"{n} steps" for n in (60, 120, 180, 300))], rows)


def collapse_table(results, training):
    """What happens around the collapse of SAYO, averaged over its runs with most steps that have
    collapsed: metrics of training, each the mean over the 20 steps that end there, and what is
    measured there on validation questions."""
    runs = [
        (row, metrics, collapse_step(row))
        for row, metrics in with_training(results, training)
        if (row["kind"], row["arm"]) == ("length", SAYO) and collapse_step(row)
    ]
    runs = [run for run in runs if run[0]["steps"] == max(row["steps"] for row, *_ in runs)]
    moments = {"step 20": lambda row, at: 20}
    for steps in (60, 40, 20):
        moments[f"{steps} steps before"] = lambda row, at, steps=steps: at - steps
    moments |= {"0.2 lost": lambda row, at: at, "40 steps after": lambda row, at: at + 40}
    moments["last step"] = lambda row, at: row["steps"]
    rows = []
    for name, moment in moments.items():
        seen = defaultdict(list)
        for row, metrics, at in runs:
            step = moment(row, at)
            point = next((p for p in row["curve"] if p["step"] == step), None)
            if not point or step < 20:
                continue
            for metric in COLLAPSE_CURVE.values():
                seen[metric].append(point[metric])
            for metric in COLLAPSE_TRAINING.values():
                if metric in metrics:  # the first runs did not keep them all
                    seen[metric].append(mean(metrics[metric][step - 20 : step]))
        columns = (COLLAPSE_CURVE | COLLAPSE_TRAINING).values()
        if seen:
            cells = [f"{mean(seen[c]):.2f}" if seen[c] else "" for c in columns]
            rows.append([f"{name} ({len(seen['accuracy'])})", *cells])
    return markdown_table(["when (runs)", *COLLAPSE_CURVE, *COLLAPSE_TRAINING], rows)


def last_samples(results):
    """What the samples of SAYO looked like in the last step of long runs, as Markdown."""
    lines = [
        f"- seed {seed}: " + "; ".join(f"`{text}`" for text in row["samples"])
        for seed, row in group_by_arm(results, "length", 300).get(SAYO, {}).items()
        if row.get("samples")
    ]
    return "\n".join(lines)


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


def alarm_counts(results, training):
    """How the alarms of `analysis.alarms` judge the runs with a learning curve.

    Args: training, {key of a run: its metrics}. Returns: {stage: counts}, of collapsed runs and how
    many of them had an alarm before POINTS_LOST were lost, and of healthy runs (never HEALTHY
    below their best so far) and how many had a false alarm.
    """
    counts = defaultdict(lambda: dict.fromkeys(("collapsed", "caught", "healthy", "false"), 0))
    for row, metrics in with_training(results, training):
        alarm, collapse = first_alarm(row, metrics), collapse_step(row)
        stage = counts[alarm_stage(row)]
        if collapse:
            stage["collapsed"] += 1
            stage["caught"] += alarm is not None and alarm <= collapse
        elif largest_loss(row) < HEALTHY:
            stage["healthy"] += 1
            stage["false"] += alarm is not None
    return counts


def alarm_stage(row):
    """The stage of a run, and whether the thresholds of the alarms were chosen on it."""
    chosen_on = row["seed"] < {"arm": 5, "length": 2 * (row["steps"] == 300)}.get(row["kind"], 0)
    return f"{row['kind']}, thresholds chosen on these" if chosen_on else row["kind"]


def with_training(results, training):
    """(row, metrics of its training) of the runs with a learning curve, which starts with the base
    model here."""
    base = {r["kind"]: r["curve"] for r in results["runs"] if r["arm"] == "base"}
    for row in results["runs"]:
        metrics = training.get(run_key(row))
        if row.get("curve") and metrics:
            start = base["looks" if row["kind"] == "looks" else "arm"]
            yield row | {"curve": start + row["curve"]}, metrics


def first_alarm(row, metrics):
    """The step of the first trend alarm of a run, or None."""
    arm = (ARMS | remedies()).get(row["arm"], ARMS[SAYO])
    weights = parse_weights(arm.flags[arm.flags.index("--reward_weights") + 1])
    names = "rewards/accuracy/mean", "attention/corr_accuracy"
    rows = [dict(zip(names, values)) for values in zip(*(metrics[name] for name in names))]
    return next((step for step, *_ in trend_alarms(rows, PROMPTS_PER_STEP, weights)), None)


def largest_loss(row):
    """The largest drop of the validation accuracy below its best so far."""
    values = curve(row)
    return max(max(values[: i + 1]) - value for i, value in enumerate(values))


def alarm_table(results, training):
    counts, rows = alarm_counts(results, training), []
    new = {name: c for name, c in counts.items() if "chosen" not in name}
    totals = {
        label: {n: sum(c[n] for c in some.values()) for n in next(iter(counts.values()))}
        for label, some in (("all others", new), ("all", counts))
    }
    for stage, c in (counts | totals).items():
        shares = [
            f"{100 * part / whole:.0f} %" if whole else ""
            for part, whole in ((c["caught"], c["collapsed"]), (c["false"], c["healthy"]))
        ]
        cells = c["collapsed"], c["caught"], shares[0], c["healthy"], c["false"], shares[1]
        rows.append([stage, *map(str, cells)])
    header = ["stage", "collapsed", "caught", "share", "healthy", "false alarms", "share"]
    return markdown_table(header, rows)


def second_looks_table(results):
    """The arms in the world of second looks."""
    arms = group_by_arm(results, "looks")
    metrics = {
        "greedy accuracy": "accuracy",
        "first place on the card": "first_on_card",
        "last place on the card": "last_on_card",
        "wrong first looks corrected": "corrected",
        "looks again if wrong, samples": "sampled_looked_again_if_first_off",
        "AUROC, own text": "auroc",
    }
    rows = [[f"{name} ({len(arm)})", *means(arm, metrics.values())] for name, arm in arms.items()]
    return markdown_table(["arm (seeds)", *metrics], rows)


def noise_table(results):
    arms = group_by_arm(results, "noise")
    rows = [[name, *means(arm, ["accuracy", "on_card", "auroc"])] for name, arm in arms.items()]
    return markdown_table(["arm", "greedy accuracy", "names the card", "AUROC, own text"], rows)


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
        "remedies": ({"length", "remedy"}, lambda: remedy_table(results)),
        "alarm": ({"arm", "length"}, lambda: alarm_table(results, training)),
        "noise": ({"noise"}, lambda: noise + noise_table(results)),
        "variants": ({"variant"}, lambda: headline_table(results, ["variant"])),
        "second looks rates": ({"looks"}, lambda: rate_table(results, "looks rate")),
        "second looks": ({"looks"}, lambda: second_looks_table(results)),
    }
    missing = "Not run yet; `python bench/ablation.py` continues the study."
    made = {name: make() if need <= stages else missing for name, (need, make) in needs.items()}
    return {f"study {name}": text for name, text in made.items()}


def readme_table(results):
    """The table of README.md."""
    arms, rows = group_by_arm(results), []
    long = group_by_arm(results, "length", 300)
    complete = min(len(long.get(name, {})) for name in MAIN_ARMS) == 5
    for name in README_ARMS:
        late = [row["measured"]["accuracy"] for row in long.get(name, {}).values()]
        cells = means(arms[name], README_COLUMNS.values())
        if complete:
            cells.insert(1, format_mean(late) if late else "")
        rows.append([name, *cells])
    first, *rest = README_COLUMNS
    return markdown_table(["reward", first, *["after 300 steps"] * complete, *rest], rows)


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
