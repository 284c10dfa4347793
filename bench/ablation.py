"""The paper's ablation in miniature, with placebos: which reward makes the tiny model look, and answer, right?

    python bench/ablation.py             # choose the learning rate, probe, train and measure 53 runs, report
    python bench/ablation.py --quick     # three arms, two seeds, fewer test scenes: a look, not a result
    python bench/ablation.py --report    # the tables and the picture again, from the committed JSON

Every arm is `sayo_mini.main` with other flags; a placebo replaces one function of the reward while it runs. Runs go to
--output_dir, are measured one by one, and add themselves to --results: stop with Ctrl-C and start again at any time.
Arms share seeds, hence scenes, their order, and the adapter's first values.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean as mean
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: a run takes one core, so runs go side by side
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.functional import linear
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import reward as R
import sayo_mini
from bench import report
from bench.measure import QUICK, SIZES, VARIANTS, measure, right
from evaluate import best, most_telling, probe
from model import load_vlm
from scenes import Scenes

# the paper's setting, where the tiny model's own differs
PAPER = {"alignment": "query", "layers": "-1", "heads": "all"}
FLAGS = ["--model_name_or_path", str(HERE.parent / "tiny"), "--device", "cpu", "--eval_examples", "0",
         *(part for name, value in PAPER.items() for part in (f"--{name}", value))]  # fmt: skip
RATES = ("1e-4", "2e-4", "4e-4")


def rolled():
    """Placebo A: the box moved by half the image, both ways, around its edges: as large, and wrong."""
    true = sayo_mini.example_region
    return patch.object(sayo_mini, "example_region", lambda example, grid: (
        true(example, grid).view(grid).roll((grid[0] // 2, grid[1] // 2), (0, 1)).flatten()))  # fmt: skip


def shuffled(seed):
    """Placebo B: the true scores of a group, dealt to its completions at random: the same mean and deviation."""
    true, generator = R.attention_reward, torch.Generator().manual_seed(seed)

    def dealt(*args):
        scores = true(*args)
        return scores[torch.randperm(len(scores), generator=generator)]

    return patch.object(R, "attention_reward", dealt)


def length():
    """A reward for length and nothing else, in place of the format reward."""
    return patch.object(R, "format_reward", lambda text, n_tokens, shortest, longest: n_tokens / longest)


def lowest():
    """The tokens of which the model is surest, in place of the most uncertain."""
    true = R.select_tokens
    return patch.object(R, "select_tokens", lambda entropy, mask, fraction: true(-entropy, mask, fraction))


def weights(attention, format, accuracy):
    return ["--reward_weights", f"attention={attention},format={format},accuracy={accuracy}"]


SAYO = "attention + format (SAYO)"
BOTH = "attention + accuracy + format"
ACCURACY = "accuracy + format"
ROLLED, DEALT = "placebo A: rolled box", "placebo B: scores dealt at random"
ARMS = {  # name -> flags
    "format only": weights(0, 1, 0),
    ACCURACY: weights(0, 1, 1),
    SAYO: weights(1, 1, 0),
    BOTH: weights(1, 1, 1),
    ROLLED: weights(1, 1, 0),
    DEALT: weights(1, 1, 0),
    "length": weights(0, 1, 0),
}
OTHERS = [BOTH, ACCURACY, "format only", ROLLED, DEALT, "length"]  # in the tables' order
PATCHES = {ROLLED: rolled, "length": length, "lowest 30 % of tokens": lowest}  # DEALT needs the seed as well


def look_around(vlm, cfg, count):
    """The probe of the untrained model on validation scenes, as {alignment: {"auroc": rows, "gap": rows}}."""
    scenes, found = Scenes("validation", count), {}
    for alignment in ("query", "predict"):
        auroc, _, gap = probe(vlm, scenes, replace(cfg, alignment=alignment))
        found[alignment] = {"auroc": auroc.tolist(), "gap": gap.tolist()}
    return found


def telling_head(found):
    """The single head, of either alignment, whose gaze tells right answers from wrong ones best."""
    gaps = {how: torch.tensor(tables["gap"]) for how, tables in found.items()}
    how = max(gaps, key=lambda name: gaps[name][:-1, :-1].max())
    layer, head = most_telling(gaps[how])
    return {"alignment": how, "layers": layer, "heads": head}


def variants(found):
    """Variants of SAYO, with the heads that the probe found. (The best layer that it found is the last: SAYO itself.)
    Returns: name -> flags."""
    layer, heads = best(torch.tensor(found["query"]["auroc"]))
    heads, telling = ",".join(map(str, heads)), telling_head(found)
    one_head = [part for name, value in telling.items() for part in (f"--{name}", str(value))]
    changes = {
        "all tokens": ["--token_fraction", "1"],
        "lowest 30 % of tokens": [],
        "predict": ["--alignment", "predict"],
        "all layers": ["--layers", "all"],
        f"best three heads ({heads} of layer {layer})": ["--layers", str(layer), "--heads", heads],
        f"most telling head ({telling['alignment']}, {telling['heads']} of layer {telling['layers']})": one_head,
    }
    return {name: weights(1, 1, 0) + flags for name, flags in changes.items()}


def unpack_once():
    """A third less time and the same numbers to the bit: bitsandbytes unpacks a weight anew for every product, but
    these are frozen, and small. (For a large model that would undo the 4 bits.)"""

    def forward(self, x, *args, **kwargs):
        base = self.base_layer
        if not hasattr(base, "unpacked"):
            base.unpacked = [dequantize_4bit(base.weight.data, base.weight.quant_state).to(x.dtype)]
        result = linear(x, base.unpacked[0], base.bias)
        if self.disable_adapters:
            return result
        A, B = (part["default"].weight for part in (self.lora_A, self.lora_B))
        return result + linear(linear(x, A), B) * self.scaling["default"]

    return patch.object(Linear4bit, "forward", forward)


def train(name, flags, seed, folder):
    """One run of `sayo_mini.py`, its bars and prints in log.txt. Returns: False if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "adapter").exists():
        return True
    change = shuffled(seed) if name == DEALT else PATCHES.get(name, nullcontext)()
    resume = ["--resume"] if (folder / "config.json").exists() else []
    with open(folder / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    with change:
        code = sayo_mini.main([*FLAGS, *flags, "--seed", str(seed), "--output_dir", str(folder), *resume])
    if code not in (0, 130):
        raise RuntimeError(f"{name}, seed {seed}: exit code {code}, see {folder / 'log.txt'}")
    return code == 0


def trained(folder):
    """The tiny model as every arm sees it, with the adapter of a run; without, if `folder` is None."""
    cfg = sayo_mini.Config(**sayo_mini.TINY | PAPER)
    vlm = load_vlm(cfg.model_name_or_path, cfg.load_in_4bit, device="cpu", max_pixels=cfg.max_pixels)
    torch.set_num_threads(1)
    if folder:
        vlm.load_adapter(folder / "adapter")
    return vlm, cfg


def one(kind, name, flags, seed, folder, sizes, telling):
    """A worker's job: train if it is not the base, then measure. Returns: a row of the results, or None."""
    began, row = time.time(), {"kind": kind, "arm": name, "seed": seed}
    with unpack_once():
        if flags is not None and not train(name, flags, seed, folder):
            return None
        vlm, cfg = trained(folder if flags is not None else None)
        if kind == "choice":  # on validation scenes, and nothing but the accuracy
            scenes = Scenes("validation", 400)
            asked = [(scenes[i], scenes.layout(i)[0]) for i in range(len(scenes))]
            return row | {"validation_accuracy": mean(right(vlm, asked, cfg.max_completion_length)[1])}
        row |= {"measured": measure(vlm, cfg, sizes, telling)}
    if flags is not None:
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = ("rewards/attention/mean", "rewards/attention/std", "rewards/accuracy/mean", "frac_reward_zero_std")
        row["curve"] = {key: [round(step[key], 4) for step in steps] for key in curve}
    return row | {"minutes": round((time.time() - began) / 60, 1)}


def run_all(jobs, args, results):
    """The jobs that are not in the results yet, `args.jobs` at a time; each adds its row as it ends."""
    done = {(row["arm"], row["seed"]) for row in results["runs"]}
    jobs = [job for job in jobs if (job[1], job[3]) not in done]
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = [pool.submit(one, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(waiting), total=len(jobs), desc="runs"):
                if row := future.result():
                    results["runs"].append(row)
                    save(results, args.results)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def save(results, path):
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results).replace('{"kind"', '\n{"kind"') + "\n")  # a line a run
    os.replace(unfinished, path)


