"""sayo-mini: reinforcement learning of where a vision-language model looks, on one GPU.

GRPO with SAYO's reward: how much of the model's attention to the image falls on the annotated region while it is
unsure what to say next. Read `train` and `train_step`: sample -> score -> reward -> advantage -> loss -> step.
The README lists where this departs from the paper and its code, and why.
"""

import argparse
import json
import logging
import math
import os
import signal
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import fmean as mean

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel that is not used here
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import reward as R
from data import Example, InputError, JsonLines, example_region
from evaluate import ask, best, evaluate, gaze, probe, words
from look import alarms, answer_sheet, before_after, heat_table, table
from model import Completions, Prompt, load_vlm
from page import write_page
from scenes import Scenes

HERE = Path(__file__).parent
REWARDS = ("attention", "format", "accuracy")


def flag(default, help, least=None, choices=None):
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


@dataclass
class Config:
    """Every setting is a flag of the same name. Where TRL has the setting, it has TRL's name."""

    model_name_or_path: str = flag("Qwen/Qwen3-VL-2B-Instruct", "Qwen2.5-VL or Qwen3-VL: a hub name or a folder")
    dataset: str = flag("scenes", "scenes (drawn here), or a .jsonl with image, question, answer and boxes a line")
    output_dir: str = flag("runs/sayo", "one run: config, metrics, samples, checkpoint, adapter, picture")
    max_steps: int = flag(200, "optimiser steps", least=0)
    num_generations: int = flag(8, "G, answers sampled to each question; the paper's code has 16", least=2)
    prompts_per_step: int = flag(4, "questions a step; each is a group and a micro-batch", least=1)
    max_completion_length: int = flag(110, "tokens of an answer at most", least=1)
    temperature: float = flag(1.0, "of sampling and scoring alike; there is no top-p", least=0.01)
    learning_rate: float = flag(5e-6, "of AdamW")
    lr_scheduler_type: str = flag("cosine", "cosine or constant, after the warm-up", choices=["cosine", "constant"])
    warmup_steps: int = flag(5, "steps of linear warm-up")
    weight_decay: float = flag(0.01, "of AdamW")
    max_grad_norm: float = flag(0.8, "gradients are clipped to this norm")
    beta: float = flag(0.001, "weight of the KL divergence from the model before training; 0 saves a forward")
    epsilon: float = flag(0.2, "the clip of GRPO's ratio; it binds only if num_iterations > 1")
    num_iterations: int = flag(1, "updates made of each batch of samples", least=1)
    lora_r: int = flag(16, "rank of the adapter", least=1)
    lora_alpha: int = flag(32, "its scale: LoRA adds alpha / r times its product")
    load_in_4bit: bool = flag(True, "NF4 with double quantisation for the language model")
    max_pixels: int = flag(2**18, "larger images are scaled down to this (Qwen3-VL: 1024 an image token)", least=1)
    completions_per_forward: int = flag(0, "answers in one forward: fewer need less memory; 0 is all", least=0)
    gradient_checkpointing: bool = flag(True, "compute activations twice instead of storing them")
    reward_weights: str = flag("attention=1,format=1,accuracy=0", "the paper's own; all three are logged anyhow")
    token_fraction: float = flag(0.3, "the share of tokens, of highest entropy, whose attention counts", least=1e-6)
    alignment: str = flag("query", "a token's own attention, or its predictor's", choices=["query", "predict"])
    layers: str = flag("-1", "whose attention counts, e.g. 2,3; -1 is the last; or all")
    heads: str = flag("all", "of those layers, e.g. 0,3; or all")
    format_lengths: str = flag("60,100", "answers shorter or longer than this, in tokens, lose format reward")
    instruction: str = flag("Say first where in the image the answer is to be found and what you see there. Then give "
                            "the answer alone, as <answer>...</answer>.", "added to every question")  # fmt: skip
    eval_examples: int = flag(64, "held-out questions asked before and after; 0: none", least=0)
    save_steps: int = flag(20, "steps between checkpoints", least=1)
    resume: bool = flag(False, "go on from the last checkpoint in output_dir, with that run's settings")
    probe: bool = flag(False, "no training: a table of how well each layer and head finds the region")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "auto is cuda if there is any, else cpu", choices=["auto", "cuda", "cpu"])


