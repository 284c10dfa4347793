"""How long the rewards of `ablation.py` last: collapses, what prevents them, and the alarms."""

from collections import defaultdict
from itertools import pairwise
from statistics import fmean as mean

from analysis.alarms import trend_alarms
from bench.ablation_arms import ARMS, MAIN_ARMS, PLACE, SAYO, remedies
from bench.ablation_stats import format_mean, group_by_arm, run_key
from bench.doc_tables import markdown_table
from config import TINY, Config, parse_weights

POINTS_LOST = 0.2  # accuracy below its best: a collapse
HEALTHY = 0.1  # accuracy never further below its best so far
CHOSEN_ON = "the thresholds were chosen on these"

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
    """Accuracy after more steps."""
    rows = []
    for name in [*MAIN_ARMS, PLACE]:
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


def remedy_table(results, training):
    """Validation accuracy of every remedy after 300 steps, and its best during training."""
    sayo = group_by_arm(results, "length", 300)[SAYO]
    arms = {SAYO: sayo} | group_by_arm(results, "remedy")
    rows = []
    for name, arm in arms.items():
        last = [curve(row)[-1] for row in arm.values()]
        lost = sum(collapse_step(row) is not None for row in arm.values())
        best = [max(curve(row)) for row in arm.values()]
        cells = [format_mean(best), format_mean(last), f"{min(last):.3f}", f"{lost} of {len(arm)}"]
        rows.append([f"{name} ({len(arm)})", *cells])
    kept = [kept_accuracy(row, training[run_key(row)]) for row in sayo.values()]
    cells = [rows[0][1], format_mean(kept), f"{min(kept):.3f}", ""]
    rows.insert(1, [f"the same runs with --keep_best ({len(kept)})", *cells])
    header = ["remedy (seeds)", "best on the way", "after 300 steps", "lowest seed", "collapsed"]
    return markdown_table(header, rows)


def kept_accuracy(row, metrics):
    """The validation accuracy of the adapter that --keep_best keeps: the one at the end of the
    `save_steps` steps with the most right samples, which are those of a point of the curve."""
    right, size = metrics["rewards/accuracy/mean"], Config().save_steps
    blocks = range(size, len(right) + 1, size)
    best = max(blocks, key=lambda end: sum(right[end - size : end]))
    return next(point["accuracy"] for point in row["curve"] if point["step"] == best)


def alarm_counts(results, training):
    """How the alarms of `analysis.alarms` judge the runs with a learning curve.

    Args: training, {key of a run: its metrics}. Returns: {group of runs: counts}, of collapsed
    runs, how many of them had an alarm before the measurement that shows it, and how many before
    POINTS_LOST were lost according to `lost_at`; of healthy runs (never HEALTHY below their best so
    far) and how many had an alarm; of the others and the same.
    """
    names = "collapsed", "caught", "early", "healthy", "false", "between", "warned"
    counts = defaultdict(lambda: dict.fromkeys(names, 0))
    for row, metrics in with_training(results, training):
        alarm, group = first_alarm(row, metrics), counts[alarm_group(row)]
        if collapse_step(row):
            group["collapsed"] += 1
            group["caught"] += alarm is not None and alarm <= collapse_step(row)
            group["early"] += alarm is not None and lost_at(row, alarm) < POINTS_LOST
        elif largest_loss(row) < HEALTHY:
            group["healthy"] += 1
            group["false"] += alarm is not None
        else:
            group["between"] += 1
            group["warned"] += alarm is not None
    return counts


def alarm_group(row):
    """The group of a run in the table of alarms: the runs that had ended when the thresholds were
    chosen, and the others by stage."""
    seeds = {"arm": range(5), "looks": range(5), "remedy": range(3)}.get(row["kind"], ())
    if row["seed"] in seeds or (row["kind"], row["steps"]) == ("length", 300):
        return CHOSEN_ON
    return row["kind"]


def lost_at(row, step):
    """How far the validation accuracy is below its best so far at a step, which may lie between two
    points of the curve."""
    best = 0.0
    for start, end in pairwise(row["curve"]):
        best = max(best, start["accuracy"])
        if step <= end["step"]:
            share = (step - start["step"]) / (end["step"] - start["step"])
            return best - start["accuracy"] - share * (end["accuracy"] - start["accuracy"])
    raise ValueError(f"step {step} lies behind the curve")


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
    weights["attention"] = weights.get("attention", 0) + weights.get("before", 0)  # a kind of r_v
    names = "rewards/accuracy/mean", "attention/corr_accuracy"
    rows = [dict(zip(names, values)) for values in zip(*(metrics[name] for name in names))]
    return next((step for step, *_ in trend_alarms(rows, TINY["prompts_per_step"], weights)), None)


def largest_loss(row):
    """The largest drop of the validation accuracy below its best so far."""
    values = curve(row)
    return max(max(values[: i + 1]) - value for i, value in enumerate(values))


def alarm_table(results, training):
    counts = alarm_counts(results, training)
    new = [c for name, c in counts.items() if name != CHOSEN_ON]
    totals = {
        name: {key: sum(c[key] for c in some) for key in next(iter(counts.values()))}
        for name, some in (("all others", new), ("all", counts.values()))
    }
    header = ["stage", "collapsed", "caught", "0.2 not lost", "healthy", "false alarms"]
    header += ["in between", "warned"]
    rows = []
    for name, c in (counts | totals).items():
        cells = []
        for whole, *parts in (
            ("collapsed", "caught", "early"),
            ("healthy", "false"),
            ("between", "warned"),
        ):
            cells.append(f"{c[whole]}")
            for part in parts:
                share = f" ({100 * c[part] / c[whole]:.0f} %)" if c[whole] else ""
                cells.append(f"{c[part]}{share}")
        rows.append([name, *cells])
    return markdown_table(header, rows)
