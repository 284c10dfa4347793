"""Models with the shapes of Qwen3-VL and random weights. Speed and memory do not depend on what a
model has learned.

The tokenizer is the one in tiny/. Token ids above its 64 are sampled and scored like all others but
have no text.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from bench.doc_tables import ROOT
from data import Example

TINY = ROOT / "tiny"
CELL = 32  # pixels per side of an image token: patches of 16, merged two by two
SHARD_BYTES = 2e9


def text_config(hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, tied):
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )


def vision_config(hidden, inner, depth, heads, deepstack):
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        depth=depth,
        num_heads=heads,
        deepstack_visual_indexes=deepstack,
    )


# From the published configurations. "30m" has their proportions, scaled down about four times.
TEXT = {
    "30m": text_config(512, 1536, 7, 8, 4, 64, 9216, True),
    "2b": text_config(2048, 6144, 28, 16, 8, 128, 151936, True),
    "4b": text_config(2560, 9728, 36, 32, 8, 128, 151936, True),
    "8b": text_config(4096, 12288, 36, 32, 8, 128, 151936, False),
}
VISION = {
    "30m": vision_config(192, 768, 6, 3, [1, 2, 4]),
    "2b": vision_config(1024, 4096, 24, 16, [5, 11, 17]),
    "4b": vision_config(1024, 4096, 24, 16, [5, 11, 17]),
    "8b": vision_config(1152, 4304, 27, 16, [8, 16, 24]),
}


def model_config(shape):
    """The Qwen3VLConfig of a shape, with the token ids of tiny/."""
    ids = AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids
    pairs = TEXT[shape]["head_dim"] // 2  # rotated pairs: time, height, width
    sections = [pairs - 2 * (pairs * 5 // 16), pairs * 5 // 16, pairs * 5 // 16]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=sections)
    text = dict(
        max_position_embeddings=32768,
        rope_parameters=rope,
        eos_token_id=ids("<|im_end|>"),
        pad_token_id=ids("<|endoftext|>"),
        bos_token_id=None,
    )
    out_size = TEXT[shape]["hidden_size"]
    vision = dict(patch_size=16, out_hidden_size=out_size, num_position_embeddings=2304)
    return Qwen3VLConfig(
        text_config=text | TEXT[shape],
        vision_config=vision | VISION[shape],
        tie_word_embeddings=TEXT[shape]["tie_word_embeddings"],
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def make_model(shape, models, device="cpu"):
    """Write a random model of a shape to a folder in `models`, unless it exists already.

    The weights are fp32 for a CPU, else bf16. They are written shard by shard, so that the model
    does not have to fit into memory. Returns: the folder.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = Path(models, f"{shape}-{dtype}".replace("torch.", "")).resolve()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    size = dict(shortest_edge=CELL**2, longest_edge=4096 * CELL**2)
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size).save_pretrained(folder)
    weight_map = write_random_weights(folder, config, dtype, desc=f"make {shape}")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_random_weights(folder, config, dtype, desc):
    """Returns: {name of a tensor: its file}."""
    with init_empty_weights():
        empty = Qwen3VLForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del empty["lm_head.weight"]
    generator, shard, weight_map = torch.Generator().manual_seed(0), {}, {}
    for number, (name, like) in enumerate(tqdm(empty.items(), desc=desc)):
        if like.dim() > 1:
            weight = torch.empty(like.shape, dtype=dtype)
            shard[name] = weight.normal_(0, 0.02, generator=generator)
        else:  # a bias or the scale of a norm
            value = 0.0 if name.endswith("bias") else 1.0
            shard[name] = torch.full(like.shape, value, dtype=dtype)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES or number + 1 == len(empty):
            file = f"model-{len(set(weight_map.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    return weight_map


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
