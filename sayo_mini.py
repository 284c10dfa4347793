"""sayo-mini: reinforcement learning of where a vision-language model looks, on one GPU.

GRPO with SAYO's reward: how much of the model's attention to the image falls on the annotated region while it is
unsure what to say next. Read `train` and `train_step`: sample -> score -> reward -> advantage -> loss -> step.
The README lists where this departs from the paper and its code, and why.

python sayo_mini.py --check_dataset mine.jsonl   looks a data set of your own over instead, without a model.
"""

import logging
import math
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here, and the compiler takes seconds to load
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel that is not used here
warnings.filterwarnings("ignore", category=FutureWarning)

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import reward as R
from check import check_dataset
from config import REWARDS, TINY, Config, numbers, parse, weights
from data import Example, InputError, example_region
from evaluate import ask, evaluate, look, show_probe
from look import alarms, before_after, table
from model import Completions, Prompt, load_vlm
from page import pages
from paper_data import read_datasets
from run import Run, Stopped, how_to_go_on, signals
from scenes import Scenes

TOGETHER = 64  # answers written side by side, of several questions: decoding one token costs about as much for many


@dataclass
class Group:
    """One question and its G answers, with all that the updates and the log need to know of them."""

    example: Example
    prompt: Prompt
    completions: Completions = None
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


def train(cfg: Config):
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
    with signals() as stop, tqdm(initial=run.step, total=cfg.max_steps, desc="train") as bar:
        while run.step < cfg.max_steps and not stop:
            rate = optimizer.param_groups[0]["lr"] = learning_rate(cfg, run.step)
            first = run.step * cfg.prompts_per_step
            places = [shuffled(first + i, len(train_set), cfg.seed) for i in range(cfg.prompts_per_step)]
            try:
                with run.undone_if_cut_short():
                    metrics, samples = train_step(vlm, [train_set[i] for i in places], cfg, optimizer, generator, stop)
            except Stopped:
                break
            except torch.OutOfMemoryError:
                halve(vlm, cfg, run)
                continue
            run.log(metrics | {"learning_rate": rate}, samples)
            bar.update()
            bar.set_postfix_str(" ".join(f"{k} {metrics[f'rewards/{k}/mean']:.2f}" for k in REWARDS))
            warn(run, metrics, warned)
            if run.step % cfg.save_steps == 0 or run.step == cfg.max_steps:
                run.save()
    if stop:
        run.save()
        run.publish(pages(run.folder, eval_set))
        print(f"stopped after step {run.step}; go on with: {how_to_go_on(cfg.output_dir)}")
        return 130
    run.replace("adapter", vlm.model.save_pretrained)
    after = run.keep("after.json", evaluate(vlm, eval_set, cfg, "after", before))
    if before:
        print(table(before, after))
        run.replace("look.png", lambda path: before_after(eval_set, before, after, path))
    run.publish(pages(run.folder, eval_set))
    print(f"open {run.folder / 'report.html'}; adapter, metrics, samples and picture (look.png) are beside it")
    return 0


