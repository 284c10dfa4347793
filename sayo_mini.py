"""sayo-mini: reinforcement learning of where a vision-language model looks, on one GPU.

GRPO with SAYO's reward: how much of the attention to the image falls on the annotated region while
the model is uncertain what to say next. Start at `train_step`; docs/algorithm.md explains it.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass

sys.path.insert(0, __file__.removesuffix("sayo_mini.py"))  # for `python -m sayo_mini.sayo_mini`
from commands.parser import check_command_line, parse_command_line, run_config

if __name__ == "__main__":  # answer --help and refuse bad flags before torch takes seconds to load
    check_command_line(sys.argv[1:])

import torch
from tqdm import tqdm

import reward
from analysis.alarms import print_alarms
from analysis.evaluate import are_results, evaluate
from analysis.metrics import attention_metrics, json_row, mean_rewards, sample_rows, step_metrics
from analysis.report import write_report
from checkpoint import RunDirectory, Stopped, resume_command, stop_signals
from commands import run_subcommand
from commands.errors import halve_micro_batch, one_line_errors
from config import parse_ints, parse_weights
from data import Example, encode_example, example_region
from model import Completions, Prompt, load_vlm
from sources import load_datasets, step_examples

SAMPLED_AT_ONCE = 64  # completions: decoding more of them together is nearly free
NO_LOSS_SCALE = torch.amp.GradScaler(enabled=False)


@dataclass
class Group:
    """One question, its G completions, and what the updates and the log need."""

    example: Example
    prompt: Prompt
    completions: Completions
    rewards: dict[str, torch.Tensor]  # name -> (G,), unweighted
    total_reward: torch.Tensor  # (G,), the weighted sum
    advantages: torch.Tensor  # (G,)
    zero_std: bool  # all total rewards are equal: nothing to learn
    old_logps: torch.Tensor  # (G, C) under the policy that sampled
    ref_logps: torch.Tensor | None  # (G, C) under the model before training; None without KL
    log: dict[str, float]  # means over the group


def train_step(vlm, examples, cfg, optimizer, generator, stop=(), scaler=NO_LOSS_SCALE):
    """One batch of questions: sample completions, reward them, update the adapter.

    A group costs three forwards of P + G*C tokens: sampling, the reference (none if `beta` is 0),
    and one for rewards and gradient; one more if `completions_per_forward` splits the group.
    Args: scaler, a GradScaler for a model in fp16. Returns: (metrics, see `step_metrics`; samples,
    a dict per completion). Raises: Stopped once `stop` is non-empty, never after an update.
    """
    rollouts = roll_out(vlm, examples, cfg, generator, stop)
    step_tokens = sum(completions.mask.sum().item() for *_, completions in rollouts)
    groups, losses = [], []
    for rollout in rollouts:  # one at a time, to hold only one group's activations
        if stop:
            raise Stopped
        group, scores = score_and_reward(vlm, *rollout, cfg)
        groups.append(group)
        losses += accumulate_gradient(vlm, group, cfg, step_tokens, scaler, scores)
    updates = [update(optimizer, scaler, losses, cfg)]
    for _ in range(cfg.num_iterations - 1):  # more updates on the same completions
        losses = [x for g in groups for x in accumulate_gradient(vlm, g, cfg, step_tokens, scaler)]
        updates.append(update(optimizer, scaler, losses, cfg))
    return step_metrics(groups, updates), [row for group in groups for row in sample_rows(group)]


def roll_out(vlm, examples, cfg, generator, stop):
    """Sample G completions of every question. Returns: a list of (example, prompt, completions)."""
    prompts, completions = [encode_example(vlm, example, cfg) for example in examples], []
    settings = cfg.num_generations, cfg.max_completion_length, cfg.temperature
    size = max(1, SAMPLED_AT_ONCE // cfg.num_generations)  # questions
    for i in range(0, len(prompts), size):
        if stop:
            raise Stopped
        completions += vlm.sample_groups(prompts[i : i + size], *settings, generator)
    return list(zip(examples, prompts, completions))


def score_and_reward(vlm, example, prompt, completions, cfg):
    """Score a group and compute its rewards and advantages.

    Returns: (Group, Scores). The scores carry the gradient if the group fits in one forward.
    """
    split = 0 < cfg.completions_per_forward < cfg.num_generations
    with torch.no_grad() if split else nullcontext():
        scores = vlm.score(prompt, completions)
    rewards, inputs = compute_rewards(vlm, example, prompt, completions, scores, cfg)
    total = sum(w * rewards[name] for name, w in parse_weights(cfg.reward_weights).items())
    finite = scores.logps[completions.mask].isfinite().all().item()  # else the update is skipped
    zero_std = finite and total.std().item() < 1e-6  # equal up to rounding
    ref_logps = None
    if cfg.beta and not zero_std:
        with torch.no_grad():
            ref_logps = vlm.score(prompt, completions, attention=False, reference=True).logps
    group = Group(
        example=example,
        prompt=prompt,
        completions=completions,
        rewards=rewards,
        total_reward=total,
        advantages=reward.group_advantages(total),
        zero_std=zero_std,
        old_logps=scores.logps.detach(),
        ref_logps=ref_logps,
        log=attention_metrics(scores.entropy, completions.mask, inputs),
    )
    return group, scores


def compute_rewards(vlm, example, prompt, completions, scores, cfg):
    """All rewards of a group, {name: (G,)}, and the RewardInputs they were computed from."""
    inputs = reward.RewardInputs(
        texts=completions.texts,
        lengths=completions.mask.sum(1).tolist(),
        answer=example.answer,
        attention=reward.align_attention(scores.attention, scores.prompt_attention, cfg.alignment),
        region=example_region(example, prompt.grid).to(vlm.device),
        selected=reward.select_tokens(scores.entropy, completions.mask, cfg.token_fraction),
        format_lengths=parse_ints(cfg.format_lengths),
    )
    rewards = {name: function(inputs) for name, function in reward.REWARDS.items()}
    dtype = {"dtype": torch.float32, "device": vlm.device}
    return {name: torch.as_tensor(value, **dtype) for name, value in rewards.items()}, inputs


def accumulate_gradient(vlm, group, cfg, step_tokens, scaler, scores=None):
    """Backpropagate the loss of a group, one micro-batch at a time.

    Args: step_tokens, completion tokens of the whole step, which normalize the loss; scores of the
    group, reused if they require grad. Returns: a dict per micro-batch, for the log.
    """
    if group.zero_std:
        return []
    size, losses = cfg.completions_per_forward or cfg.num_generations, []
    for i in range(0, cfg.num_generations, size):
        rows = slice(i, i + size)
        completions = group.completions[rows]
        reuse = scores is not None and scores.logps.requires_grad  # the group is one micro-batch
        part = scores if reuse else vlm.score(group.prompt, completions, attention=False)
        ref_logps = group.ref_logps[rows] if cfg.beta else None
        batch = group.old_logps[rows], ref_logps, group.advantages[rows], completions.mask
        loss, stats = reward.grpo_loss(part.logps, *batch, cfg.epsilon, cfg.beta, step_tokens)
        scaler.scale(loss).backward()
        losses.append(stats | {"loss": loss.item(), "tokens": completions.mask.sum().item()})
    return losses


def update(optimizer, scaler, losses, cfg):
    """One update. If loss or gradient is not finite, skip it and halve fp16's loss scale."""
    if losses:  # else there was no backward pass
        scaler.unscale_(optimizer)
    limit = cfg.max_grad_norm if cfg.max_grad_norm > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
    finite = norm.isfinite().item() and all(math.isfinite(x["loss"]) for x in losses)
    if finite:
        optimizer.step()
    if losses:
        scaler.update()
    optimizer.zero_grad()
    return {"losses": losses, "grad_norm": norm.item(), "finite": finite}


