"""sayo-mini: reinforcement learning of where a vision-language model looks, on one GPU.

GRPO with SAYO's reward: how much denser attention is on the annotated region than on the whole
image, at the tokens where the model is least certain. Start at `train_step`; see docs/algorithm.md.
"""

import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("sayo_mini.py needs Python 3.10 or newer")
from config import (
    InputError,
    check_command_line,
    check_paths,
    one_line,
    parse_command_line,
    parse_lengths,
    parse_weights,
)

if __name__ == "__main__":  # answer --help and refuse bad flags before torch takes seconds to load
    check_command_line(sys.argv[1:])
# Tensors of many different lengths would fragment GPU memory. This setting needs Linux.
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# On H100 and B200, cuDNN's attention spends 20 to 500 ms on planning at every new length.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # its checks wait for the GPU
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled; saves a second

import torch
from tqdm import tqdm

import reward
from checkpoint import (
    RunDirectory,
    continue_exactly,
    open_tracker,
    resume_command,
    run_config,
    stop_signals,
)
from data import Example, encode_example, example_region, load_datasets, step_examples
from evaluate import evaluate, opening_lines, results_text
from metrics import Alarms, attention_metrics, sample_rows, step_metrics
from model import Completions, Prompt, load_model

NO_SCALER = torch.amp.GradScaler(enabled=False)


@dataclass
class Group:
    """One question and its G completions of up to C tokens. `score_and_reward` fills the rest."""

    example: Example
    prompt: Prompt
    completions: Completions
    rewards: dict[str, torch.Tensor] = None  # name -> (G,), unweighted
    total_reward: torch.Tensor = None  # (G,), the weighted sum
    advantages: torch.Tensor = None  # (G,)
    old_logps: torch.Tensor = None  # (G, C) before the first update of the step
    ref_logps: torch.Tensor = None  # (G, C) under the model without adapter, for the KL
    metrics: dict[str, float] = None  # means over the group
    in_loss: bool = True  # false if all its rewards are equal: there is nothing to learn from


