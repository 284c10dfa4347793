"""Train the tiny model with different rewards, controls and placebos: what does the attention
reward do, and when does it break?

    python bench/ablation.py             # everything, resumable: see the stages below
    python bench/ablation.py --quick     # a smoke test: three arms, two seeds, few questions
    python bench/ablation.py --report    # only rewrite the tables and pictures, from the JSON

The stages run in this order:

    rate      learning rates of each arm, chosen on validation questions
    arm       60 steps, five seeds, all arms; the base model
    length    the three main arms and the text-only reward, 300 steps, five seeds
    looks     a model that can look twice (made first, see second_looks.py): 60 steps, five seeds
    remedy    changes that might prevent the collapse of the attention reward, 300 steps
    noise     wrong labels, wrong boxes, few questions, few labels
    length    180 and 120 steps
    variant   other tokens, layers and heads
    arm       five more seeds

Every run calls `sayo_mini.main` with different flags. Runs with the same seed share the scenes,
their order and the initial adapter. Each finished run is added to --results, so the same command
continues after Ctrl-C.
"""

import argparse
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: one core per run
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import sayo_mini
from bench import ablation_claims, ablation_plots, ablation_report, ablation_stats, second_looks
from bench.ablation_arms import (
    ACCURACY,
    ARMS,
    BOTH,
    COMMON_FLAGS,
    MAIN_ARMS,
    PAPER,
    PLACE,
    ROLLED_BOX,
    SAYO,
    discriminative_head,
    looks_arms,
    noise_arms,
    probe_untrained_model,
    remedies,
    variant_arms,
)
from bench.ablation_measure import (
    QUICK_SIZES,
    SIZES,
    SMALL_SIZES,
    LearningCurve,
    answer_questions,
    choose_look_heads,
    grade_answers,
    grade_looks,
    make_questions,
    measure,
    measure_looks_world,
    validation_questions,
)
from bench.doc_tables import RESULTS, ROOT, insert, machine, write_atomically
from config import TINY, Config
from model import load_vlm
from sources import decoding

RATES = (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)  # more if the best is the lowest or the highest
LOOKS_RATES = RATES[1:4]
RATE_SEEDS = (100, 101)  # not used by the study
STEPS = 60
LONG = (120, 180, 300)  # steps
VALIDATION = 400  # questions, to choose a rate
CURVE = 256  # validation questions, every CURVE_STEPS
CURVE_STEPS = 20
TRAINING = (  # metrics of metrics.jsonl that are kept, for the alarm
    "rewards/attention/mean",
    "rewards/accuracy/mean",
    "attention/corr_accuracy",
    "frac_reward_zero_std",
    "kl",
    "entropy",
)
NO_CURVE = "rate", "looks rate", "noise"  # stages that are judged at the end of a run only


@dataclass(frozen=True)
class Job:
    """One model to train and measure. With 0 steps it is the model as it ships."""

    kind: str
    arm: str
    seed: int
    steps: int
    rate: float

    @property
    def key(self):
        return ablation_stats.run_key(asdict(self))


@contextmanager
def dequantize_once():
    """Keep the dequantized weights instead of computing them for every product. The results are
    bit-identical, in less time. This is possible because the frozen weights are small; those of a
    large model would not fit."""

    def forward(self, x):
        if not hasattr(self, "dequantized"):  # in a list, so that torch does not register it
            weight = dequantize_4bit(self.weight.data, self.weight.quant_state)
            self.dequantized = [weight.to(x.dtype)]
        return linear(x, self.dequantized[0], self.bias)

    with (
        patch.object(Linear4bit, "forward", forward),
        patch.object(decoding, "fast_linear", lambda layer: layer),
    ):
        yield


def arms_of(kind, setup):
    """{name: Arm} of a stage. Args: setup, from `prepare`."""
    if kind == "variant":
        return variant_arms(setup["probe"])
    stages = {
        "remedy": remedies,
        "noise": noise_arms,
        "looks": looks_arms,
        "looks rate": looks_arms,
    }
    return stages.get(kind, lambda: ARMS)()


