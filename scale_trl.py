"""More than one GPU: SAYO's reward in TRL's GRPOTrainer, with the flags, data and adapters of sayo_mini.py. The README,
"When one GPU is not enough", says how to start it, what works, and where TRL does otherwise than sayo_mini.py."""

import json
import os
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

import reward as R
import sayo_mini
from config import REWARDS, numbers, weights
from data import Example, InputError, example_region
from evaluate import ask, asked
from model import Completions
from run import Run

SHARDED = "every process needs all weights, so no ZeRO-3 and no FSDP: launch with DDP, ZeRO-1 or ZeRO-2"


class Processor(ProcessorMixin):
    """What TRL wants of a Qwen-VL processor, from the two halves that need no torchvision."""

    return_mm_token_type_ids, text_kwargs = True, {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        patches, cell = image_inputs["image_grid_thw"][image_idx].prod(), self.image_processor.merge_size**2
        return self.image_token * int(patches // cell)


class SayoReward:
    """SAYO's attention reward as a reward function of TRL, read from the policy that is being trained.

    Args: vlm, a `Vlm` around the trainer's own module; cfg, a `Config`. A call takes B rows of TRL, groups or parts:
    a row's score does not depend on its siblings. Returns: B floats in [-1, 1]. Raises: InputError, in one line why."""

    __name__ = "attention"  # TRL logs rewards/attention/mean

    def __init__(self, vlm, cfg):
        self.vlm, self.cfg = vlm, cfg
        if any(hasattr(p, "ds_id") for p in vlm.model.parameters()):  # DeepSpeed's mark on what it has dealt out
            raise InputError(SHARDED)

    @torch.no_grad()
    def __call__(self, prompts, completions, completion_ids, image, question, answer, boxes, id, **columns):
        training, rewards, rest = self.vlm.model.training, [], iter(completion_ids)
        for example, rows in groupby(map(Example, image, question, answer, boxes, id)):
            ids = [torch.tensor(next(rest), device=self.vlm.device) for _ in rows]
            mask = pad_sequence([torch.ones_like(row).bool() for row in ids], batch_first=True)  # (G, C)
            ids, prompt = pad_sequence(ids, batch_first=True), ask(self.vlm, example, self.cfg)
            scores = self.vlm.score(prompt, Completions(ids, mask, temperature=self.cfg.temperature))
            selected = R.select_tokens(scores.entropy, mask, self.cfg.token_fraction)
            attention = R.align_attention(scores.attention, scores.prompt_attention, self.cfg.alignment)
            region = example_region(example, prompt.grid).to(self.vlm.device)
            rewards += R.attention_reward(attention, region, selected).tolist()
        self.vlm.model.train(training)  # scoring has switched to eval mode
        return rewards

    def format(self, prompts, completions, completion_ids, **columns):
        lengths, texts = numbers(self.cfg.format_lengths), [c[0]["content"] for c in completions]
        return [R.format_reward(text, len(ids), *lengths) for text, ids in zip(texts, completion_ids)]

    def accuracy(self, prompts, completions, completion_ids, answer, **columns):
        return [R.accuracy_reward(c[0]["content"], right) for c, right in zip(completions, answer)]


def questions(train_set, cfg):
    """The run's questions in the order of sayo_mini.py, a row each; an image is read when its turn comes."""

    def read(batch):
        found = {k: train_set[sayo_mini.shuffled(k, len(train_set), cfg.seed)] for k in set(batch["place"])}
        examples = [found[k] for k in batch["place"]]
        prompts = [[{"role": "user", "content": asked(e, cfg)}] for e in examples]
        return {"prompt": prompts} | {name: [getattr(e, name) for e in examples] for name in Example.__annotations__}

    return Dataset.from_dict({"place": range(cfg.max_steps * cfg.prompts_per_step)}).with_transform(read)


def settings(cfg):
    """A Config as TRL's. Raises: InputError if there is nothing to deal out evenly, or weights are to be sharded."""
    rows, odd = divmod(cfg.prompts_per_step * cfg.num_generations, int(os.environ.get("WORLD_SIZE", 1)))
    if odd or not cfg.max_steps:
        raise InputError("--max_steps must be above 0, --prompts_per_step x --num_generations a multiple of processes")
    size = max(n for n in range(1, (cfg.completions_per_forward or cfg.num_generations) + 1) if rows % n == 0)
    same = ("output_dir", "num_generations", "num_iterations", "max_completion_length", "temperature", "beta", "seed",
            "epsilon", "learning_rate", "weight_decay", "max_grad_norm", "gradient_checkpointing")  # fmt: skip
    args = GRPOConfig(
        **{name: getattr(cfg, name) for name in same}, loss_type="dapo", use_bias_correction_kl=False,  # as grpo_loss
        reward_weights=[weights(cfg.reward_weights).get(name, 0.0) for name in REWARDS], shuffle_dataset=False,
        max_steps=cfg.max_steps * cfg.num_iterations, save_steps=cfg.save_steps * cfg.num_iterations,  # TRL's: updates
        per_device_train_batch_size=size, gradient_accumulation_steps=rows // size, bf16=False, save_total_limit=2,
        use_cpu=cfg.device == "cpu" or not torch.cuda.is_available(), report_to="none", logging_steps=1)  # fmt: skip
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3:
        raise InputError(SHARDED)
    return args


def make_trainer(cfg, args, vlm, train_set):
    def schedule(num_training_steps, optimizer=None):  # DeepSpeed would drop one handed over ready-made
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or trainer.optimizer, lambda i:
            sayo_mini.learning_rate(cfg, i // cfg.num_iterations) / (cfg.learning_rate or 1))  # fmt: skip

    head, score = vlm.core.lm_head, SayoReward(vlm, cfg)
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    head.bias[vlm.placeholders] = -1e4  # TRL would sample and score them as words; a bias it honours in both
    params = {p: p.data.clone() for p in vlm.model.parameters() if p.requires_grad}
    rewards, processor = [score, score.format, score.accuracy], Processor(vlm.image_processor, vlm.tokenizer)
    trainer = GRPOTrainer(vlm.model, rewards, args, questions(train_set, cfg), processing_class=processor)
    if cfg.beta:
        vlm.model.delete_adapter("ref")  # a copy that TRL has made; here the reference is the adapter switched off
    for p, value in params.items():
        p.data = value  # over four bits TRL rounds LoRA to bf16, in which steps of 5e-6 vanish
    trainer.create_scheduler = schedule
    return trainer


def train(cfg):
    """In place of `sayo_mini.train`, in every process; the first one writes. Returns the exit code."""
    args = settings(cfg)
    torch.manual_seed(cfg.seed)
    (train_set, _), vlm = sayo_mini.load_data(cfg), sayo_mini.load(replace(cfg, device=str(args.device)))
    args.distributed_state.wait_for_everyone()  # till all have seen that the folder holds no run yet
    run = Run(replace(cfg, resume=False), {}, None, None) if args.process_index == 0 else None
    trainer = make_trainer(cfg, args, vlm, train_set)
    found = Path(cfg.output_dir).glob("checkpoint-*/trainer_state.json")  # a checkpoint's last file: it is whole
    last = max((path.parent for path in found), key=lambda p: int(p.name[11:]), default=None) if cfg.resume else None
    print(f"resuming {last}" if last else f"no checkpoint in {cfg.output_dir} yet: starting from the beginning")
    trainer.train(resume_from_checkpoint=last)
    if run:
        run.publish({"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in trainer.state.log_history)})
        run.replace("adapter", vlm.model.save_pretrained)
    return 0


if __name__ == "__main__":
    sys.stdout = open(os.devnull, "w") if int(os.environ.get("RANK", 0)) else sys.stdout  # the first speaks for all
    sys.exit(sayo_mini.main(train=train, program="accelerate launch scale_trl.py"))