def train_step(vlm, examples, cfg, optimizer, generator, scaler=NO_SCALER):
    """One step of GRPO: sample G completions of every question, score and reward them, update.

    One forward pass with gradient gives the log-probabilities, entropies and attention of a group.
    `completions_per_forward` below G scores a group in parts, with the same gradient and less
    memory, see `Vlm.score_groups`; from 2 G, several groups share a forward; 0 is one group.
    Args: scaler, a GradScaler for a model in fp16.
    Returns: (metrics, see `step_metrics`; samples, a dict per completion).
    """
    groups = sample(vlm, examples, cfg, generator)
    # The loss is a mean over all tokens of the step, those of skipped groups included. So the
    # weight of a token does not depend on how many groups are skipped.
    step_tokens = sum(group.completions.mask.sum().item() for group in groups)
    per_forward = max(1, cfg.completions_per_forward // cfg.num_generations)  # groups
    updates = []
    for iteration in range(cfg.num_iterations):
        stats = []
        for i in range(0, len(groups), per_forward):
            batch = groups[i : i + per_forward]
            prompts, completions = [g.prompt for g in batch], [g.completions for g in batch]
            # This forward serves twice: for the rewards and, through log p, for the gradient.
            scores = vlm.score_groups(prompts, completions, attention=iteration == 0)
            if iteration == 0:  # later iterations keep these rewards and old_logps
                score_and_reward(vlm, batch, scores, cfg)
            if any(group.in_loss for group in batch):
                loss, batch_stats = batch_loss(batch, scores, cfg, step_tokens)
                loss = loss.to(vlm.device, non_blocking=True)  # the scores are on the CPU
                scaler.scale(loss).backward()  # loss.backward(), except in fp16
                stats += batch_stats
            del scores  # frees the graph of a batch without a backward pass
        updates.append(update(optimizer, scaler, stats, cfg))
    return step_metrics(groups, updates), sample_rows(groups)


def sample(vlm, examples, cfg, generator):
    """Sample G completions of every question. Returns: a list of Group."""
    prompts = [encode_example(vlm, example, cfg) for example in examples]
    settings = cfg.num_generations, cfg.max_completion_length, cfg.temperature
    completions = vlm.sample_groups(prompts, *settings, generator)
    return [Group(*parts) for parts in zip(examples, prompts, completions)]


def score_and_reward(vlm, groups, scores, cfg):
    """Fill in the rewards, advantages, and old and reference log-probabilities of the groups of one
    forward. Args: scores, a Scores per group."""
    weights = parse_weights(cfg.reward_weights)
    for group, score in zip(groups, scores):
        mask = group.completions.mask
        parts = group.example, group.prompt, group.completions
        group.rewards, inputs = compute_rewards(*parts, score, cfg)
        group.total_reward = sum(w * group.rewards[name] for name, w in weights.items())
        group.advantages = reward.group_advantages(group.total_reward)
        group.old_logps = score.logps.detach()
        equal = group.total_reward.std().item() < 1e-6  # up to rounding
        broken = not group.old_logps[mask].isfinite().all().item()
        group.in_loss = broken or not equal  # with a broken group, `update` skips the step
        group.metrics = attention_metrics(score.entropy, mask, inputs)
    if cfg.beta and any(group.in_loss for group in groups):
        with torch.no_grad():  # with gradient, checkpointing would recompute with the adapter on
            prompts, completions = [g.prompt for g in groups], [g.completions for g in groups]
            references = vlm.score_groups(prompts, completions, attention=False, reference=True)
        for group, reference in zip(groups, references):
            group.ref_logps = reference.logps


def compute_rewards(example, prompt, completions, scores, cfg):
    """All rewards of a group, {name: (G,)}, and the RewardInputs they were computed from."""
    region = example_region(example, prompt.grid)
    if cfg.region == "rolled":  # a placebo: the same size, but the wrong place
        shift = [side // 2 for side in prompt.grid]
        region = region.view(prompt.grid).roll(shift, (0, 1)).flatten()
    inputs = reward.RewardInputs(
        texts=completions.texts,
        lengths=completions.mask.sum(1).tolist(),
        answer=example.answer,
        attention=reward.align_attention(scores.attention, scores.prompt_attention, cfg.alignment),
        region=region,
        selected=reward.select_tokens(scores.entropy, completions.mask, cfg.token_fraction),
        format_lengths=parse_lengths(cfg.format_lengths),
        example=example,
        prompt=prompt,
        completions=completions,
    )
    rewards = {}
    for name, function in cfg.rewards.items():
        returned = function(inputs)
        values = torch.as_tensor(math.nan if returned is None else returned, dtype=torch.float32)
        # NaN from NaN is no mistake of the reward: `update` skips the step.
        usable = values.isfinite().all() or not inputs.attention.isfinite().all()
        valid = usable and values.shape == (len(inputs.texts),)
        if name not in reward.REWARDS and not valid:
            wanted = f"{len(inputs.texts)} finite numbers, one per completion"
            raise InputError(f"--reward: {name} must return {wanted}, not {str(returned):.40}")
        rewards[name] = values.cpu()
    return rewards, inputs


def try_rewards(vlm, example, cfg):
    """Call every reward once, so that a mistake in yours shows before the first evaluation."""
    (group,) = sample(vlm, [example], cfg, torch.Generator(vlm.device))
    with torch.no_grad():
        scores = vlm.score(group.prompt, group.completions)
    compute_rewards(example, group.prompt, group.completions, scores, cfg)


def batch_loss(groups, scores, cfg, step_tokens):
    """The loss of the groups of one forward, the sum over those that are in the loss.

    Args: step_tokens, completion tokens of the whole step, which normalize the loss.
    Returns: (loss, a list with a dict per group for the log).
    """
    loss, stats = 0, []
    for group, score in zip(groups, scores):
        if group.in_loss:
            group_loss, group_stats = reward.grpo_loss(
                score.logps,
                group.old_logps,
                group.ref_logps,
                group.advantages,
                group.completions.mask,
                clip=cfg.epsilon,
                beta=cfg.beta,
                denominator=step_tokens,
            )
            loss = loss + group_loss
            tokens = group.completions.mask.sum().item()
            stats.append(group_stats | {"loss": group_loss.item(), "tokens": tokens})
    return loss, stats


def update(optimizer, scaler, stats, cfg):
    """One update. It is skipped if loss or gradient is not finite; in fp16, the GradScaler then
    lowers the loss scale. Args: stats, a dict per group that had a backward pass."""
    if not stats:
        return {"stats": stats, "grad_norm": 0.0, "finite": True}
    scaler.unscale_(optimizer)
    limit = cfg.max_grad_norm if cfg.max_grad_norm > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], limit)
    norm = norm.item()
    finite = math.isfinite(norm) and all(math.isfinite(x["loss"]) for x in stats)
    if finite:  # scaler.step would check only the gradient, and only in fp16
        optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    return {"stats": stats, "grad_norm": norm, "finite": finite}