# What differs for the model of 1.6 M parameters in tiny/: it is small, sure of its format, and learns fast.
TINY = dict(model_name_or_path=str(HERE / "tiny"), max_steps=60, prompts_per_step=8, max_completion_length=20,
            learning_rate=2e-4, gradient_checkpointing=False, format_lengths="10,18", instruction="",
            max_pixels=112 * 112, eval_examples=256)  # fmt: skip


@dataclass
class Group:
    """One question and its G answers, with all that the updates and the log need to know of them."""

    example: Example
    prompt: Prompt
    completions: Completions
    rewards: dict = None  # name -> (G,), unweighted
    total: torch.Tensor = None  # (G,) their weighted sum
    advantages: torch.Tensor = None  # (G,)
    zero_std: bool = False  # all rewards are equal: nothing to learn
    old_logps: torch.Tensor = None  # (G, C) under the policy that sampled
    ref_logps: torch.Tensor = None  # (G, C) under the model before training; None without KL
    log: dict = None  # means over the group, for metrics.jsonl

    def answers(self):
        """The rows of samples.jsonl."""
        for i, text in enumerate(self.completions.texts):
            row = {"id": self.example.id, "question": self.example.question, "answer": self.example.answer}
            scores = {name: value[i].item() for name, value in self.rewards.items()}
            yield row | {"text": text} | scores | {"advantage": self.advantages[i].item()}


def train(cfg):
    """One run, from loading to the picture at the end. Returns the exit code."""
    torch.manual_seed(cfg.seed)  # LoRA's first values; everything later draws from `generator`
    train_set, eval_set = load_data(cfg)
    vlm = load(cfg)
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed)
    params = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay)
    run = Run(cfg, params, optimizer, generator)
    before = run.read("before.json") or run.keep("before.json", evaluate(vlm, eval_set, cfg, "before"))
    warned = set()
    stop = []  # Ctrl-C and SIGTERM end the run after the step in hand
    usual = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(range(run.step, cfg.max_steps), initial=run.step, total=cfg.max_steps, desc="train")
    for step in bar:
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        first = step * cfg.prompts_per_step
        examples = [train_set[shuffled(first + i, len(train_set), cfg.seed)] for i in range(cfg.prompts_per_step)]
        metrics, samples = train_step(vlm, examples, cfg, optimizer, generator)
        run.log(step + 1, metrics | {"learning_rate": learning_rate(cfg, step)}, samples)
        bar.set_postfix_str(" ".join(f"{k} {metrics[f'rewards/{k}/mean']:.2f}" for k in REWARDS))
        for alarm in alarms(metrics):
            if alarm.split()[0] not in warned:
                tqdm.write(f"step {step + 1}: {alarm}")
            warned.add(alarm.split()[0])
        if stop or (step + 1) % cfg.save_steps == 0 or step + 1 == cfg.max_steps:
            run.save()
        if stop:
            write_page(run.folder, eval_set)
            tqdm.write(
                f"stopped after step {step + 1}; go on with: python sayo_mini.py --resume --output_dir {run.folder}"
            )
            return 130
    for number, handler in usual.items():
        signal.signal(number, handler)
    vlm.model.save_pretrained(run.folder / "adapter")
    after = run.keep("after.json", evaluate(vlm, eval_set, cfg, "after", before))
    if before:
        print(table(before, after))
        before_after(eval_set, before, after, run.folder / "look.png")
    write_page(run.folder, eval_set)
    print(f"open {run.folder / 'report.html'}; adapter, metrics, samples and picture (look.png) are beside it")
    return 0


