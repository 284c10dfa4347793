"""More than one GPU: SAYO's rewards in TRL's GRPOTrainer, with the flags, data sets and adapters of
sayo_mini.py. docs/scaling.md explains how to start it, what works, and how TRL differs.

    accelerate launch --multi_gpu --num_processes 2 extras/scale_trl.py --dataset mine.jsonl

Every process runs `train`; only the first one prints and writes.
"""

import json
import os
import sys
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import InputError, check_command_line, one_line, parse_command_line, parse_weights

if __name__ == "__main__":  # before torch loads, as in sayo_mini.py
    check_command_line(sys.argv[1:])
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")

import sayo_mini  # before torch, because it sets environment variables that torch reads

# isort: split
import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from checkpoint import CHECKPOINTS, RunDirectory, continue_exactly, run_config
from data import Example, encode_example, epoch_index, format_question, load_datasets
from extras.model_card import model_card
from model import Completions, choose_device, load_model, tile_grid


class SayoTrainer(GRPOTrainer):
    """GRPOTrainer with the questions, rewards and learning rate of sayo_mini.py.

    Args: cfg, a Config; args, from `trl_config`; vlm, a Vlm; train_set, a data set.
    """

    def __init__(self, cfg, args, vlm, train_set):
        self.cfg = cfg
        forbid_placeholders(vlm)
        # TRL pads prompts on the left, but the tokenizer pads the mask of image tokens on its own
        # side.
        vlm.tokenizer.padding_side = "left"
        adapter = {p: p.data.clone() for p in vlm.model.parameters() if p.requires_grad}
        super().__init__(
            vlm.model,
            SayoRewards(vlm, cfg).functions(),
            args,
            trl_dataset(train_set, cfg),
            processing_class=TrlProcessor(vlm.image_processor, vlm.tokenizer, vlm.core.config),
        )
        for p, value in adapter.items():
            p.data = value  # over 4 bits TRL rounds LoRA to bf16, in which steps of 5e-6 vanish
        if cfg.beta:
            vlm.model.delete_adapter("ref")  # TRL's copy; the reference is the adapter switched off
        # Of fp16, use only the loss scale: the weights already have their types, and parts such as
        # Qwen2.5-VL's vision tower need the range of fp32.
        self.accelerator.autocast_handler = AutocastKwargs(enabled=False)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Override: DeepSpeed drops a scheduler that is passed in, but calls this."""

        def factor(update):  # of the peak rate
            rate = sayo_mini.learning_rate(self.cfg, update // self.cfg.num_iterations)
            return rate / (self.cfg.learning_rate or 1)

        optimizer = optimizer or self.optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler


class SayoRewards:
    """Every reward of `Config.rewards` as a reward function of TRL.

    The policy in training, `vlm`, scores a batch of B rows once for all functions. A batch may
    split a group, as rows are rewarded one by one.
    """

    def __init__(self, vlm, cfg):
        self.vlm, self.cfg, self.batch, self.rewards = vlm, cfg, None, None

    def functions(self):
        return [self.function(name) for name in self.cfg.rewards]

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
        rewards = {name: [] for name in self.cfg.rewards}
        # Neighboring rows with the same question belong to one group.
        for example, rows in groupby(map(Example, image, question, answer, boxes, id)):
            completions = pack_completions(self.vlm, [next(ids) for _ in rows], self.cfg)
            prompt = encode_example(self.vlm, example, self.cfg)
            scores = self.vlm.score(prompt, completions)
            found, _ = sayo_mini.compute_rewards(example, prompt, completions, scores, self.cfg)
            for name, values in found.items():
                rewards[name] += values.tolist()
        self.vlm.model.train(training)  # scoring switches to eval mode
        return rewards


class TrlProcessor(ProcessorMixin):
    """The parts of a model's processor that TRL needs; these work without torchvision."""

    text_kwargs = {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer, config):
        self.image_token_id, self.tile = config.image_token_id, tile_grid(config)
        self.image_token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.return_mm_token_type_ids = not self.tile  # for M-RoPE
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def __call__(self, *args, **kwargs):
        inputs = super().__call__(*args, **kwargs)
        inputs.pop("num_patches", None)  # of InternVL: always one tile; TRL does not take it
        return inputs

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        if self.tile:
            return self.image_token * prod(self.tile)
        patches = image_inputs["image_grid_thw"][image_idx].prod()
        return self.image_token * int(patches // self.image_processor.merge_size**2)


def pack_completions(vlm, token_ids, cfg):
    """TRL's lists of token ids, one per completion, as Completions."""
    rows = [torch.tensor(row) for row in token_ids]
    mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True)
    texts = [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in token_ids]
    return Completions(pad_sequence(rows, batch_first=True), mask, texts, cfg.temperature)


