"""What does each reward teach the model in tiny/? `python study/ablation.py` trains all arms.

An arm is a reward, or a control that breaks one part of it. Each run is a run of sayo_mini.py with
the tiny model's preset; a control replaces one function of the program meanwhile. The learning
rates were chosen with `--stage rates` on validation scenes (seed 100); the other stages use
test scenes. Runs that are in results/ablation.json are not repeated. `--report` prints the tables
of docs/evidence.md.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sayo_mini  # before torch, because it sets environment variables that torch reads

# isort: split
import torch

import reward
from config import TINY, Config
from data import Example
from metrics import Alarms
from scenes import Scenes
from study.common import RESULTS, machine, markdown_table, write_results
from study.make_tiny import looks_of

FILE = RESULTS / "ablation.json"
QUESTIONS = 256  # of each evaluation
EVERY = 20  # steps per point of a curve
RATES = 1e-4, 2e-4, 4e-4, 8e-4
SELECTION_SEEDS = (100,)  # of the runs that choose the rates
NOISE = 0.1  # standard deviation, so that rewards are never equal in a whole group
T_95 = {3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a mean over n seeds


# --- rewards and controls ---


def named_places(text):
    """The places that a text names, in order, such as "r4 c3" for row 4, column 3."""
    return re.findall(r"r\d c\d", text) or ["none"]


def place_named(x):
    """1 if the place that the text names last is on the card, else 0; attention does not count."""
    side = math.isqrt(len(x.region))

    def on_card(place):
        row, column = (int(word[1]) - 1 for word in place.split())
        return row < side and column < side and x.region[row * side + column].item()

    places = [named_places(text)[-1] for text in x.texts]
    return [float(place != "none" and on_card(place)) for place in places]


def change_rewards(**functions):
    """Replace or add rewards during a run."""
    return patch.dict(reward.REWARDS, functions)


def shuffled_attention(seed):
    """The true attention rewards, shuffled among the completions of each group."""
    true, generator = reward.REWARDS["attention"], torch.Generator().manual_seed(seed)

    def shuffled(x):
        scores = true(x)
        return scores[torch.randperm(len(scores), generator=generator)]

    return change_rewards(attention=shuffled)


def binary_attention(seed):
    """r_v rounded to 1 if it is above 0, else 0: it can be equal in a whole group."""
    true = reward.REWARDS["attention"]
    return change_rewards(attention=lambda x: (true(x) > 0).float())


def noisy_place(seed):
    """The text-only reward with noise: it is never equal in a whole group."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(x):
        noise = torch.randn(len(x.texts), generator=generator)
        return torch.tensor(place_named(x)) + NOISE * noise

    return change_rewards(place=noisy)