def train_step(vlm, examples, cfg, optimizer, generator):
    """One batch of questions: sample all, then `num_iterations` updates, one group after the other.

    On-policy, the forward that trains also gives the attention and entropies of which the reward is made: a group
    costs three forwards of P + G*C tokens, sampling, training and reference, or two without KL. If it is split by
    `completions_per_forward`, scoring is one more.  Returns: (metrics, with TRL's names; samples, a dict an answer).
    """
    groups = []
    for example in examples:
        prompt = ask(vlm, example, cfg)
        completions = vlm.sample(prompt, cfg.num_generations, cfg.max_completion_length, cfg.temperature, generator)
        groups.append(Group(example, prompt, completions))
    tokens = sum(g.completions.mask.sum().item() for g in groups)  # of the whole step, as in TRL's "dapo" loss
    size = cfg.completions_per_forward or cfg.num_generations
    updates = []
    for iteration in range(cfg.num_iterations):
        stats = []
        for group in groups:
            fresh = judge(vlm, group, cfg, with_gradient=size >= cfg.num_generations) if iteration == 0 else None
            if group.zero_std:
                continue
            for i in range(0, cfg.num_generations, size):
                rows = slice(i, i + size)
                part = group.completions[rows]
                scores = fresh or vlm.score(group.prompt, part, attention=False)
                ref_logps = group.ref_logps[rows] if cfg.beta else None
                loss, stat = R.grpo_loss(scores.logps, group.old_logps[rows], ref_logps, group.advantages[rows],
                                         part.mask, cfg.epsilon, cfg.beta, tokens)  # fmt: skip
                loss.backward()
                stats.append(stat | {"loss": loss.item(), "tokens": part.mask.sum().item()})
        norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], cfg.max_grad_norm)
        if norm.isfinite():  # else this update is skipped, and counted
            optimizer.step()
        optimizer.zero_grad()
        updates.append({"stats": stats, "grad_norm": norm.item()})
    return step_metrics(groups, updates), [row for g in groups for row in g.answers()]


def judge(vlm, group, cfg, with_gradient):
    """Score and reward one group, and note in it what the updates need. Returns the Scores if `with_gradient`, so
    that the first update need not run the model again."""
    completions = group.completions
    with torch.set_grad_enabled(with_gradient):
        scores = vlm.score(group.prompt, completions)
    region = example_region(group.example, group.prompt.grid).to(vlm.device)
    selected = R.select_tokens(scores.entropy, completions.mask, cfg.token_fraction)
    attention = R.align_attention(scores.attention, scores.prompt_attention, cfg.alignment)
    lengths = completions.mask.sum(1).tolist()
    rewards = {
        "attention": R.attention_reward(attention, region, selected),
        "format": [R.format_reward(t, n, *numbers(cfg.format_lengths)) for t, n in zip(completions.texts, lengths)],
        "accuracy": [R.accuracy_reward(t, group.example.answer) for t in completions.texts],
    }
    group.rewards = {k: torch.as_tensor(v, dtype=torch.float32, device=vlm.device) for k, v in rewards.items()}
    group.total = sum(w * group.rewards[name] for name, w in weights(cfg.reward_weights).items())
    group.advantages = R.group_advantages(group.total)
    group.zero_std = group.total.std().item() < 1e-6  # equal but for rounding
    group.old_logps = scores.logps.detach()
    looks = [a[s].mean(0) for a, s in zip(attention, selected)]  # G of (N,)
    group.log = {
        "entropy": scores.entropy[completions.mask].mean().item(),
        "attention/auroc": torch.tensor([R.localization(look, region)["auroc"] for look in looks])
        .nan_to_num(0.5)
        .mean()
        .item(),
        "attention/log_rho": R.attention_ratio(attention, region, selected).log().mean().item(),
        "attention/image_mass": attention.sum(-1)[completions.mask].mean().item(),
    }
    if cfg.beta and not group.zero_std:
        with torch.no_grad():
            group.ref_logps = vlm.score(group.prompt, completions, attention=False, reference=True).logps
    return scores if with_gradient else None


def step_metrics(groups, updates):
    """The step's row of metrics.jsonl, with TRL's names; the README explains every one."""
    stats, texts = [s for u in updates for s in u["stats"]], [t for g in groups for t in g.completions.texts]
    total = torch.stack([g.total for g in groups])  # (groups, G)
    parts = {name: torch.stack([g.rewards[name] for g in groups]).cpu() for name in REWARDS}
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float().cpu()
    row = {
        "loss": sum(s["loss"] for s in stats) / len(updates),
        "grad_norm": mean([u["grad_norm"] for u in updates]),
        "skipped_updates": sum(not math.isfinite(u["grad_norm"]) for u in updates),
        "reward": total.mean().item(),
        "reward_std": total.std(1).mean().item(),
        "frac_reward_zero_std": mean([g.zero_std for g in groups]),
        **{name: mean([g.log[name] for g in groups]) for name in groups[0].log},
        **{f"completions/{how}_length": getattr(lengths, how)().item() for how in ("mean", "min", "max")},
        "completions/clipped_ratio": 1 - torch.cat([g.completions.finished for g in groups]).float().mean().item(),
        "completions/repeated_sentences": mean([R.repeated_sentences(t) for t in texts]),
        "completions/seq_rep_3": mean([R.seq_rep_3(t) for t in texts]),
        "completions/unclosed_tags": mean([t.count("<answer>") > t.count("</answer>") for t in texts]),
        "num_tokens": int(lengths.sum()),
    }
    for name in ("kl", "ratio", "clip_ratio/low_mean", "clip_ratio/high_mean"):  # token means of what was trained on
        row[name] = sum(s[name] * s["tokens"] for s in stats) / max(1, sum(s["tokens"] for s in stats))
    for name, value in parts.items():
        row |= {f"rewards/{name}/mean": value.mean().item(), f"rewards/{name}/std": value.std(1).mean().item()}
    for name, other in (("accuracy", parts["accuracy"].flatten()), ("length", lengths)):
        pair = torch.stack([parts["attention"].flatten(), other])  # the correlation is 0 where one does not vary
        row[f"attention/corr_{name}"] = torch.corrcoef(pair)[0, 1].nan_to_num().item()
    return row


