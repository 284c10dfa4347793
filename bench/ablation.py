"""Run the paper's ablation on the tiny model, with placebos: which reward improves attention and
accuracy?

    python bench/ablation.py             # everything: learning rate, probe, 53 runs, tables
    python bench/ablation.py --quick     # a smoke test: three arms, two seeds, fewer test scenes
    python bench/ablation.py --report    # only rewrite the tables and the picture, from the JSON

Every arm runs `sayo_mini.main` with different flags. A placebo also replaces one function of the
reward. Arms with the same seed share the scenes, their order and the initial adapter. Each finished
run is added to --results, so the same command continues after Ctrl-C.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: one core per run
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.functional import linear
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import sayo_mini
from bench import ablation_report
from bench.ablation_arms import (
    ACCURACY,
    ARMS,
    COMMON_FLAGS,
    PAPER,
    ROLLED_BOX,
    SAYO,
    discriminative_head,
    patch_for,
    probe_untrained_model,
    variant_arms,
)
from bench.ablation_measure import QUICK_SIZES, SIZES, VARIANT_SIZES, grade_answers, measure
from bench.doc_tables import RESULTS, machine, write_atomically
from config import TINY, Config
from model import load_vlm
from sources.scenes import Scenes

LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
CURVES = (  # metrics of metrics.jsonl that are kept in the results
    "rewards/attention/mean",
    "rewards/attention/std",
    "rewards/accuracy/mean",
    "frac_reward_zero_std",
)


@dataclass
class Job:
    """One model to train and measure."""

    kind: str  # "learning rate", "arm" or "variant"
    arm: str
    flags: list[str] | None  # None: the model as it ships
    seed: int
    folder: Path
    sizes: dict[str, int]  # test scenes per measurement
    head: dict[str, str | int]  # from `discriminative_head`


def dequantize_once():
    """Keep the dequantized weights instead of computing them for every product. The results are
    bit-identical, in two thirds of the time. This is possible because the frozen weights are small;
    those of a large model would not fit."""

    def forward(self, x, *args, **kwargs):
        base = self.base_layer
        if not hasattr(base, "dequantized"):  # in a list, so that torch does not register it
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
            base.dequantized = [weight.to(x.dtype)]
        result = linear(x, base.dequantized[0], base.bias)
        if self.disable_adapters:
            return result
        A, B = (part["default"].weight for part in (self.lora_A, self.lora_B))
        return result + linear(linear(x, A), B) * self.scaling["default"]

    return patch.object(Linear4bit, "forward", forward)


def train_arm(job):
    """Run sayo_mini.py, with its output in log.txt. Returns: False if it was interrupted."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if (job.folder / "adapter").exists():
        return True
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    log_path = job.folder / "log.txt"
    with open(log_path, "a") as log:  # not undone, because the process runs only this job
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    flags = [*COMMON_FLAGS, *job.flags, "--seed", str(job.seed), "--output_dir", str(job.folder)]
    with patch_for(job.arm, job.seed):
        code = sayo_mini.main([*flags, *resume])
    if code not in (0, 130):
        raise RuntimeError(f"{job.arm}, seed {job.seed}: exit code {code}, see {log_path}")
    return code == 0


def load_trained(folder):
    """Load the tiny model in the setting of all arms, with the adapter of the run in `folder` if
    that is not None. Returns: (Vlm, Config)."""
    cfg = Config(**TINY | PAPER)
    vlm = load_vlm(cfg.model_name_or_path, device="cpu", max_pixels=cfg.max_pixels)
    torch.set_num_threads(1)
    if folder:
        vlm.load_adapter(folder / "adapter")
    return vlm, cfg


def run_job(job):
    """Train unless it is the base model, then measure. Runs in its own process.
    Returns: a row of the results, or None if interrupted."""
    start, row = time.time(), {"kind": job.kind, "arm": job.arm, "seed": job.seed}
    trains = job.flags is not None
    with dequantize_once():
        if trains and not train_arm(job):
            return None
        vlm, cfg = load_trained(job.folder if trains else None)
        if job.kind == "learning rate":
            return row | {"validation_accuracy": validation_accuracy(vlm, cfg)}
        row["measured"] = measure(vlm, cfg, job.sizes, job.head)
    if trains:
        lines = (job.folder / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        row["curve"] = {key: [round(step[key], 4) for step in steps] for key in CURVES}
    return row | {"minutes": round((time.time() - start) / 60, 1)}


def validation_accuracy(vlm, cfg):
    """Greedy accuracy on 400 validation scenes."""
    scenes = Scenes("validation", 400)
    questions = [(scenes[i], scenes.layout(i)[0]) for i in range(len(scenes))]
    return mean(grade_answers(vlm, questions, cfg.max_completion_length)[1])


def run_jobs(jobs, args, results):
    """Run the jobs that have no row in the results yet, `args.jobs` at a time. Each adds its row
    when it finishes."""
    done = {(row["arm"], row["seed"]) for row in results["runs"]}
    jobs = [job for job in jobs if (job.arm, job.seed) not in done]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), desc="runs"):
                if row := future.result():
                    results["runs"].append(row)
                    save_results(results, args.results)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def save_results(results, path):
    text = json.dumps(results).replace('{"kind"', '\n{"kind"')  # one line per run
    write_atomically(path, text + "\n")


def run_study(args):
    """Probe, choose the learning rate, and run all arms. Returns: the results."""
    results = json.loads(args.results.read_text()) if args.results.exists() else {"runs": []}
    sizes = QUICK_SIZES if args.quick else SIZES
    if "probe" not in results:
        vlm, cfg = load_trained(None)
        results |= {
            "command": f"python bench/ablation.py{' --quick' if args.quick else ''}",
            "sizes": sizes,
            "machine": machine(),
            "probe": probe_untrained_model(vlm, cfg, 60 if args.quick else 300),
        }
        save_results(results, args.results)
    head = discriminative_head(results["probe"])

    def job(kind, arm, flags, seed):
        name = "".join(c if c.isalnum() else "_" for c in f"{arm} {seed}")
        size = VARIANT_SIZES if kind == "variant" else sizes
        return Job(kind, arm, flags, seed, args.output_dir / name, size, head)

    if args.quick:
        rate, arms, variants, seeds = (
            "4e-4",
            {a: ARMS[a] for a in (ACCURACY, SAYO, ROLLED_BOX)},
            {},
            2,
        )
    else:
        run_jobs(learning_rate_jobs(job), args, results)
        rate = ablation_report.best_learning_rate(results)
        arms, variants, seeds = ARMS, variant_arms(results["probe"]), 5
    extra = ["--learning_rate", rate]
    jobs = [job("arm", "base", None, 0)]
    jobs += [job("arm", arm, arms[arm] + extra, seed) for seed in range(seeds) for arm in arms]
    jobs += [job("variant", v, variants[v] + extra, seed) for seed in range(3) for v in variants]
    run_jobs(jobs, args, results)
    return results


def learning_rate_jobs(job):
    """The runs that choose the learning rate, for two rewards, with a seed that the study does not
    use."""
    return [
        job("learning rate", f"{rate} {arm}", ARMS[arm] + ["--learning_rate", rate], 100)
        for rate in LEARNING_RATES
        for arm in (SAYO, ACCURACY)
    ]


def parse_args():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="three arms, two seeds, 200 test scenes")
    add("--report", action="store_true", help="only rewrite the tables and the picture")
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
    print(ablation_report.summary(results))
    if not args.quick:
        ablation_report.write_docs(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