def train_step(vlm, examples, cfg, optimizer, generator, stop=()):
    """One batch of questions: sample all, then `num_iterations` updates, one group after the other.

    On-policy, the forward that trains also gives the attention and entropies of which the reward is made: a group
    costs three forwards of P + G*C tokens, sampling, training and reference, or two without KL. If it is split by
    `completions_per_forward`, scoring is one more.  Returns: (metrics, with TRL's names; samples, a dict an answer).
    Raises: Stopped after what is being sampled or scored if `stop` is no longer empty and nothing was updated yet.
    """
    groups = [Group(example, ask(vlm, example, cfg)) for example in examples]
    together = max(1, TOGETHER // cfg.num_generations)
    for i in range(0, len(groups), together):
        if stop:
            raise Stopped
        batch = groups[i : i + together]
        written = vlm.sample_groups([g.prompt for g in batch], cfg.num_generations, cfg.max_completion_length,
                                    cfg.temperature, generator)  # fmt: skip
        for group, completions in zip(batch, written):
            group.completions = completions
    tokens = sum(g.completions.mask.sum().item() for g in groups)  # of the whole step, as in TRL's "dapo" loss
    size = cfg.completions_per_forward or cfg.num_generations
    updates = []
    for iteration in range(cfg.num_iterations):
        stats = []
        for group in groups:
            if stop and iteration == 0:
                raise Stopped
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
        finite = norm.isfinite().item() and all(math.isfinite(s["loss"]) for s in stats)
        if finite:  # else this update is skipped, and counted
            optimizer.step()
        optimizer.zero_grad()
        updates.append({"stats": stats, "grad_norm": norm.item(), "finite": finite})
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
    found = [R.localization(a[s].mean(0), region)["auroc"] for a, s in zip(attention, selected)]
    group.log = {
        "entropy": scores.entropy[completions.mask].mean().item(),
        "attention/auroc": torch.tensor(found).nan_to_num(0.5).mean().item(),
        "attention/log_rho": R.attention_ratio(attention, region, selected).log().mean().item(),
        "attention/image_mass": attention.sum(-1)[completions.mask].mean().item(),
    }
    if cfg.beta and not group.zero_std:
        with torch.no_grad():
            group.ref_logps = vlm.score(group.prompt, completions, attention=False, reference=True).logps
    return scores if with_gradient else None


def halve(vlm, cfg, run):
    """After running out of GPU memory: half the answers in a forward from now on. Only once, and not with several
    iterations, of which one may be done already: else the error goes on."""
    size = cfg.completions_per_forward or cfg.num_generations
    if run.halved or size == 1 or cfg.num_iterations > 1:
        raise  # what `train` has caught
    run.halved = True
    vlm.completions_per_forward = cfg.completions_per_forward = size // 2
    run.keep_config(cfg)  # a resumed run goes on with it
    tqdm.write(f"step {run.step + 1}: out of GPU memory; begun again with --completions_per_forward {size // 2}")


def warn(run, metrics, warned):
    """Say once what is suspect in a step, and of every step that it was skipped; ten in a row end the run."""
    for alarm in alarms(metrics):
        if alarm.split()[0] not in warned:
            tqdm.write(f"step {run.step}: {alarm}")
        warned.add(alarm.split()[0])
    if metrics["skipped_updates"]:
        tqdm.write(f"step {run.step}: skipped, its loss or gradient is not finite ({run.skipped} in a row)")
    if run.skipped >= 10:
        run.save()
        raise InputError(f"stopped after step {run.step}: loss or gradient not finite in {run.skipped} steps in a row; "
                         "lower --learning_rate or try --no-load_in_4bit, in another --output_dir")  # fmt: skip


def step_metrics(groups, updates):
    """The step's row of metrics.jsonl, with TRL's names; the README explains every one."""
    stats, texts = [s for u in updates for s in u["stats"]], [t for g in groups for t in g.completions.texts]
    total = torch.stack([g.total for g in groups])  # (groups, G)
    parts = {name: torch.stack([g.rewards[name] for g in groups]).cpu() for name in REWARDS}
    lengths = torch.cat([g.completions.mask.sum(1) for g in groups]).float().cpu()
    row = {
        "loss": sum(s["loss"] for s in stats) / len(updates),
        "grad_norm": mean([u["grad_norm"] for u in updates]),
        "skipped_updates": sum(not u["finite"] for u in updates),
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


def load(cfg):
    """The model of a Config."""
    where = {"layers": numbers(cfg.layers), "heads": numbers(cfg.heads)}  # whose attention counts
    vlm = load_vlm(cfg.model_name_or_path, cfg.load_in_4bit, cfg.lora_r, cfg.lora_alpha, cfg.device, cfg.max_pixels,
                   cfg.gradient_checkpointing, cfg.completions_per_forward, **where)  # fmt: skip
    if cfg.adapter:
        vlm.load_adapter(cfg.adapter)
    if vlm.core.num_parameters() < 1e7:
        torch.set_num_threads(1)  # on tensors so small, threads only wait for each other
    return vlm


def load_data(cfg):
    """(training, held-out) examples."""
    if cfg.dataset == "scenes":
        tiny = Path(cfg.model_name_or_path).resolve() == Path(TINY["model_name_or_path"])
        style = {} if tiny else {"image_size": 448, "card_size": (56, 80), "marks": "digits"}
        train_set = Scenes("train", max(1, cfg.max_steps * cfg.prompts_per_step), cfg.seed, **style)
        return train_set, Scenes("test", cfg.eval_examples, **style)
    return read_datasets(cfg)


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


def main(argv=None, train=train, program="python sayo_mini.py"):
    """The command line; scale_trl.py has its own `train`. Returns the exit code."""
    argv, cfg = sys.argv[1:] if argv is None else argv, None
    disable_progress_bar()
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside the loop, too, it is like Ctrl-C
    try:
        if argv[:1] == ["--check_dataset"]:
            return check_dataset(argv[1:])
        if argv[:1] == ["look"]:
            return look(argv[1:], load)
        cfg = parse(argv[1:] if argv[:1] == ["train"] else argv, __doc__)
        return show_probe(load(cfg), load_data(cfg)[0], cfg) if cfg.probe else train(cfg)
    except torch.OutOfMemoryError:
        flags = "--completions_per_forward, --prompts_per_step, --max_pixels or --num_generations"
        problem = f"out of GPU memory: lower {flags}"
    except InputError as error:
        problem = " ".join(str(error).split())
    except KeyboardInterrupt:  # in loading or evaluation: nothing is half-written
        begun = cfg and (Path(cfg.output_dir) / "config.json").exists()
        print(f"stopped; {f'go on with: {how_to_go_on(cfg.output_dir, program)}' if begun else 'nothing was begun'}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, usual)
    print(f"{program.split()[-1]}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