class Run:
    """One folder: config.json, metrics.jsonl, samples.jsonl, checkpoint.safetensors, before.json, after.json,
    adapter/ and look.png. Whatever moment a run is killed at, what stands there is whole."""

    def __init__(self, cfg, params, optimizer, generator):
        self.folder, self.params, self.optimizer, self.generator = Path(cfg.output_dir), params, optimizer, generator
        self.step, self.resumed = 0, cfg.resume
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.keep("config.json", asdict(cfg) | {"resume": False})
        except OSError as error:
            raise InputError(f"cannot write to --output_dir {self.folder}: {error.strerror}") from None
        if cfg.resume:
            self.restore()
        for name in ("metrics.jsonl", "samples.jsonl"):  # what was logged after the checkpoint will be logged again
            lines = (self.folder / name).read_text().splitlines() if (self.folder / name).exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
            self.replace(name, lambda path, kept=kept: path.write_text("".join(f"{line}\n" for line in kept)))

    def replace(self, name, write):
        """Let `write` make a file of another name, then rename it: there is the old file or the new one, no half."""
        unfinished = self.folder / f"unfinished-{name}"
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # else a power cut soon after could leave the new name without its content
        os.replace(unfinished, self.folder / name)

    def keep(self, name, content):
        self.replace(name, lambda path: path.write_text(json.dumps(content)))
        return content

    def read(self, name):
        """What an interrupted run kept under `name`, or None."""
        path = self.folder / name
        return json.loads(path.read_text()) if self.resumed and path.exists() else None

    def log(self, step, metrics, samples):
        self.step = step
        for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", samples)):
            with open(self.folder / name, "a") as file:
                file.write("".join(json.dumps({"step": step} | row) + "\n" for row in rows))

    def save(self):
        """Checkpoint: adapter, both moments of AdamW, and the state of the one source of randomness."""
        tensors = {"generator": self.generator.get_state()}
        for name, p in self.params.items():
            tensors |= {f"{name}|{key}": value for key, value in self.optimizer.state[p].items()}
            tensors[f"{name}|value"] = p.detach()
        self.replace("checkpoint.safetensors", lambda path: save_file(tensors, path, {"step": str(self.step)}))

    def restore(self):
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return print(f"no checkpoint in {self.folder} yet: starting from the beginning")
        with safe_open(path, "pt") as saved:
            self.step = int(saved.metadata()["step"])
            self.generator.set_state(saved.get_tensor("generator"))
            for key in set(saved.keys()) - {"generator"}:
                name, what = key.split("|")
                p, tensor = self.params[name], saved.get_tensor(key)
                if what == "value":
                    p.data.copy_(tensor)
                else:  # AdamW wants its step count on the CPU
                    self.optimizer.state[p][what] = tensor if what == "step" else tensor.to(p.device)
        print(f"resuming {self.folder} after step {self.step}")


