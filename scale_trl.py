"""The same reward on more than one GPU: SAYO in TRL's GRPOTrainer."""

from transformers import ProcessorMixin


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
