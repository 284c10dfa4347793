"""More than one GPU: SAYO's rewards in TRL's GRPOTrainer, with the flags, data sets and adapters of
sayo_mini.py. docs/scaling.md explains how to start it, what works, and how TRL differs."""

import json
import os
import sys
from dataclasses import replace
from itertools import groupby

from runtime.parser import check_command_line
from runtime.signals import leave

PROGRAM = "accelerate launch scale_trl.py"
if __name__ == "__main__":  # before torch loads, as in sayo_mini.py
    if int(os.environ.get("RANK", 0)):  # only the first process prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    check_command_line(sys.argv[1:], PROGRAM)

import torch
from trl import GRPOConfig, GRPOTrainer

import sayo_mini
from checkpoint import RunDirectory
from config import InputError, parse_weights
from data import Example, encode_example
from reward import REWARDS
from runtime.run_folder import remove
from sources import epoch_index, load_datasets
from sources.pretrained import choose_device
from sources.trl import (
    TrlProcessor,
    completions_per_process,
    configure_trainer,
    forbid_placeholders,
    last_checkpoint,
    pack_completions,
    trl_dataset,
)

SHARDED = "every process needs all weights: use DDP, ZeRO-1 or ZeRO-2, not ZeRO-3 or FSDP"


class SayoRewards:
    """Every reward of `reward.REWARDS` as a reward function of TRL.

    The policy in training, `vlm`, scores a batch of B rows once for all functions. A batch may
    split a group, as rows are rewarded one by one. Raises: InputError if the weights are sharded.
    """

    def __init__(self, vlm, cfg):
        self.vlm, self.cfg, self.batch, self.rewards = vlm, cfg, None, None
        if any(hasattr(p, "ds_id") for p in vlm.model.parameters()):  # DeepSpeed ZeRO-3
            raise InputError(SHARDED)

    def function(self, name):
        def rewards(prompts, completions, completion_ids, **columns):  # B floats
            if completion_ids is not self.batch:
                self.batch, self.rewards = completion_ids, self.score(completion_ids, **columns)
            return self.rewards[name]

        rewards.__name__ = name  # TRL logs rewards/<name>/mean
        return rewards

    @torch.no_grad()
    def score(self, completion_ids, image, question, answer, boxes, id, **columns):
        training, ids = self.vlm.model.training, iter(completion_ids)
        rewards = {name: [] for name in REWARDS}
        for example, rows in groupby(map(Example, image, question, answer, boxes, id)):
            group = [next(ids) for _ in rows]
            completions = pack_completions(self.vlm, group, self.cfg.temperature)
            prompt = encode_example(self.vlm, example, self.cfg)
            batch = example, prompt, completions, self.vlm.score(prompt, completions)
            for name, values in sayo_mini.compute_rewards(self.vlm, *batch, self.cfg)[0].items():
                rewards[name] += values.tolist()
        self.vlm.model.train(training)  # scoring switches to eval mode
        return rewards


def trl_config(cfg):
    """A Config as a GRPOConfig. Raises: InputError if the completions of a step cannot be divided
    evenly among the processes, or if the launcher shards the weights."""
    rows = completions_per_process(cfg)
    most = cfg.completions_per_forward or cfg.num_generations
    batch = max(n for n in range(1, most + 1) if rows % n == 0)
    same = "output_dir num_generations num_iterations max_completion_length temperature beta seed "
    same += "epsilon learning_rate weight_decay max_grad_norm"
    weights = parse_weights(cfg.reward_weights)
    loss = {"loss_type": "dapo", "use_bias_correction_kl": False}  # those of reward.grpo_loss
    args = GRPOConfig(
        **{name: getattr(cfg, name) for name in same.split()} | loss,
        reward_weights=[weights.get(name, 0.0) for name in REWARDS],
        max_steps=cfg.max_steps * cfg.num_iterations,  # TRL counts updates
        save_steps=cfg.save_steps * cfg.num_iterations,
        save_total_limit=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=rows // batch,
        shuffle_dataset=False,
        activation_checkpointing=cfg.gradient_checkpointing,
        bf16=False,  # the weights have their types already
        fp16=choose_device(cfg.device)[1] == torch.float16,  # for the loss scale
        use_cpu=cfg.device == "cpu" or not torch.cuda.is_available(),
        report_to="none",
        logging_steps=1,
    )
    zero_stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or zero_stage == 3:
        raise InputError(SHARDED)
    return args


def make_trainer(cfg, args, vlm, train_set):
    forbid_placeholders(vlm)
    rewards, processor = SayoRewards(vlm, cfg), TrlProcessor(vlm.image_processor, vlm.tokenizer)
    functions = [rewards.function(name) for name in REWARDS]
    count, n = cfg.max_steps * cfg.prompts_per_step, len(train_set)
    data = trl_dataset(train_set, count, lambda k: epoch_index(k, n, cfg.seed), cfg)
    adapter = {p: p.data.clone() for p in vlm.model.parameters() if p.requires_grad}
    trainer = GRPOTrainer(vlm.model, functions, args, data, processing_class=processor)
    for p, value in adapter.items():
        p.data = value  # over 4 bits TRL rounds LoRA to bf16, in which steps of 5e-6 vanish
    if cfg.beta:
        vlm.model.delete_adapter("ref")  # TRL's copy; the reference is the adapter switched off
    configure_trainer(trainer, lambda i: sayo_mini.learning_rate(cfg, i // cfg.num_iterations))
    return trainer


def train(cfg):
    """Replaces `sayo_mini.train` and runs in every process; only rank 0 writes. Returns: 0."""
    args = trl_config(cfg)
    torch.manual_seed(cfg.seed)
    train_set, _ = load_datasets(cfg)
    vlm = sayo_mini.load_model(replace(cfg, device=str(args.device)))
    args.distributed_state.wait_for_everyone()  # until every rank has checked the folder
    run = None if args.process_index else RunDirectory(replace(cfg, resume=False), {}, None, None)
    trainer = make_trainer(cfg, args, vlm, train_set)
    last = last_checkpoint(cfg.output_dir) if cfg.resume else None
    print(f"resuming {last}" if last else f"starting from the beginning in {cfg.output_dir}")
    trainer.train(resume_from_checkpoint=last)
    if run:
        rows = (json.dumps(row) + "\n" for row in trainer.state.log_history)
        run.write_texts({"metrics.jsonl": "".join(rows)})
        sayo_mini.save_adapter(run, vlm.model)
        remove(run.folder / "samples.jsonl")  # TRL logs no samples
    print(f"the adapter is in {cfg.output_dir}/adapter, the log in {cfg.output_dir}/metrics.jsonl")
    return 0


if __name__ == "__main__":
    leave(sayo_mini.main(train=train, program=PROGRAM))
