"""More than one GPU: SAYO's reward in TRL's GRPOTrainer, with the flags, data and adapters of sayo_mini.py.

accelerate launch scale_trl.py --output_dir runs/trl --dataset mine.jsonl

The README ("When one GPU is not enough") says what works, what does not, and where TRL does otherwise.
"""

import json
import math
import os
import shlex
import signal
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import reward as R
from config import REWARDS, numbers, parse, weights
from data import Example, InputError, example_region
from evaluate import ask, asked
from model import Completions
from run import CHECKPOINTS
from sayo_mini import learning_rate, load, load_data, shuffled

SHARDED = "every process needs all weights: no ZeRO-3 and no FSDP; launch with DDP, ZeRO-1 or ZeRO-2"


class Processor(ProcessorMixin):
    """What TRL wants of a Qwen-VL processor, from the two halves that need no torchvision."""

    return_mm_token_type_ids = True
    text_kwargs = {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        patches = image_inputs["image_grid_thw"][image_idx].prod()
        return self.image_token * int(patches // self.image_processor.merge_size**2)


class SayoReward:
    """SAYO's attention reward as a reward function of TRL, read from the policy that is being trained.

    Args: vlm, a `model.Vlm` around the very module that the trainer has; cfg, a `Config`. A call takes what TRL gives
    (B rows: completion_ids, lists of token ids, and the data's columns) and returns B floats in [-1, 1]. A row's score
    does not depend on its siblings, so a process may hold part of a group: what it holds of one is scored together.
    Raises: InputError if the weights are sharded, or naming an example that cannot be used.
    """

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
            mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in ids], batch_first=True)  # (G, C)
            ids = pad_sequence(ids, batch_first=True)  # (G, C)
            prompt = ask(self.vlm, example, self.cfg)
            scores = self.vlm.score(prompt, Completions(ids, mask, temperature=self.cfg.temperature))
            selected = R.select_tokens(scores.entropy, mask, self.cfg.token_fraction)
            attention = R.align_attention(scores.attention, scores.prompt_attention, self.cfg.alignment)
            region = example_region(example, prompt.grid).to(self.vlm.device)
            rewards += R.attention_reward(attention, region, selected).tolist()
        self.vlm.model.train(training)  # scoring has switched to eval mode
        return rewards


def format(completions, completion_ids, lengths, **columns):
    """`reward.format_reward` of B rows."""
    return [R.format_reward(c[0]["content"], len(ids), *lengths) for c, ids in zip(completions, completion_ids)]


def accuracy(completions, answer, **columns):
    """`reward.accuracy_reward` of B rows."""
    return [R.accuracy_reward(c[0]["content"], a) for c, a in zip(completions, answer)]


def questions(train_set, cfg):
    """The run's questions in the order of sayo_mini.py: a row each, its image read when its turn comes."""

    def read(batch):
        found = {k: train_set[shuffled(k, len(train_set), cfg.seed)] for k in set(batch["place"])}
        examples = [found[k] for k in batch["place"]]
        prompts = [[{"role": "user", "content": asked(e, cfg)}] for e in examples]
        return {"prompt": prompts} | {name: [getattr(e, name) for e in examples] for name in Example.__annotations__}

    return Dataset.from_dict({"place": range(cfg.max_steps * cfg.prompts_per_step)}).with_transform(read)