def show_probe(cfg):
    """`--probe`: which layers and heads find the region, before any training? Asked of training questions, which are
    still new to the model, so that the held-out ones stay unspoilt for the judgement."""
    train_set, _ = load_data(cfg)
    vlm = load(cfg)
    count = min(len(train_set), cfg.eval_examples or 64)
    auroc, permuted = (t.tolist() for t in probe(vlm, [train_set[i] for i in range(count)], cfg))
    heads = len(auroc[0]) - 1
    print(f"AUROC of {count} questions, {cfg.alignment} rows" + " " * 9 + "head 0 to " + f"{heads - 1}, all")
    for i, row in enumerate(auroc):
        print(f"{'all' if i == len(auroc) - 1 else f'layer {i}':>8} " + " ".join(f"{v:.2f}" for v in row))
    layer, chosen = best(torch.tensor(auroc))
    print(f"held against another's box: {mean(permuted[layer]):.2f} in layer {layer}, {mean(sum(permuted, [])):.2f} "
          f"overall; chance is 0.50")  # fmt: skip
    print(f"best layer {layer} ({auroc[layer][-1]:.2f}), best heads in it {chosen}: "
          f"--alignment {cfg.alignment} --layers {layer} --heads {','.join(map(str, chosen))}")  # fmt: skip
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    heat_table(auroc, folder / "probe.png")
    print(f"the table as a picture: {folder / 'probe.png'}")
    return 0


def look(argv):
    """Ask one question about one image, and draw where the model looks while it answers. With --adapter, before and
    after training, with that run's settings."""
    parser = argparse.ArgumentParser("sayo_mini.py look", description=look.__doc__, allow_abbrev=False,
                                     epilog="The flags of training that choose a model, layers, heads, tokens and "
                                     "lengths work here too: see sayo_mini.py --help.")  # fmt: skip
    parser.error = refuse
    parser.add_argument("--image", required=True, help="any picture that Pillow reads")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument("--box", metavar="x1,y1,x2,y2", help="where the answer is, in pixels: drawn, and scored")
    parser.add_argument("--adapter", type=Path, help="the adapter/ of a run: answers before and after are compared")
    parser.add_argument("--output", default="look.png", help="the picture (default: look.png)")
    own, rest = parser.parse_known_args(argv)
    run = own.adapter.parent / "config.json" if own.adapter else None
    cfg = settings(flags(rest), json.loads(run.read_text()) if run and run.exists() else None)
    try:
        image = Image.open(own.image).convert("RGB")
        boxes = [tuple(float(v) for v in own.box.split(","))] if own.box else []
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"--image {own.image}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except ValueError:
        raise InputError(f"--box {own.box}: give four numbers, x1,y1,x2,y2") from None
    example = Example(image, own.question, "", boxes, f"--image {own.image}")
    vlm = load(cfg)
    sides = [see(vlm, example, cfg, "before training" if own.adapter else "")]
    if own.adapter:
        vlm.load_adapter(own.adapter)
        sides.append(see(vlm, example, cfg, "after training"))
    try:
        answer_sheet(image, boxes, sides, own.output)
    except (OSError, ValueError) as error:
        raise InputError(f"--output {own.output}: {error}") from None
    print(f"the picture: {own.output}")
    return 0


def see(vlm, example, cfg, when):
    """One answer, printed with its scores. Returns: a side of `look.answer_sheet`."""
    prompt = ask(vlm, example, cfg)
    region = example_region(example, prompt.grid) if example.boxes else None
    found = gaze(vlm, prompt, cfg)
    print(f"{when or 'answer'}: {found.completion.texts[0]}")
    if region is not None:
        r_v = R.attention_reward(found.attention[None], region, found.selected[None]).item()
        scores = R.localization(found.map, region)
        print(f"  r_v {r_v:.3f}, AUROC {scores['auroc']:.3f}, mass / area {scores['mass_over_area']:.2f}")
    return {"caption": when, "map": found.map.tolist(), "grid": prompt.grid, "words": words(vlm, found.completion),
            "entropy": found.entropy.tolist(), "selected": found.selected.tolist()}  # fmt: skip


def load(cfg):
    """The model of a Config."""
    where = {"layers": numbers(cfg.layers), "heads": numbers(cfg.heads)}  # whose attention counts
    vlm = load_vlm(cfg.model_name_or_path, cfg.load_in_4bit, cfg.lora_r, cfg.lora_alpha, cfg.device, cfg.max_pixels,
                   cfg.gradient_checkpointing, cfg.completions_per_forward, **where)  # fmt: skip
    if vlm.core.num_parameters() < 1e7:
        torch.set_num_threads(1)  # on tensors so small, threads only wait for each other
    return vlm


def load_data(cfg):
    """(training, held-out) examples."""
    if cfg.dataset != "scenes":
        return JsonLines(cfg.dataset).split(cfg.eval_examples)
    tiny = Path(cfg.model_name_or_path).resolve() == HERE / "tiny"
    style = {} if tiny else {"image_size": 448, "card_size": (56, 80), "marks": "digits"}
    train_set = Scenes("train", max(1, cfg.max_steps * cfg.prompts_per_step), cfg.seed, **style)
    return train_set, Scenes("test", cfg.eval_examples, **style)


