"""Models of the shapes of Qwen3-VL, with random weights: speed and memory do not depend on what a model knows.

The tokenizer is that of `tiny/`: ids above its 64 are written and scored like all others, they only have no text.
"""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from data import Example

TINY = Path(__file__).parent.parent / "tiny"
CELL = 32  # pixels to a side of an image token: patches of 16, merged two by two
# As in the published configurations; "30m" has their proportions, scaled down by about four
TEXT = {
    "30m": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=7, num_attention_heads=8,
                num_key_value_heads=4, head_dim=64, vocab_size=9216, tie_word_embeddings=True),
    "2b": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "4b": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
}  # fmt: skip
TOWER = dict(hidden_size=1024, intermediate_size=4096, depth=24, num_heads=16, deepstack_visual_indexes=[5, 11, 17])
VISION = {
    "30m": dict(hidden_size=192, intermediate_size=768, depth=6, num_heads=3, deepstack_visual_indexes=[1, 2, 4]),
    "2b": TOWER,
    "4b": TOWER,
    "8b": dict(hidden_size=1152, intermediate_size=4304, depth=27, num_heads=16, deepstack_visual_indexes=[8, 16, 24]),
}  # fmt: skip


def configuration(shape):
    """The Qwen3VLConfig of a shape, with the token ids of tiny/."""
    ids = AutoTokenizer.from_pretrained(TINY).convert_tokens_to_ids
    head = TEXT[shape]["head_dim"] // 2  # of its pairs of numbers, the shares that time, height and width turn
    sections = [head - 2 * (head * 5 // 16), head * 5 // 16, head * 5 // 16]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=sections)
    tokens = dict(eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"), bos_token_id=None)
    return Qwen3VLConfig(
        text_config=dict(max_position_embeddings=32768, rope_parameters=rope, **tokens, **TEXT[shape]),
        vision_config=dict(patch_size=16, out_hidden_size=TEXT[shape]["hidden_size"], num_position_embeddings=2304,
                           **VISION[shape]),
        tie_word_embeddings=TEXT[shape]["tie_word_embeddings"],
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip


def make(shape, models, device="cpu"):
    """Write a model of a shape into a folder below `models`, once: the weights tensor by tensor, so that no model need
    fit into memory. fp32 for a CPU, else bf16. Returns: the folder."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    folder = Path(models, f"{shape}-{dtype}".replace("torch.", "")).resolve()
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(shape)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    limits = dict(shortest_edge=CELL**2, longest_edge=4096 * CELL**2)
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=limits).save_pretrained(folder)
    with init_empty_weights():
        empty = Qwen3VLForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del empty["lm_head.weight"]
    generator, shard, where = torch.Generator().manual_seed(0), {}, {}
    for number, (name, like) in enumerate(tqdm(empty.items(), desc=f"make {shape}")):
        if like.dim() > 1:
            shard[name] = torch.empty(like.shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        else:  # a bias, or the scale of a norm
            shard[name] = torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        if sum(t.nbytes for t in shard.values()) > 2e9 or number + 1 == len(empty):
            file = f"model-{len(set(where.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def question(vlm, tokens, image_tokens=None):
    """An Example whose prompt has exactly `tokens` tokens, most of them (or `image_tokens`) of its image of noise."""
    frame = len(vlm.encode(Image.new("RGB", (CELL, CELL)), "red").input_ids) - 2  # the template's own tokens
    room = image_tokens or tokens - frame - 8
    rows = int(room**0.5)
    size = (CELL * (room // rows), CELL * rows)
    words = tokens - frame - rows * (room // rows)
    image = Image.effect_noise(size, 64).convert("RGB")
    return Example(image, " ".join(["red"] * words), "red", [(0, 0, size[0] // 2, size[1] // 2)], "noise")
