"""Compare the arithmetic of bf16 and fp16 with that of fp32, on the CPU.

It compares one step of the tiny model and of a random 34 M model, and a whole default run in each.

    python bench/precision.py                # everything; finished runs are not repeated
    python bench/precision.py --steps_only   # without the three runs

The numbers are written to bench/results/precision.json. They show rounding errors, not speed,
because a CPU is slow at 16-bit arithmetic.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sayo_mini
from analysis.results_table import confidence_interval
from bench.doc_tables import RESULTS, ROOT, machine, write_atomically
from bench.shapes import TINY, make_model, make_question
from config import TINY as PRESET
from config import Config
from data import encode_example
from model import load_vlm
from sources.scenes import Scenes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**10  # as in sayo_mini.train with fp16
CFG = Config(**PRESET | {"token_fraction": 0.3, "beta": 0.001})
SMALL_CFG = Config(num_generations=8, max_completion_length=64)  # for the random model


def load(folder, dtype, cfg):
    """An unquantized Vlm with an adapter that changes its output, the same for every `dtype`."""
    torch.manual_seed(0)
    heads = None if cfg.heads == "all" else [int(head) for head in cfg.heads.split(",")]
    settings = {"max_pixels": cfg.max_pixels, "layers": [int(cfg.layers)], "heads": heads}
    vlm = load_vlm(folder, load_in_4bit=False, device="cpu", dtype=dtype, **settings)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return vlm


def sample(vlm, example, cfg):
    """G sampled completions and a greedy one of the fp32 model, which all types then score."""
    prompt, generator = encode_example(vlm, example, cfg), torch.Generator().manual_seed(0)
    length = cfg.max_completion_length
    completions = vlm.sample(prompt, cfg.num_generations, length, cfg.temperature, generator)
    return completions, vlm.sample(prompt, 1, length, temperature=0)


def step_values(vlm, example, texts, cfg, advantages=None, loss_scale=1.0):
    """Score, reward and backpropagate one group.

    Args: texts, from `sample`; advantages (G,), by default computed from the group's own rewards.
    Returns: a dict of tensors: logps, entropy, rewards, advantages, gradient and greedy (the most
    likely token after each prefix of the greedy text).
    """
    completions, greedy = texts
    prompt, real = encode_example(vlm, example, cfg), completions.mask
    (group,), scores = sayo_mini.score_and_reward(vlm, [(example, prompt, completions)], cfg)
    if advantages is not None:
        group.advantages, group.zero_std = advantages, False
        if group.ref_logps is None:
            group.ref_logps = group.old_logps
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale != 1)
    sayo_mini.accumulate_gradient(vlm, [group], cfg, real.sum().item(), scaler, scores)
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    gradient = torch.cat([p.grad.flatten() for p in trained]) / loss_scale
    vlm.model.zero_grad()
    with torch.no_grad():
        hidden, _ = vlm._packed_forward([prompt], [greedy.ids])
        most_likely = vlm._logits(hidden[len(prompt.input_ids) - 1 : -1], 1.0).argmax(-1)
    return {
        "logps": scores[0].logps.detach()[real],
        "entropy": scores[0].entropy[real],
        "rewards": group.rewards["attention"],
        "advantages": group.advantages,
        "gradient": gradient,
        "greedy": most_likely,
    }


def compare(reference, other):
    """How far the `step_values` of a 16-bit type are from those of fp32, as floats."""
    a, b = reference["gradient"].double(), other["gradient"].double()
    return {
        "logps_max": (reference["logps"] - other["logps"]).abs().max().item(),
        "logps_mean": (reference["logps"] - other["logps"]).abs().mean().item(),
        "entropy_max": (reference["entropy"] - other["entropy"]).abs().max().item(),
        "rewards_max": (reference["rewards"] - other["rewards"]).abs().max().item(),
        "gradient_cosine": (a @ b / (a.norm() * b.norm())).item(),
        "gradient_norm_ratio": (b.norm() / a.norm()).item(),
        "greedy_differs": (reference["greedy"] != other["greedy"]).float().mean().item(),
    }


@torch.no_grad()
def compare_decoding(folder, examples, cfg, name):
    """How far the distributions that tokens are drawn from (`sources/decoding.py`) are from those
    that are scored, over sampled completions in one type. Returns: the largest difference of a
    token's log-probability, and the mean total variation distance: the probability that the same
    random number would draw a different token."""
    vlm, largest, distances = load(folder, DTYPES[name], cfg), 0.0, []
    for example in examples:
        prompt, (completions, _) = encode_example(vlm, example, cfg), sample(vlm, example, cfg)
        (G, C), P, drawn = completions.ids.shape, len(prompt.input_ids), []
        hidden, caches, start = vlm._prefill([prompt], G)
        decoder = vlm._decoder(caches, start, C)
        for t in range(C):
            drawn.append(vlm._logits(hidden, 1.0).log_softmax(-1))
            hidden = decoder.step(completions.ids[:, t], t)
        hidden, _ = vlm._packed_forward([prompt], [completions.ids])
        own = hidden[P:].view(G, C, -1)
        predictors = torch.cat([hidden[P - 1].expand(G, 1, -1), own[:, :-1]], 1)  # (G, C, D)
        for row in range(G):
            real = completions.mask[row]
            a = torch.stack([logps[row] for logps in drawn])[real]  # (tokens, V)
            b = vlm._logits(predictors[row], 1.0).log_softmax(-1)[real]
            ids = completions.ids[row, real, None]
            largest = max(largest, (a.gather(1, ids) - b.gather(1, ids)).abs().max().item())
            distances += (0.5 * (a.exp() - b.exp()).abs().sum(-1)).tolist()
    return {"logps_max": largest, "total_variation": fmean(distances)}


def compare_steps(folder, examples, cfg):
    """Run `compare` for every type on some examples; fp16 with and without a loss scale.

    Metrics that end in _max are the largest over the examples, the others are means. All types use
    the advantages of fp32, so that the gradient does not depend on differences of the reward.

    Returns: {"bf16": {...}, "fp16": {...}, "fp16, no loss scale": {...}}.
    """
    vlm = load(folder, torch.float32, cfg)
    texts = [sample(vlm, example, cfg) for example in examples]
    references = [step_values(vlm, *each, cfg) for each in zip(examples, texts)]
    arms = {"bf16": ("bf16", 1.0), "fp16": ("fp16", LOSS_SCALE), "fp16, no loss scale": ("fp16", 1)}
    results = {}
    for arm, (name, loss_scale) in arms.items():
        vlm, rows = load(folder, DTYPES[name], cfg), []
        for example, text, reference in zip(examples, texts, references):
            settings = cfg, reference["advantages"], loss_scale
            rows.append(compare(reference, step_values(vlm, example, text, *settings)))
        largest = {k: max(row[k] for row in rows) for k in rows[0] if k.endswith("_max")}
        results[arm] = {k: fmean([row[k] for row in rows]) for k in rows[0]} | largest
    return results


def whole_run(name, folder):
    """Make the default run in one type. Returns: a dict with the number of steps and of skipped
    updates, and the intervals of accuracy and AUROC before and after."""
    if not (folder / "report.html").exists():
        sayo_mini.load_vlm = partial(load_vlm, dtype=DTYPES[name])
        argv = ["--device", "cpu", "--model_name_or_path", str(TINY), "--output_dir", str(folder)]
        if (folder / "config.json").exists():  # interrupted
            argv = ["--resume", *argv[-2:]]
        if sayo_mini.main(argv):
            raise SystemExit(f"the run in {folder} did not finish")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    row = {"steps": len(steps), "skipped_updates": sum(step["skipped_updates"] for step in steps)}
    for moment in ("before", "after"):
        results = json.loads((folder / f"{moment}.json").read_text())
        for metric in ("correct", "auroc", "fixed_auroc"):
            values, proportion = [r[metric] for r in results], metric == "correct"
            row[f"{metric}_{moment}"] = confidence_interval(values, proportion=proportion)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps_only", action="store_true", help="without the three runs")
    parser.add_argument("--models", default="runs/models", help="folder for the random model")
    parser.add_argument("--runs", default="runs/precision", help="folder for the runs")
    parser.add_argument("--results", default=str(RESULTS / "precision.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {"command": "python bench/precision.py", "machine": machine()}
    scenes = Scenes("validation", 8)
    found["tiny"] = compare_steps(TINY, [scenes[i] for i in range(len(scenes))], CFG)
    folder = make_model("30m", ROOT / args.models)
    question = make_question(load(folder, torch.float32, SMALL_CFG), 512)
    found["34M"] = compare_steps(folder, [question], SMALL_CFG)
    found["decoding"] = {
        f"{model}, {name}": compare_decoding(path, examples, cfg, name)
        for model, path, examples, cfg in (
            ("tiny", TINY, [scenes[i] for i in range(len(scenes))], CFG),
            ("34M", folder, [question], SMALL_CFG),
        )
        for name in DTYPES
    }
    if not args.steps_only:
        runs = ROOT / args.runs
        found["runs"] = {name: whole_run(name, runs / name) for name in DTYPES}
    write_atomically(args.results, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
