"""sayo-mini: reinforcement learning of where a vision-language model looks, on one GPU.

GRPO with SAYO's reward: how much denser attention is on the annotated region than on the whole
image, at the tokens where the model is least certain. Start at `train_step`; see docs/algorithm.md.
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass

sys.path.insert(0, __file__.removesuffix("sayo_mini.py"))  # for `python -m sayo_mini.sayo_mini`
from runtime.parser import check_command_line, parse_command_line, run_config

if __name__ == "__main__":  # answer --help and refuse bad flags before torch takes seconds to load
    check_command_line(sys.argv[1:])

import torch
from tqdm import tqdm

import reward
from analysis.alarms import print_alarms
from analysis.evaluate import are_results, evaluate
from analysis.metrics import attention_metrics, json_row, mean_rewards, sample_rows, step_metrics
from analysis.report import save_adapter, write_report
from checkpoint import RunDirectory, resume_command
from commands import run_subcommand
from config import parse_ints, parse_weights
from data import Example, encode_example, example_region
from model import Completions, Prompt, load_vlm
from runtime.errors import one_line_errors
from runtime.out_of_memory import halve_micro_batch
from runtime.signals import Stopped, stop_signals
from sources import load_datasets, step_examples

SAMPLED_AT_ONCE = 64  # completions; up to about this many, each extra one costs little time
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
    log: dict[str, float]  # means over the group
    ref_logps: torch.Tensor | None = None  # (G, C) under the model before training, for the KL


def train_step(vlm, examples, cfg, optimizer, generator, stop=(), scaler=NO_LOSS_SCALE):
    """One batch of questions: sample completions, reward them, update the adapter.

    Each group takes three forwards of P + G*C tokens: sampling, reference (unless `beta` is 0), and
    one for rewards and gradient; a fourth if `completions_per_forward` splits the group.
    Args: scaler, a GradScaler for a model in fp16. Returns: (metrics, see `step_metrics`; samples,
    a dict per completion). Raises: Stopped once `stop` is non-empty, never after an update.
    """
    rollouts = roll_out(vlm, examples, cfg, generator, stop)
    step_tokens = sum(completions.mask.sum().item() for *_, completions in rollouts)
    size = max(1, cfg.completions_per_forward // cfg.num_generations)  # groups per forward
    groups, losses = [], []
    for i in range(0, len(rollouts), size):  # one batch's activations are in memory at a time
        if stop:
            raise Stopped
        batch, scores = score_and_reward(vlm, rollouts[i : i + size], cfg)
        groups += batch
        losses += accumulate_gradient(vlm, batch, cfg, step_tokens, scaler, scores)
    updates = [update(optimizer, scaler, losses, cfg)]
    for _ in range(cfg.num_iterations - 1):  # more updates on the same completions
        batches = [groups[i : i + size] for i in range(0, len(groups), size)]
        losses = [accumulate_gradient(vlm, batch, cfg, step_tokens, scaler) for batch in batches]
        updates.append(update(optimizer, scaler, sum(losses, []), cfg))
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


def score_and_reward(vlm, rollouts, cfg):
    """Score the groups of one forward, and compute their rewards and advantages.

    Returns: a list of Group and a list of Scores, which carry the gradient if no group is split.
    """
    split, groups = 0 < cfg.completions_per_forward < cfg.num_generations, []
    _, prompts, completions = zip(*rollouts)
    with torch.no_grad() if split else nullcontext():
        scores = vlm.score_groups(prompts, completions)
    for rollout, part in zip(rollouts, scores):
        rewards, inputs = compute_rewards(vlm, *rollout, part, cfg)
        total = sum(w * rewards[name] for name, w in parse_weights(cfg.reward_weights).items())
        mask, old_logps = rollout[-1].mask, part.logps.detach()
        finite = old_logps[mask].isfinite().all().item()  # if not, `update` skips the step
        zero_std = finite and total.std().item() < 1e-6  # equal up to rounding
        values = rewards, total, reward.group_advantages(total), zero_std, old_logps
        groups.append(Group(*rollout, *values, attention_metrics(part.entropy, mask, inputs)))
    if cfg.beta and not all(group.zero_std for group in groups):
        with torch.no_grad():
            references = vlm.score_groups(prompts, completions, attention=False, reference=True)
        for group, reference in zip(groups, references):
            group.ref_logps = reference.logps
    return groups, scores


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


def accumulate_gradient(vlm, groups, cfg, step_tokens, scaler, scores=None):
    """Backpropagate the loss of the groups of one forward, or of one group in micro-batches.

    Args: step_tokens, completion tokens of the whole step, which normalize the loss; scores of the
    groups, reused if they require grad. Returns: a dict per group or micro-batch, for the log.
    """
    reuse = scores is not None and scores[0].logps.requires_grad
    kept = [i for i, group in enumerate(groups) if not group.zero_std]
    groups, losses = [groups[i] for i in kept], []
    size = cfg.completions_per_forward or cfg.num_generations
    for i in range(0, cfg.num_generations, size) if groups else ():
        rows, total = slice(i, i + size), 0
        batch = [g.prompt for g in groups], [g.completions[rows] for g in groups]
        parts = [scores[k] for k in kept] if reuse else vlm.score_groups(*batch, attention=False)
        for g, completions, part in zip(groups, batch[1], parts):
            ref_logps = g.ref_logps[rows] if cfg.beta else None
            fixed = g.old_logps[rows], ref_logps, g.advantages[rows], completions.mask
            loss, stats = reward.grpo_loss(part.logps, *fixed, cfg.epsilon, cfg.beta, step_tokens)
            losses.append(stats | {"loss": loss.item(), "tokens": completions.mask.sum().item()})
            total = total + loss
        scaler.scale(total).backward()
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
    torch.manual_seed(cfg.seed)  # for LoRA's initial weights; sampling draws from `generator`
    train_set, eval_set = load_datasets(cfg)
    vlm = load_model(cfg)
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed)
    params = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), cfg.learning_rate, weight_decay=cfg.weight_decay)
    # In fp16, small gradients round to 0 unless the loss is scaled up for the backward pass.
    scaler = torch.amp.GradScaler(vlm.device.type, 2**10, enabled=vlm.dtype == torch.float16)
    run = RunDirectory(cfg, params, optimizer, generator, scaler)
    before = run.read_json("before.json", lambda content: are_results(content, len(eval_set)))
    compare = cfg.adapter and not cfg.max_steps  # no training: base model against adapter
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
            print_alarms(run.history, cfg, warned)
            bar.set_postfix(mean_rewards(metrics), refresh=False)
            bar.update()
            if run.step % cfg.save_steps == 0 or run.step == cfg.max_steps:
                run.save()
    if stop:
        run.save()
        write_report(run, eval_set)
        print(f"stopped after step {run.step}; continue with: {resume_command(cfg.output_dir)}")
        return 130
    run.use_best()
    save_adapter(run, vlm.model)
    after = run.write_json("after.json", evaluate(vlm, eval_set, cfg, "after", before))
    write_report(run, eval_set, before, after)
    print(f"open {run.folder / 'report.html'}; the adapter and the logs are next to it")
    return 0


def load_model(cfg):
    """The model that a Config describes."""
    names = "load_in_4bit lora_r lora_alpha device max_pixels gradient_checkpointing"
    settings = {name: getattr(cfg, name) for name in [*names.split(), "completions_per_forward"]}
    settings |= {"layers": parse_ints(cfg.layers), "heads": parse_ints(cfg.heads)}
    vlm = load_vlm(cfg.model_name_or_path, **settings)
    vlm.cuda_graph = cfg.cuda_graph
    if cfg.adapter:
        vlm.load_adapter(cfg.adapter)
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
