"""What TRL's GRPOTrainer needs from sayo-mini: a processor, the questions, the learning rate, and a
head that cannot write image placeholders."""

import os
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from config import InputError
from data import Example, format_question
from model import Completions


class TrlProcessor(ProcessorMixin):
    """The parts of a Qwen-VL processor that TRL needs; these work without torchvision."""

    return_mm_token_type_ids, text_kwargs = True, {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        patches = image_inputs["image_grid_thw"][image_idx].prod()
        return self.image_token * int(patches // self.image_processor.merge_size**2)


def completions_per_process(cfg):
    """Each process's share of a step's completions. Raises: InputError if there is nothing to train
    or the completions cannot be divided evenly."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    share, remainder = divmod(cfg.prompts_per_step * cfg.num_generations, processes)
    if not cfg.max_steps:
        raise InputError("--max_steps 0: scale_trl.py only trains, so it must be above 0")
    if remainder:
        flags = f"--prompts_per_step {cfg.prompts_per_step} x --num_generations"
        wanted = f"must be a multiple of the number of processes, {processes}"
        raise InputError(f"{flags} {cfg.num_generations} {wanted}")
    return share


def pack_completions(vlm, token_ids, temperature):
    """TRL's lists of token ids, one per completion, as Completions."""
    rows = [torch.tensor(row, device=vlm.device) for row in token_ids]
    mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True)
    texts = [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in token_ids]
    return Completions(pad_sequence(rows, batch_first=True), mask, texts, temperature)


def trl_dataset(train_set, count, index_of, cfg):
    """`count` questions as rows of TRL; images are read lazily.

    Args: index_of, from a question's number to its index in `train_set`.
    """

    def read(batch):
        indices = [index_of(k) for k in batch["k"]]
        found = {i: train_set[i] for i in set(indices)}  # a group repeats one question
        examples = [found[i] for i in indices]
        prompts = [[{"role": "user", "content": format_question(e, cfg)}] for e in examples]
        columns = {name: [getattr(e, name) for e in examples] for name in Example.__annotations__}
        return {"prompt": prompts} | columns

    return Dataset.from_dict({"k": range(count)}).with_transform(read)


def forbid_placeholders(vlm):
    """Keep TRL from sampling and scoring image placeholders: TRL applies a bias on the LM head."""
    head = vlm.core.lm_head
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    head.bias[vlm.placeholders] = -1e4


def last_checkpoint(folder):
    """The newest complete checkpoint of a run, or None. TRL writes trainer_state.json last."""
    states = Path(folder).glob("checkpoint-*/trainer_state.json")
    number = len("checkpoint-")
    return max((s.parent for s in states), key=lambda path: int(path.name[number:]), default=None)


def configure_trainer(trainer, rate):
    """Use `rate(i)` as the learning rate of update i, and only the loss scaling of TRL's fp16 mode.

    The trainer must create the scheduler itself, because DeepSpeed drops one that is passed in.
    Autocast is disabled because the weights already have their types. It would also use fp16 for
    parts that need the range of fp32, such as Qwen2.5-VL's vision tower.
    """
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)

    def create_scheduler(num_training_steps, optimizer=None):
        optimizer = optimizer or trainer.optimizer
        peak = trainer.args.learning_rate or 1
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: rate(i) / peak
        )

    trainer.create_scheduler = create_scheduler