def train_arm(job, setup, folder):
    """Run sayo_mini.py, with its output in log.txt, and measure a learning curve.
    Returns: the points of the curve, or None if the run was interrupted."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted study
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "a") as log:  # not undone, because the process runs only this job
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    arm, curve, points = arms_of(job.kind, setup)[job.arm], learning_curve(job, setup), []
    flags = [*COMMON_FLAGS, "--learning_rate", str(job.rate), *arm.flags]
    flags += ["--max_steps", str(job.steps), "--seed", str(job.seed), "--output_dir", str(folder)]
    train_step, count = sayo_mini.train_step, 0

    def step_and_measure(vlm, examples, cfg, *state):
        nonlocal count
        result, count = train_step(vlm, examples, cfg, *state), count + 1
        if job.kind not in NO_CURVE and count % CURVE_STEPS == 0:
            points.append({"step": count} | rounded(curve.point(vlm, cfg)))
        return result

    with patch.object(sayo_mini, "train_step", step_and_measure), arm.change(job.seed):
        code = sayo_mini.main(flags)
    if code not in (0, 130):
        raise RuntimeError(f"{job}: exit code {code}, see {folder / 'log.txt'}")
    return points if code == 0 else None


def learning_curve(job, setup):
    grade = grade_looks if job.kind == "looks" else grade_answers
    return LearningCurve(validation_questions(setup["curve"]), grade)


def rounded(values):
    return {name: round(value, 4) for name, value in values.items()}


def load_trained(folder, kind="arm"):
    """Load the model of a stage in the setting of all arms, with the adapter of the run in `folder`
    if that is not None. Returns: (Vlm, Config)."""
    cfg = Config(**TINY | PAPER | (second_looks.SETTINGS if "looks" in kind else {}))
    vlm = load_vlm(cfg.model_name_or_path, device="cpu", max_pixels=cfg.max_pixels)
    torch.set_num_threads(1)
    if folder:
        vlm.load_adapter(folder / "adapter")
    return vlm, cfg


def run_job(job, setup, output_dir):
    """Train unless it is the base model, then measure. Runs in its own process.
    Returns: (a row of the results, its training metrics), or None if interrupted."""
    start, row, training = time.time(), asdict(job), {}
    name = "".join(c if c.isalnum() else "_" for c in " ".join(map(str, job.key)))
    folder = output_dir / name if job.steps else None
    with dequantize_once():
        if folder:
            points = train_arm(job, setup, folder)
            if points is None:
                return None
            row |= {"curve": points, "samples": last_samples(folder)}
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            steps = [json.loads(line) for line in lines]
            training = {k: [round(step[k] or 0.0, 3) for step in steps] for k in TRAINING}
            row["frac_reward_zero_std"] = sum(training["frac_reward_zero_std"]) / len(steps)
        vlm, cfg = load_trained(folder, job.kind)
        if not folder:
            row["curve"] = [{"step": 0} | rounded(learning_curve(job, setup).point(vlm, cfg))]
        if "rate" in job.kind:
            row["validation_accuracy"] = validation_accuracy(vlm, cfg, setup["validation"])
        elif job.kind == "looks":
            count = setup["sizes"]["accuracy"]
            row["measured"] = rounded(measure_looks_world(vlm, cfg, count))
        elif job.kind == "noise":
            questions = make_questions(setup["sizes"]["accuracy"])
            row["measured"] = rounded(LearningCurve(questions).point(vlm, cfg))
        elif job.kind != "remedy":  # a remedy is judged by its curve
            sizes = setup["sizes" if job.kind == "arm" else "small_sizes"]
            row["measured"] = rounded(measure(vlm, cfg, sizes, setup["heads"]))
    row |= {"processor": machine()["processor"], "minutes": round((time.time() - start) / 60, 2)}
    return row, {"key": job.key, **training}


def last_samples(folder):
    """Two samples of the last step, one per question, to see what the answers look like."""
    lines = (folder / "samples.jsonl").read_text().splitlines()[-64:]
    by_question = {row["id"]: row for row in map(json.loads, lines)}
    return [f"{row['answer']}: {row['text']}" for row in list(by_question.values())[-2:]]


def validation_accuracy(vlm, cfg, count):
    questions = validation_questions(count)
    prompts = [vlm.encode(example.image, example.question) for example, _ in questions]
    answers = answer_questions(vlm, prompts, cfg.max_completion_length)
    return grade_answers(questions, answers)["accuracy"]


def run_jobs(jobs, args, results):
    """Run the jobs that have no row in the results yet, `args.jobs` at a time. Each adds its row
    when it finishes."""
    done = {ablation_stats.run_key(row) for row in results["runs"]}
    jobs = [job for job in jobs if job.key not in done]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        setup, folder = results["setup"], args.output_dir
        futures = [pool.submit(run_job, job, setup, folder) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc="runs"):
                if finished := future.result():
                    row, training = finished
                    results["runs"].append(row)
                    with open(training_file(args.results), "a") as file:  # first: a kill repeats it
                        file.write(json.dumps(training) + "\n")
                    save_results(results, args.results)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def training_file(path):
    """The metrics of every step of every run, beside the results."""
    return path.with_name(f"{path.stem}_training.jsonl")


def load_training(path):
    """{key of a run: metrics}, from the training metrics beside the results in `path`."""
    rows = [json.loads(line) for line in training_file(path).read_text().splitlines()]
    return {tuple(row.pop("key")): row for row in rows}


def save_results(results, path):
    text = json.dumps(results).replace('{"kind"', '\n{"kind"')  # one line per run
    write_atomically(path, text + "\n")


def prepare(args):
    """The results so far, or new ones with the setup: sizes, probe, and the heads to measure."""
    if args.results.exists():
        return json.loads(args.results.read_text())
    vlm, cfg = load_trained(None)
    count = 60 if args.quick else 300
    probe = probe_untrained_model(vlm, cfg, count)
    looks = choose_look_heads(vlm, cfg, count)
    setup = {
        "probe": probe,
        "heads": {"discriminative": discriminative_head(probe), "looks": looks},
        "sizes": QUICK_SIZES if args.quick else SIZES,
        "small_sizes": QUICK_SIZES if args.quick else SMALL_SIZES,
        "validation": 40 if args.quick else VALIDATION,
        "curve": 40 if args.quick else CURVE,
    }
    command = f"python bench/ablation.py{' --quick' if args.quick else ''}"
    results = {"command": command, "machine": machine(), "setup": setup, "runs": []}
    save_results(results, args.results)
    return results


def run_study(args):
    """Choose the learning rates, and run all stages. Returns: the results."""
    results = prepare(args)
    if args.quick:
        jobs = [
            Job("arm", a, seed, STEPS, 4e-4)
            for seed in (0, 1)
            for a in (ACCURACY, SAYO, ROLLED_BOX)
        ]
        run_jobs([Job("arm", "base", 0, 0, 0.0), *jobs], args, results)
        return results
    rates = choose_rates(args, results, "rate", RATES, RATE_SEEDS)

    def jobs(kind, seeds, steps=STEPS, names=None, rates=rates):
        arms = arms_of(kind, results["setup"])
        return [
            Job(kind, name, seed, steps, arms[name].rate or rates[arms[name].rate_of or name])
            for seed in seeds
            for name in names or arms
        ]

    run_jobs([Job("arm", "base", 0, 0, 0.0), *jobs("arm", range(5))], args, results)
    run_jobs(jobs("length", range(5), LONG[-1], MAIN_ARMS), args, results)
    run_looks(jobs, args, results)
    run_jobs(jobs("length", range(5), LONG[-1], [PLACE]), args, results)
    stages = jobs("remedy", range(3), LONG[-1]) + jobs("noise", range(3))
    for steps in reversed(LONG[:-1]):
        stages += jobs("length", range(5), steps, [SAYO])
    stages += jobs("variant", range(3)) + jobs("arm", range(5, 10))
    for steps in reversed(LONG[:-1]):
        stages += jobs("length", range(5), steps, [BOTH, ACCURACY])
    run_jobs(stages, args, results)
    return results


def run_looks(jobs, args, results):
    """Make the model that can look twice, choose rates for it, and run its arms."""
    if not (second_looks.MODEL / "model.safetensors").exists():
        second_looks.main([])
    rates = choose_rates(args, results, "looks rate", LOOKS_RATES, RATE_SEEDS[:1])
    base = Job("looks", "base", 0, 0, 0.0)
    run_jobs([base, *jobs("looks", range(5), rates=rates)], args, results)


def choose_rates(args, results, kind, rates, seeds):
    """Try the rates for every arm that has a rate of its own. While the best is the lowest or the
    highest that was tried, try the next one. Returns: {arm: the chosen rate}."""
    arms = arms_of(kind, results["setup"]).items()
    tuned = [name for name, arm in arms if not (arm.rate or arm.rate_of)]
    more = [(name, rate) for name in tuned for rate in rates]
    while more:
        run_jobs([Job(kind, n, seed, STEPS, r) for n, r in more for seed in seeds], args, results)
        more = ablation_stats.rates_beyond_the_edge(results, kind)
    return ablation_stats.chosen_rates(results, kind)


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="three arms, two seeds, 100 test questions")
    add("--report", action="store_true", help="only rewrite the tables and the pictures")
    add("--jobs", type=int, default=2, help="parallel runs, a core and 1 GB each (default: 2)")
    add("--output_dir", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    add("--results", type=Path, default=RESULTS / "ablation.json", help="JSON file of the results")
    args = parser.parse_args()
    if args.quick:
        args.output_dir = args.output_dir / "quick"
        args.results = args.output_dir / "ablation.json"
    return args


def main():
    args = parse_args()
    try:
        results = json.loads(args.results.read_text()) if args.report else run_study(args)
    except KeyboardInterrupt:
        print(f"stopped; finished runs are in {args.results}; continue with the same command")
        return 130
    training = load_training(args.results)
    for name, text in ablation_report.tables(results, training).items():
        print(f"\n{name}\n\n{text}")
    if args.results == RESULTS / "ablation.json":
        write_docs(results, training)
    return 0


def write_docs(results, training):
    """Write the tables and sentences of the documents, and the pictures."""
    tables, docs = ablation_report.tables(results, training), ROOT / "docs"
    tables["study reading"] = ablation_claims.reading(results, training)
    for name, text in tables.items():
        insert(docs / "evidence.md", name, text)
    changes = ablation_report.try_this_table(results)
    insert(docs / "algorithm.md", "study try this", changes)
    insert(ROOT / "README.md", "results", ablation_report.readme_table(results))
    ablation_plots.plot_arms(results, docs / "ablation.png")
    if ablation_stats.group_by_arm(results, "noise"):
        ablation_plots.plot_noise(results, docs / "noise.png")


if __name__ == "__main__":
    sys.exit(main())