def trl_dataset(train_set, cfg):
    """The questions of the whole run, in the order of sayo_mini.py, as rows of TRL. Images are read
    when a row is used."""

    def read(batch):
        indices = [epoch_index(k, len(train_set), cfg.seed) for k in batch["k"]]
        found = {i: train_set[i] for i in set(indices)}  # a group repeats one question
        examples = [found[i] for i in indices]
        prompts = [[{"role": "user", "content": format_question(e, cfg)}] for e in examples]
        columns = {name: [getattr(e, name) for e in examples] for name in Example.__annotations__}
        return {"prompt": prompts} | columns

    count = cfg.max_steps * cfg.prompts_per_step
    return Dataset.from_dict({"k": range(count)}).with_transform(read)


def forbid_placeholders(vlm):
    """Keep TRL from sampling and scoring image placeholders: TRL applies a bias on the LM head."""
    head = vlm.core.lm_head
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    head.bias[vlm.placeholders] = -1e4


def trl_config(cfg):
    """A Config as a GRPOConfig. Raises: InputError if the completions of a step cannot be divided
    evenly among the processes, or if the launcher shards the weights."""
    if not cfg.max_steps:
        raise InputError("--max_steps 0: scale_trl.py only trains, so it must be above 0")
    for name in ("keep_best", "deterministic"):
        if getattr(cfg, name):
            raise InputError(f"--{name}: scale_trl.py cannot do this")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows, remainder = divmod(cfg.prompts_per_step * cfg.num_generations, processes)
    if remainder:
        flags = f"--prompts_per_step {cfg.prompts_per_step} x --num_generations"
        wanted = f"must be a multiple of the number of processes, {processes}"
        raise InputError(f"{flags} {cfg.num_generations} {wanted}")
    most = cfg.completions_per_forward or cfg.num_generations
    batch = max(n for n in range(1, most + 1) if rows % n == 0)  # the largest that divides a step
    weights = parse_weights(cfg.reward_weights)
    args = GRPOConfig(
        output_dir=cfg.output_dir,
        num_generations=cfg.num_generations,
        num_iterations=cfg.num_iterations,
        max_completion_length=cfg.max_completion_length,
        temperature=cfg.temperature,
        beta=cfg.beta,
        seed=cfg.seed,
        epsilon=cfg.epsilon,
        learning_rate=cfg.learning_rate,
        weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.max_grad_norm,
        loss_type="dapo",  # this and the next: the loss of reward.grpo_loss
        use_bias_correction_kl=False,
        reward_weights=[weights.get(name, 0.0) for name in cfg.rewards],
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
        report_to=cfg.report_to,
        logging_steps=1,
    )
    zero_stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or zero_stage == 3:
        advice = "use DDP, ZeRO-1 or ZeRO-2, not ZeRO-3 or FSDP"
        raise InputError(f"every process needs all weights: {advice}")
    return args


def train(cfg):
    """One run; replaces `sayo_mini.train`. Returns: the exit code."""
    args, last = trl_config(cfg), last_checkpoint(cfg.output_dir)
    if cfg.resume and (Path(cfg.output_dir) / CHECKPOINTS[0]).exists():
        raise InputError(f"{cfg.output_dir} has a run of sayo_mini.py: resume it there")
    torch.manual_seed(cfg.seed)
    train_set, _ = load_datasets(cfg)
    continue_exactly(cfg, train_set)
    vlm = load_model(replace(cfg, device=str(args.device)))
    args.distributed_state.wait_for_everyone()  # until every rank has checked the folder
    if args.process_index == 0:
        run = RunDirectory(replace(cfg, resume=False), {}, None, None, None, train_set)
    trainer = SayoTrainer(cfg, args, vlm, train_set)
    print(f"resuming {last}" if last else f"starting from the beginning in {cfg.output_dir}")
    trainer.train(resume_from_checkpoint=last)
    if args.process_index == 0:
        rows = [json.dumps(row) + "\n" for row in trainer.state.log_history]
        run.write_text("metrics.jsonl", "".join(rows))
        run.save_adapter(vlm.model)
        run.write_text("adapter/README.md", model_card(run.settings))
        (run.folder / "samples.jsonl").unlink()  # TRL logs no samples
    print(f"the adapter is in {cfg.output_dir}/adapter, the log in {cfg.output_dir}/metrics.jsonl")
    return 0


def last_checkpoint(folder):
    """The newest complete checkpoint of a run, or None. TRL writes trainer_state.json last."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    step = len("checkpoint-")
    return max((s.parent for s in states), key=lambda path: int(path.name[step:]), default=None)


def main(argv=None):
    try:
        command, given = parse_command_line(sys.argv[1:] if argv is None else argv)
        if command != "train":
            raise InputError(f"this only trains: use sayo_mini.py {command}")
        return train(run_config(given))
    except Exception as error:
        print(f"scale_trl.py: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the destructors of torch.distributed's threads can abort the process