def study(args):
    """Choose, probe, run all. Returns: the results."""
    results = json.loads(args.results.read_text()) if args.results.exists() else {"runs": []}
    sizes = QUICK if args.quick else SIZES
    if "probe" not in results:
        vlm, cfg = trained(None)
        results |= {"command": f"python bench/ablation.py{' --quick' if args.quick else ''}", "sizes": sizes,
                    "machine": report.machine(), "probe": look_around(vlm, cfg, 60 if args.quick else 300)}  # fmt: skip
        save(results, args.results)
    out, telling = args.output_dir, telling_head(results["probe"])

    def job(kind, name, flags, seed, extra=()):
        folder = out / "".join(c if c.isalnum() else "_" for c in f"{name} {seed}")
        return (
            kind,
            name,
            None if flags is None else [*flags, *extra],
            seed,
            folder,
            (VARIANTS if kind == "variant" else sizes),
            telling,
        )

    if args.quick:
        rate, arms, chosen, seeds = "4e-4", {a: ARMS[a] for a in (ACCURACY, SAYO, ROLLED)}, {}, 2
    else:
        # the rule: the rate at which the two rewards in question do best on average, on validation scenes, by a seed
        # that the study does not use
        run_all([job("choice", f"{rate} {arm}", ARMS[arm], 100, ["--learning_rate", rate])
                 for rate in RATES for arm in (SAYO, ACCURACY)], args, results)  # fmt: skip
        rate = report.best_rate(results)
        arms, chosen, seeds = ARMS, variants(results["probe"]), 5
    extra = ["--learning_rate", rate]
    jobs = [job("arm", "base", None, 0)]
    jobs += [job("arm", name, flags, seed, extra) for seed in range(seeds) for name, flags in arms.items()]
    jobs += [job("variant", name, flags, seed, extra) for seed in range(3) for name, flags in chosen.items()]
    run_all(jobs, args, results)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three arms, two seeds, 200 test scenes; own results")
    parser.add_argument("--report", action="store_true", help="no runs: tables and picture from --results")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side; each takes one core and 1 GB")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "ablation.json", help="what is measured")
    args = parser.parse_args()
    if args.quick:
        args.output_dir, args.results = args.output_dir / "quick", args.output_dir / "quick" / "ablation.json"
        args.results.parent.mkdir(parents=True, exist_ok=True)
    try:
        results = json.loads(args.results.read_text()) if args.report else study(args)
    except KeyboardInterrupt:
        print(f"stopped; what is measured stands in {args.results}; the same command goes on from there")
        return 130
    print(report.tables(results, SAYO, OTHERS))
    if not args.quick:
        report.publish(results, SAYO, OTHERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
