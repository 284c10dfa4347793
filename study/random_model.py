"""Models with the shapes of Qwen3-VL and random weights, and a question of any length. Speed and
memory do not depend on what a model has learned."""

from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
)

from data import Example
from study.common import ROOT

TINY = ROOT / "tiny"  # has the tokenizer; token ids above its 64 have no text
CELL = 32  # pixels per side of an image token: patches of 16, merged two by two

# From the published configurations. "30m" has their proportions, scaled down about four times.
TEXT_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings"),
)
TEXT = {
    "30m": (512, 1536, 7, 8, 4, 64, 9216, True),
    "2b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
}
VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "depth",
    "num_heads",
    "deepstack_visual_indexes",
)
VISION = {
    "30m": (192, 768, 6, 3, [1, 2, 4]),
    "2b": (1024, 4096, 24, 16, [5, 11, 17]),
    "4b": (1024, 4096, 24, 16, [5, 11, 17]),
    "8b": (1152, 4304, 27, 16, [8, 16, 24]),
}


def model_config(shape):
    """The Qwen3VLConfig of a shape, with the token ids of tiny/."""
    text, vision = dict(zip(TEXT_FIELDS, TEXT[shape])), dict(zip(VISION_FIELDS, VISION[shape]))
    ids = AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids
    pairs = text["head_dim"] // 2  # rotated pairs of a head: time, height, width
    sections = [pairs - 2 * (pairs * 5 // 16), pairs * 5 // 16, pairs * 5 // 16]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=sections)
    text |= dict(
        max_position_embeddings=32768,
        rope_parameters=rope,
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=None,
    )
    vision |= dict(
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=text["hidden_size"],
        num_position_embeddings=2304,
    )
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def make_model(shape, models, device="cpu"):
    """Write a random model of a shape to a folder in `models`, unless it exists already.
    The weights are fp32 for a CPU, else bf16. Returns: the folder."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = Path(models, f"{shape}-{str(dtype).removeprefix('torch.')}").resolve()
    if not folder.exists():
        unfinished = folder.with_name(f"unfinished-{folder.name}")
        model = AutoModelForImageTextToText.from_config(model_config(shape), dtype=dtype)
        model.save_pretrained(unfinished, max_shard_size="2GB")
        AutoTokenizer.from_pretrained(TINY).save_pretrained(unfinished)
        size = dict(shortest_edge=CELL**2, longest_edge=4096 * CELL**2)
        processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size)
        processor.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def make_question(vlm, tokens, image_tokens=None):
    """An Example whose prompt has exactly `tokens` tokens. Its noise image takes most of them, or
    exactly `image_tokens`."""
    template = len(vlm.encode(Image.new("RGB", (CELL, CELL)), "red").input_ids) - 2
    room = image_tokens or tokens - template - 8
    rows = int(room**0.5)
    cols = room // rows
    words = tokens - template - rows * cols
    width, height = CELL * cols, CELL * rows
    image = Image.effect_noise((width, height), 64).convert("RGB")
    box = (0, 0, width // 2, height // 2)
    return Example(image, " ".join(["red"] * words), "red", [box], "noise")