def train(cfg):
    """One run, from loading the model to the report. Returns the exit code."""
    names = list(cfg.rewards)  # runs the file of --reward
    torch.manual_seed(cfg.seed)  # for LoRA's initial weights; sampling draws from `generator`
    torch.use_deterministic_algorithms(cfg.deterministic)
    train_set, eval_set = load_datasets(cfg)
    continue_exactly(cfg, eval_set)
    print(opening_lines(train_set, eval_set, cfg))
    vlm = load_model(cfg)
    if cfg.reward and cfg.max_steps:
        try_rewards(vlm, train_set[0], cfg)
    generator = torch.Generator(vlm.device).manual_seed(cfg.seed)
    params = {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), cfg.learning_rate, weight_decay=cfg.weight_decay)
    # In fp16, small gradients round to 0 unless the loss is scaled up for the backward pass.
    scaler = torch.amp.GradScaler(vlm.device.type, 2**10, enabled=vlm.dtype == torch.float16)
    run = RunDirectory(cfg, params, optimizer, generator, scaler, eval_set)
    run.tracker = open_tracker(cfg.report_to, run)
    before = run.read_json("before.json")
    if before is None:
        compare = cfg.adapter and not cfg.max_steps  # compare an adapter with its base model
        with vlm.model.disable_adapter() if compare else nullcontext():
            before = run.write_json("before.json", evaluate(vlm, eval_set, cfg, "before"))
    alarms = Alarms(cfg, run.history())
    if not (run.folder / "best").exists():  # a kill while it is replaced leaves none
        alarms.forget_best()
    with stop_signals() as stop, tqdm(total=cfg.max_steps, initial=run.step, desc="train") as bar:
        while run.step < cfg.max_steps and not stop:
            start = time.perf_counter()
            rate = optimizer.param_groups[0]["lr"] = learning_rate(cfg, run.step)
            examples = step_examples(train_set, run.step, cfg)
            metrics, samples = train_step(vlm, examples, cfg, optimizer, generator, scaler)
            metrics["learning_rate"] = rate
            run.log(metrics, samples, seconds=time.perf_counter() - start)
            alarms.check(metrics, run.step)
            bar.set_postfix({n: metrics[f"rewards/{n}/mean"] for n in names}, refresh=False)
            bar.update()
            if run.step % cfg.save_steps == 0 or run.step == cfg.max_steps:
                if cfg.keep_best and alarms.is_best():
                    run.save_adapter(vlm.model, "best")
                    tqdm.write(f"step {run.step}: the best so far, saved in best/")
                run.save()
    if stop:
        run.save()
    else:
        if cfg.keep_best and run.step:
            vlm.load_adapter(run.folder / "best")
        run.save_adapter(vlm.model)
        after = run.write_json("after.json", evaluate(vlm, eval_set, cfg, "after", before))
        print(results_text(before, after) if after else "no held-out questions: not evaluated")
    from extras.report import write_report  # here, because no step needs it

    write_report(run, eval_set)
    if stop:
        print(f"stopped after step {run.step}; continue with: {resume_command(run.folder)}")
        return 130
    print(f"open {run.folder / 'report.html'}; the adapter and the logs are next to it")
    return 0


def learning_rate(cfg, step):
    """Linear warm-up, then constant or a cosine toward 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.lr_scheduler_type == "constant":
        return cfg.learning_rate
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def main(argv=None):
    """The command line. Returns the exit code: 2 after an error, which prints one line, and 130
    after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    folder, started = None, time.time()
    try:
        command, given = parse_command_line(argv)
        check_paths(given)
        if command == "train":
            folder = given.get("output_dir", "runs/sayo")
            return train(run_config(given))
        from extras.commands import run_command

        return run_command(command, given)
    except KeyboardInterrupt:  # outside the loop
        print(f"stopped{continue_hint(folder, started)}")
        return 130
    except Exception as error:  # also a full disk, a lost GPU, a mistake in this program
        hint = "" if isinstance(error, InputError) else continue_hint(folder, started)
        print(f"sayo_mini.py: {one_line(error, folder)}{hint}", file=sys.stderr)
        return 2


def continue_hint(folder, started):
    """How to continue, if this program wrote config.json; an older one may be of another run."""
    config = os.path.join(folder or "", "config.json")
    if folder and os.path.exists(config) and os.path.getmtime(config) >= started:
        return f"; continue with: {resume_command(folder)}"
    return "; nothing new was saved"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see check_command_line
    sys.exit(main())