def settings(cfg):
    """A Config as TRL's. Raises: InputError if the answers of a step cannot be dealt out evenly."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows, odd = divmod(cfg.prompts_per_step * cfg.num_generations, processes)
    if odd:
        raise InputError(f"--prompts_per_step {cfg.prompts_per_step} x --num_generations {cfg.num_generations} answers "
                         f"cannot be dealt out evenly to {processes} processes")  # fmt: skip
    size = math.gcd(rows, cfg.completions_per_forward or cfg.num_generations)
    same = ("output_dir", "num_generations", "num_iterations", "max_completion_length", "temperature", "beta",
            "epsilon", "max_grad_norm", "gradient_checkpointing", "seed")  # fmt: skip
    return GRPOConfig(
        **{name: getattr(cfg, name) for name in same}, loss_type="dapo", scale_rewards="group", shuffle_dataset=False,
        per_device_train_batch_size=size, gradient_accumulation_steps=rows // size, bf16=False, report_to="none",
        max_steps=cfg.max_steps * cfg.num_iterations, save_steps=cfg.save_steps * cfg.num_iterations,  # TRL's: updates
        save_total_limit=2, logging_steps=1, gradient_checkpointing_kwargs={"use_reentrant": False},
        reward_weights=[weights(cfg.reward_weights).get(name, 0.0) for name in REWARDS],
        use_cpu=cfg.device == "cpu" or not torch.cuda.is_available(),
    )  # fmt: skip


class Log(TrainerCallback):
    """metrics.jsonl, as TRL's state has it: after resuming, too, a step stands there once."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            rows = "".join(json.dumps(row) + "\n" for row in state.log_history)
            (Path(args.output_dir) / "metrics.jsonl").write_text(rows)


def make_trainer(cfg):
    """(TRL's trainer of a Config; its Vlm)."""
    args = settings(cfg)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or getattr(args.deepspeed_plugin, "zero_stage", 0) == 3:
        raise InputError(SHARDED)
    torch.manual_seed(cfg.seed)
    train_set, _ = load_data(cfg)
    vlm = load(replace(cfg, device=str(args.device)))  # this process's own card
    # TRL would sample and score image placeholders as words. Where the head has a bias, it honours it everywhere.
    bias = torch.zeros(vlm.core.lm_head.out_features, dtype=vlm.core.lm_head.weight.dtype, device=vlm.device)
    bias[vlm.placeholders] = -1e4
    vlm.core.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    params = {p: p.data.clone() for p in vlm.model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=cfg.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: learning_rate(cfg, i // cfg.num_iterations))
    trainer = GRPOTrainer(
        vlm.model, [SayoReward(vlm, cfg), partial(format, lengths=numbers(cfg.format_lengths)), accuracy], args,
        questions(train_set, cfg), processing_class=Processor(vlm.image_processor, vlm.tokenizer), callbacks=[Log()],
        optimizers=(optimizer, rates),
    )  # fmt: skip
    if cfg.beta:
        vlm.model.delete_adapter("ref")  # a copy that TRL has made; here the reference is the adapter switched off
    for p, value in params.items():
        p.data = value  # over four bits TRL rounds LoRA to bf16, in which steps of 5e-6 vanish
    return trainer, vlm


def train(cfg):
    folder = Path(cfg.output_dir)
    if any((folder / name).exists() for name in CHECKPOINTS):
        raise InputError(f"{folder} holds a run of sayo_mini.py: choose another --output_dir")
    trainer, vlm = make_trainer(cfg)
    if trainer.is_world_process_zero():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(asdict(cfg) | {"resume": False}))
        except OSError as error:
            raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}") from None
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]  # what is written last
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None) if cfg.resume else None
    if cfg.resume:
        print(f"resuming {last}" if last else f"no checkpoint in {folder} yet: starting from the beginning")
    trainer.train(resume_from_checkpoint=last and str(last))
    if trainer.is_world_process_zero():
        vlm.model.save_pretrained(folder / "adapter")
    return 0


def main(argv=None):
    cfg = None
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cfg = parse(sys.argv[1:] if argv is None else argv, __doc__)
        return train(cfg)
    except torch.OutOfMemoryError:
        problem = "out of GPU memory: lower --completions_per_forward, --max_pixels or --num_generations"
    except InputError as error:
        problem = " ".join(str(error).split())
    except KeyboardInterrupt:
        go_on = f"--resume --output_dir {shlex.quote(cfg.output_dir)}" if cfg else ""
        print(f"stopped; go on from the last checkpoint with: accelerate launch scale_trl.py {go_on}")
        return 130
    print(f"scale_trl.py: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