class AllCards:
    """Scenes whose boxes surround all cards, not only the one in question."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        example = self.scenes[index]
        boxes = [card.box for card in self.scenes.layout(index)]
        return Example(example.image, example.question, example.answer, boxes, example.id)


def all_cards(seed):
    load = sayo_mini.load_datasets

    def load_datasets(cfg):
        train_set, eval_set = load(cfg)
        return AllCards(train_set), eval_set

    return patch.object(sayo_mini, "load_datasets", load_datasets)


def validation_scenes():
    """Evaluate on validation scenes instead of test scenes."""
    load = sayo_mini.load_datasets

    def load_datasets(cfg):
        return load(cfg)[0], Scenes("validation", cfg.eval_examples)

    return patch.object(sayo_mini, "load_datasets", load_datasets)


@dataclass(frozen=True)
class Arm:
    weights: str  # flag --reward_weights, without format=1
    rate_of: str = ""  # the arm whose learning rate it uses, by default its own
    change: object = None  # function from a seed to a context
    flags: tuple = ()


SAYO = "attention + format (SAYO)"
ACCURACY = "accuracy + format"
BOTH = "attention + accuracy + format"
PLACE = "place named + format (text only)"
ROLLED = "placebo: box rolled by half the image"
SHUFFLED = "placebo: scores shuffled in the group"
CARDS = "placebo: boxes around all cards"
FORMAT = "format only"
BINARY = "attention, binary + format"
NOISY = "place named, with noise + format"
KL = "SAYO, KL weight 0.04"
HALF = "SAYO, half the learning rate"


def add_place(seed):
    return change_rewards(place=place_named)


ARMS = {
    SAYO: Arm("attention=1"),
    ACCURACY: Arm("attention=0,accuracy=1"),
    BOTH: Arm("attention=1,accuracy=1"),
    PLACE: Arm("attention=0,place=1", change=add_place),
    ROLLED: Arm("attention=1", SAYO, flags=("--region", "rolled")),
    CARDS: Arm("attention=1", SAYO, all_cards),
    SHUFFLED: Arm("attention=1", SAYO, shuffled_attention),
    FORMAT: Arm("attention=0", SAYO),
    BINARY: Arm("attention=1", SAYO, binary_attention),
    NOISY: Arm("attention=0,place=1", PLACE, noisy_place),
    KL: Arm("attention=1", SAYO, flags=("--beta", "0.04")),
    HALF: Arm("attention=1", SAYO),
}
OWN_RATE = [name for name, arm in ARMS.items() if not arm.rate_of]
CHOSEN = {SAYO: 2e-4, ACCURACY: 2e-4, BOTH: 2e-4, PLACE: 2e-4}  # by `--stage rates`


# --- runs ---


@dataclass(frozen=True)
class Run:
    arm: str
    rate: float
    steps: int
    seed: int
    split: str = "test"


def stage_runs(stage):
    """The runs of a stage, the most informative first."""
    if stage == "rates":
        return [
            Run(arm, rate, 60, seed, "validation")
            for seed in SELECTION_SEEDS
            for arm in OWN_RATE
            for rate in RATES
        ]
    rates = {name: CHOSEN[arm.rate_of or name] for name, arm in ARMS.items()} | {HALF: 1e-4}
    rest = {name: rates[name] for name in (BINARY, NOISY, KL, HALF)}
    short = [name for name in ARMS if name not in rest]
    if stage == "short":
        return [Run(name, rates[name], 60, seed) for seed in range(5) for name in short]
    if stage == "long":
        return [Run(name, rates[name], 300, seed) for seed in range(5) for name in OWN_RATE]
    # "rest": what prevents a collapse? Rewards that can be equal, more KL, smaller steps?
    runs = [Run(name, rate, 300, seed) for seed in range(5) for name, rate in rest.items()]
    return [run for run in runs if run.seed < 3 or run.arm == HALF]


def train(run):
    """Train one arm with sayo_mini.py and measure it. Returns: a dict for JSON."""
    arm = ARMS[run.arm]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        flags = {
            "model_name_or_path": "tiny",
            "device": "cpu",
            "learning_rate": run.rate,
            "max_steps": run.steps,
            "seed": run.seed,
            "eval_examples": QUESTIONS,
            "reward_weights": f"{arm.weights},format=1",
            "output_dir": f"{folder}/run",
        }
        argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        if arm.change:
            stack.enter_context(arm.change(run.seed))
        if run.split == "validation":
            stack.enter_context(validation_scenes())
        if sayo_mini.main([*argv, *arm.flags]):
            raise RuntimeError(f"{run} failed")
        return asdict(run) | measure(Path(folder, "run"), run) | {"machine": machine()}


def measure(folder, run):
    """The results of a finished run. Looks are counted by the places that the texts name."""
    before, after = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after")
    )
    steps, samples = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "samples")
    )
    last = steps[-max(1, run.steps // 5) :]
    first = [float(looks_at_card(row)[0]) for row in samples]
    per_step = len(samples) // len(steps)
    alarms = Alarms(Config(**TINY | {"max_steps": run.steps}), [])
    alarm = [row["step"] for row in steps if "accuracy" in alarms.add(row)]

    def curve(values, size):
        return [round(fmean(values[i : i + size]), 4) for i in range(0, len(values), size)]

    return {
        "before": summarize(before),
        "after": summarize(after),
        "zero_std": fmean(row["frac_reward_zero_std"] for row in last),  # the last fifth
        "accuracy_curve": curve([row["rewards/accuracy/mean"] for row in steps], EVERY),
        "attention_curve": curve([row["rewards/attention/mean"] for row in steps], EVERY),
        "first_look_curve": curve(first, EVERY * per_step),
        "alarm": alarm[0] if alarm else None,  # the step of the first warning
    }


def looks_at_card(row):
    """Whether each look of an answer names a place on the card in question, in order. Args: row, a
    dict with the id of an example of `Scenes`, and the text."""
    split, seed, index = row["id"].split("-")
    scenes = Scenes(split, int(index) + 1, int(seed))
    return looks_of(row["text"], scenes.layout(int(index))[0])


def summarize(rows):
    """Counts and means of an evaluation."""
    looks = [looks_at_card(row) for row in rows]
    return {
        "accuracy": fmean(row["correct"] for row in rows),
        "first_wrong": sum(not look[0] for look in looks),
        "corrected": sum(look[-1] > look[0] for look in looks),
        "lost": sum(look[-1] < look[0] for look in looks),
        "auroc": fmean(row["auroc"] for row in rows),
        "fixed_auroc": fmean(row["fixed_auroc"] for row in rows),
        "length": fmean(row["length"] for row in rows),
        # How often the looks measured by attention agree with the places named.
        "early_agrees": fmean(row["early"] == look[0] for row, look in zip(rows, looks)),
        "late_agrees": fmean(row["late"] == look[-1] for row, look in zip(rows, looks)),
    }


def run_all(runs, jobs):
    """Train the runs that have no result yet, each in a process with one thread."""
    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    done = [{name: row[name] for name in Run.__annotations__} for row in rows]
    runs = [run for run in runs if asdict(run) not in done]

    def start(run):
        command = [sys.executable, __file__, "--one", json.dumps(asdict(run))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            return print(f"{run} failed: {result.stderr[-500:]}", flush=True)
        rows.append(json.loads(result.stdout.splitlines()[-1]))
        write_results(FILE, rows)
        after = rows[-1]["after"]
        print(f"{run}: accuracy {after['accuracy']:.3f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(start, runs))


# --- tables ---


def spread(values):
    """The mean over seeds ± half of its 95 % interval; for one or two seeds, or if the interval is
    wider than 0.2 or leaves the range from 0 to 1, the mean (lowest to highest)."""
    mean, half = fmean(values), math.inf
    if len(values) == 1:
        return f"{mean:.3f}"
    if len(values) in T_95:
        half = T_95[len(values)] * stdev(values) / math.sqrt(len(values))
    if half > 0.1 or not half <= mean <= 1 - half:
        return f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"
    return f"{mean:.3f} ± {half:.3f}"


def tables(rows):
    """The text of docs/evidence.md between its markers: a table per length, the alarm, and the
    accuracies that chose the learning rates."""
    parts = []
    header = "arm", "rate", "seeds", "accuracy", "wrong first looks", "of these corrected"
    header += "AUROC, own text", "AUROC, fixed text", "groups with equal rewards"
    for steps in (60, 300):
        kept = [row for row in rows if (row["steps"], row["split"]) == (steps, "test")]
        by_arm = {name: [row for row in kept if row["arm"] == name] for name in ARMS}
        lines = [table_line(name, runs) for name, runs in by_arm.items() if runs]
        if lines:
            start = table_line("before training", [kept[0] | {"after": kept[0]["before"]}])
            start[1], start[2], start[-1] = "", "", ""
            parts += [f"{steps} steps:", markdown_table(header, [start, *lines])]
    parts.append(judge_alarm(rows))
    header = "accuracy on validation scenes, by learning rate", *(f"{rate:g}" for rate in RATES)
    lines = []
    for name in OWN_RATE:
        by_rate = [
            [r["after"]["accuracy"] for r in rows if (r["arm"], r["rate"], r["split"]) == key]
            for key in ((name, rate, "validation") for rate in RATES)
        ]
        lines.append([name, *(spread(values) if values else "" for values in by_rate)])
    return "\n\n".join([*parts, markdown_table(header, lines)])


def judge_alarm(rows):
    """Does the alarm of metrics.py come before 0.2 of the accuracy of samples is lost? The accuracy
    is known as a mean over EVERY steps."""
    early, meanwhile, late, false, healthy = 0, 0, 0, 0, 0
    for row in rows:
        curve, alarm = row["accuracy_curve"], row["alarm"]
        best = list(accumulate(curve, max))
        lost = [i for i, value in enumerate(curve) if best[i] - value >= 0.2]
        if not lost:
            healthy += 1
            false += alarm is not None
        elif alarm and alarm <= lost[0] * EVERY:
            early += 1
        elif alarm and alarm <= (lost[0] + 1) * EVERY:
            meanwhile += 1
        else:
            late += 1
    return (
        f"Runs whose samples lost 0.2 of their accuracy, in means over {EVERY} steps: "
        f"{early + meanwhile + late}. The alarm (answers get worse) came before these steps in "
        f"{early}, during them in {meanwhile}, later or never in {late}. It also came in {false} "
        f"of the {healthy} other runs."
    )


def table_line(name, runs):
    after = [run["after"] for run in runs]
    corrected = [a["corrected"] / max(1, a["first_wrong"]) for a in after]
    return [
        name,
        f"{runs[0]['rate']:g}",
        str(len(runs)),
        spread([a["accuracy"] for a in after]),
        spread([a["first_wrong"] / QUESTIONS for a in after]),
        spread(corrected),
        spread([a["auroc"] for a in after]),
        spread([a["fixed_auroc"] for a in after]),
        spread([run["zero_std"] for run in runs]),
    ]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    stages = ["rates", "short", "long", "rest"]
    parser.add_argument("--stage", choices=stages, help="default: short, long, rest")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(Run(**json.loads(args.one)))))
    elif not args.report:
        for stage in [args.stage] if args.stage else stages[1:]:
            run_all(stage_runs(stage), args.jobs)
    if not args.one and FILE.exists():
        print(tables(json.loads(FILE.read_text())))


if __name__ == "__main__":
    main()