def shuffled(k, n, seed):
    """The k-th example in an endless walk through n, each epoch in another order."""
    epoch, i = divmod(k, n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1000003 * epoch))[i].item()


def learning_rate(cfg, step):
    """Linear warm-up, then constant or a cosine down to 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.learning_rate * (1 if cfg.lr_scheduler_type == "constant" else 0.5 * (1 + math.cos(math.pi * done)))


def numbers(text):
    """The list [0, 3] of "0,3"; None of "all"."""
    return None if text == "all" else [int(number) for number in text.split(",")]


def weights(text):
    """The dict of "attention=1,format=0.5"."""
    return {name.strip(): float(weight) for name, weight in (item.split("=") for item in text.split(","))}


def refuse(message):  # argparse itself would print its usage as well; here a mistake is one line
    raise InputError(f"{message} (--help explains all flags)")


def flags(argv):
    """The flags that were given, as a dict."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "sayo_mini.py [train]", description=__doc__, formatter_class=layout, allow_abbrev=False,
        epilog="sayo_mini.py look --help: ask about a picture of your own, and see where the model looks.",
    )  # fmt: skip
    parser.error = refuse
    for f in fields(Config):
        tiny = f"; tiny model: {TINY[f.name] or 'none'}" if f.name in TINY and f.name != "model_name_or_path" else ""
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": "X"}
        if f.metadata["choices"]:
            how = {"choices": f.metadata["choices"]}
        help = f"{f.metadata['help']} (default: {f.default}{tiny})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=help, **how)
    return vars(parser.parse_args(argv))


def parse(argv):
    """The command line of a run as a Config. Raises: InputError, before anything is loaded or written."""
    given = flags(argv)
    folder = Path(given.get("output_dir", Config.output_dir))
    if given.get("resume") and (folder / "config.json").exists():
        return settings(given, json.loads((folder / "config.json").read_text()))
    if (folder / "metrics.jsonl").exists() and not given.get("probe"):
        raise InputError(f"{folder} holds a run already: go on with it (--resume) or choose another --output_dir")
    return settings(given)


def settings(given, base=None):
    """A Config: defaults, over them `base`, an earlier run's, or the tiny model's; over them the flags `given`.
    Raises: InputError naming the flag that cannot work."""
    if base is None:
        base = {}
        if "model_name_or_path" in given:
            base = TINY if Path(given["model_name_or_path"]).resolve() == HERE / "tiny" else {}
        elif not torch.cuda.is_available() or given.get("device") == "cpu":
            print("no CUDA: taking the tiny model that ships in tiny/ (--model_name_or_path chooses another)")
            base = TINY
    cfg = Config(**(base | given))
    for f in fields(cfg):
        if f.metadata["least"] is not None and not getattr(cfg, f.name) >= f.metadata["least"]:
            raise InputError(f"--{f.name} {getattr(cfg, f.name)}: must be at least {f.metadata['least']}")
    read = {}
    for name, reader in zip(("reward_weights", "layers", "heads", "format_lengths"), (weights, *[numbers] * 3)):
        try:
            read[name] = reader(getattr(cfg, name))
        except ValueError:
            raise InputError(f"--{name} {getattr(cfg, name)}: see --help for its form") from None
    if unknown := set(read["reward_weights"]) - set(REWARDS):
        raise InputError(f"--reward_weights: no reward {unknown.pop()!r}; there are {', '.join(REWARDS)}")
    if len(read["format_lengths"] or []) != 2:
        raise InputError(f"--format_lengths {cfg.format_lengths}: give two, shortest,longest")
    return cfg


def main(argv=None):
    disable_progress_bar()
    try:
        argv = sys.argv[1:] if argv is None else argv
        if argv[:1] == ["look"]:
            return look(argv[1:])
        cfg = parse(argv[1:] if argv[:1] == ["train"] else argv)
        return show_probe(cfg) if cfg.probe else train(cfg)
    except torch.OutOfMemoryError:
        problem = "out of GPU memory: lower --completions_per_forward, --max_pixels or --num_generations"
    except InputError as error:
        problem = " ".join(str(error).split())
    except KeyboardInterrupt:  # in loading or evaluation: nothing is half-written
        return 130
    print(f"sayo_mini.py: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