def train(cfg):
    """One run, from loading the model to the report. Returns the exit code."""
    torch.manual_seed(cfg.seed)  # initializes LoRA; everything later draws from `generator`
    train_set, eval_set = load_datasets(cfg)
    vlm = load_model(cfg)
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed)
    params = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), cfg.learning_rate, weight_decay=cfg.weight_decay)
    # In fp16, small gradients round to 0 unless the loss is scaled up for the backward pass.
    scaler = torch.amp.GradScaler(vlm.device.type, 2**10, enabled=vlm.dtype == torch.float16)
    run = RunDirectory(cfg, params, optimizer, generator, scaler)
    before = run.read_json("before.json", lambda content: are_results(content, len(eval_set)))
    compare = cfg.adapter and not cfg.max_steps  # no training: the base model beside the adapter
    with vlm.model.disable_adapter() if compare else nullcontext():
        before = before or run.write_json("before.json", evaluate(vlm, eval_set, cfg, "before"))
    warned = set()
    with stop_signals() as stop, tqdm(total=cfg.max_steps, initial=run.step, desc="train") as bar:
        while run.step < cfg.max_steps and not stop:
            rate = optimizer.param_groups[0]["lr"] = learning_rate(cfg, run.step)
            try:
                with run.roll_back_on_interrupt():
                    examples = step_examples(train_set, run.step, cfg)
                    state = optimizer, generator, stop, scaler
                    metrics, samples = train_step(vlm, examples, cfg, *state)
            except Stopped:
                break
            except torch.OutOfMemoryError:
                if not halve_micro_batch(vlm, cfg, run):
                    raise
                continue
            run.log(json_row(metrics | {"learning_rate": rate}), [json_row(row) for row in samples])
            print_alarms(run.step, metrics, warned)
            bar.set_postfix(mean_rewards(metrics), refresh=False)
            bar.update()
            if run.step % cfg.save_steps == 0 or run.step == cfg.max_steps:
                run.save()
    if stop:
        run.save()
        write_report(run, eval_set)
        print(f"stopped after step {run.step}; continue with: {resume_command(cfg.output_dir)}")
        return 130
    run.atomic_write("adapter", vlm.model.save_pretrained)
    after = run.write_json("after.json", evaluate(vlm, eval_set, cfg, "after", before))
    write_report(run, eval_set, before, after)
    print(f"open {run.folder / 'report.html'}; the adapter and the logs are next to it")
    return 0


def load_model(cfg):
    """The model that a Config describes."""
    same = "load_in_4bit lora_r lora_alpha device max_pixels gradient_checkpointing"
    settings = {name: getattr(cfg, name) for name in [*same.split(), "completions_per_forward"]}
    settings |= {"layers": parse_ints(cfg.layers), "heads": parse_ints(cfg.heads)}
    vlm = load_vlm(cfg.model_name_or_path, **settings)
    if cfg.adapter:
        vlm.load_adapter(cfg.adapter)
    if vlm.core.num_parameters() < 1e7:
        torch.set_num_threads(1)  # with tensors this small, threading only adds overhead
    return vlm


def learning_rate(cfg, step):
    """Linear warm-up, then constant or a cosine to 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.lr_scheduler_type == "constant":
        return cfg.learning_rate
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def main(argv=None, train=train, program="python sayo_mini.py"):
    """The command line; scale_trl.py passes its own `train`. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors(argv, program) as outcome:
        command, given, notice = parse_command_line(argv, program)
        if notice:
            print(notice)
        if command == "train":
            outcome.exit_code = train(run_config(given))
        else:
            outcome.exit_code = run_subcommand(command, given, load_model, train_step)
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
