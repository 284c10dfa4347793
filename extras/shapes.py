"""The shapes of published models, from their config.json: `fit` needs no network."""

from functools import partial

from transformers import InternVLConfig, Qwen3VLConfig

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


def model_config(shape, text_ids=None, **ids):
    """The Qwen3VLConfig of a shape. "30m" has the proportions of 2B, scaled down about four times.
    Args: text_ids and ids, token ids of the language model and of the whole model, by default the
    published ones."""
    text, vision = dict(zip(TEXT_FIELDS, TEXT[shape])), dict(zip(VISION_FIELDS, VISION[shape]))
    pairs = text["head_dim"] // 2  # rotated pairs of a head: time, height, width
    sections = [pairs - 2 * (pairs * 5 // 16), pairs * 5 // 16, pairs * 5 // 16]
    rope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=sections)
    text |= dict(max_position_embeddings=32768, rope_parameters=rope) | (text_ids or {})
    vision |= dict(
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=text["hidden_size"],
        num_position_embeddings=2304,
    )
    tied = text["tie_word_embeddings"]
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def internvl_config():
    """InternVL3.5-8B: Qwen3-8B, and a vision tower with the shape that is the default."""
    text = dict(zip(TEXT_FIELDS, TEXT["8b"])) | {"model_type": "qwen3"}
    vision = {"attention_bias": True}
    return InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


PUBLISHED = {  # name -> a function that makes its configuration
    f"Qwen/Qwen3-VL-{size.upper()}-Instruct": partial(model_config, size)
    for size in ("2b", "4b", "8b")
} | {"OpenGVLab/InternVL3_5-8B-HF": internvl_config}
