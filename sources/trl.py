"""What TRL's GRPOTrainer needs of sayo-mini: a processor, the questions, the learning rate, and a
head that cannot write image placeholders."""

import torch
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from transformers import ProcessorMixin

from data import Example, format_question


class TrlProcessor(ProcessorMixin):
    """What TRL needs of a Qwen-VL processor, made of the two parts that need no torchvision."""

    return_mm_token_type_ids, text_kwargs = True, {"return_token_type_ids": False}

    def __init__(self, image_processor, tokenizer):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        patches = image_inputs["image_grid_thw"][image_idx].prod()
        return self.image_token * int(patches // self.image_processor.merge_size**2)


def trl_dataset(train_set, count, index_of, cfg):
    """`count` questions as rows of TRL; an image is read when its turn comes.

    Args: index_of, from a question's number to its index in `train_set`.
    """

    def read(batch):
        indices = [index_of(k) for k in batch["k"]]
        found = {i: train_set[i] for i in set(indices)}  # a group repeats its question
        examples = [found[i] for i in indices]
        prompts = [[{"role": "user", "content": format_question(e, cfg)}] for e in examples]
        columns = {name: [getattr(e, name) for e in examples] for name in Example.__annotations__}
        return {"prompt": prompts} | columns

    return Dataset.from_dict({"k": range(count)}).with_transform(read)


def forbid_placeholders(vlm):
    """Keep TRL from sampling and scoring image placeholders: it honors a bias of the head."""
    head = vlm.core.lm_head
    head.bias = torch.nn.Parameter(torch.zeros_like(head.weight[:, 0]), requires_grad=False)
    head.bias[vlm.placeholders] = -1e4


def configure_trainer(trainer, rate):
    """Use `rate(i)` as the learning rate of update i, and of TRL's fp16 only the loss scale.

    The trainer makes the scheduler itself, because DeepSpeed drops one that is passed in. The
    weights have their types already: autocast would also compute in fp16 what is in fp32 for its
    range, such as Qwen2.5-VL's vision tower.
    """
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)

    def create_scheduler(num_training_steps, optimizer=None):
        optimizer = optimizer or trainer.optimizer
        peak = trainer.args.learning_rate or 1
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: rate(i) / peak
        )

    trainer.create_scheduler = create_scheduler
