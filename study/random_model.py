"""Models with the shapes of Qwen3-VL and random weights, and a question of any length. Speed and
memory do not depend on what a model has learned."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

from data import Example
from extras import shapes
from study.common import ROOT

TINY = ROOT / "tiny"  # has the tokenizer; token ids above its 64 have no text
CELL = 32  # pixels per side of an image token: patches of 16, merged two by two


def model_config(shape):
    """The Qwen3VLConfig of a shape, with the token ids of tiny/."""
    ids = AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids
    ends = dict(eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))
    return shapes.model_config(
        shape,
        ends | {"bos_token_id": None},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def make_model(shape, models, device="cpu"):
    """Write a random model of a shape to a folder in `models`, unless it exists already.
    The weights are fp32 for a CPU, else bf16. Returns: the folder."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = Path(models, f"{shape}-{str(dtype).removeprefix('torch.')}").resolve()
    if not folder.exists():
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        with torch.device(device):  # a GPU draws billions of weights faster
            model = AutoModelForImageTextToText.from_config(model_config(shape), dtype=dtype)
        model.save_pretrained(unfinished, max_shard_size="2GB")
        AutoTokenizer.from_pretrained(TINY).save_pretrained(unfinished)
        size = dict(shortest_edge=CELL**2, longest_edge=4096 * CELL**2)
        processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size)
        processor.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def make_question(vlm, tokens):
    """An Example whose prompt has exactly `tokens` tokens. Its noise image takes most of them."""
    template = len(vlm.encode(Image.new("RGB", (CELL, CELL)), "red").input_ids) - 2
    room = tokens - template - 8
    rows = int(room**0.5)
    cols = room // rows
    words = tokens - template - rows * cols
    width, height = CELL * cols, CELL * rows
    image = Image.effect_noise((width, height), 64).convert("RGB")
    box = (0, 0, width // 2, height // 2)
    return Example(image, " ".join(["red"] * words), "red", [box], "noise")
