"""Checkpoints in the layout of the hub, with small random weights and the published vocabulary.
`save_pretrained` of current transformers versions writes a different layout."""

import json

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

VOCABULARY = 151_936  # rows of the embedding; the tokenizer has fewer entries
SPECIAL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
SPECIAL += "quad_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = {f"<|{name}|>": 151_643 + i for i, name in enumerate(SPECIAL.split())}
IDS = {
    "image_token_id": SPECIAL["<|image_pad|>"],
    "video_token_id": SPECIAL["<|video_pad|>"],
    "vision_start_token_id": SPECIAL["<|vision_start|>"],
    "vision_end_token_id": SPECIAL["<|vision_end|>"],
}
TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": SPECIAL["<|endoftext|>"],
    "eos_token_id": SPECIAL["<|im_end|>"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 128_000,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
QWEN2_5 = {  # flat: the settings of the language model are at the top
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    **TEXT,
    **IDS,
    "vision_token_id": SPECIAL["<|vision_pad|>"],
    "max_window_layers": 70,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "vision_config": VISION
    | {
        "hidden_act": "silu",
        "in_chans": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
}
QWEN3 = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    **IDS,
    "text_config": TEXT
    | {
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": 8,
        "model_type": "qwen3_vl_text",
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "vision_config": VISION
    | {
        "deepstack_visual_indexes": [0],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "model_type": "qwen3_vl",
        "num_position_embeddings": 64,
        "patch_size": 16,
    },
}
IMAGES = {"temporal_patch_size": 2, "merge_size": 2}
PREPROCESSORS = {
    "qwen2_5": IMAGES
    | {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
    "qwen3": IMAGES
    | {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    },
}
GENERATION = {
    "bos_token_id": SPECIAL["<|endoftext|>"],
    "pad_token_id": SPECIAL["<|endoftext|>"],
    "eos_token_id": [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]],
    "do_sample": True,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "transformers_version": "4.56.0",
}
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write_checkpoint(folder, family):
    """Write a "qwen2_5" or "qwen3" checkpoint. The chat template is in chat_template.json for
    qwen2_5 and in tokenizer_config.json for qwen3: the hub has both forms. Returns: the folder."""
    config, processor = (QWEN2_5 if family == "qwen2_5" else QWEN3), PREPROCESSORS[family]
    files = {"config": config, "preprocessor_config": processor, "generation_config": GENERATION}
    files |= {"tokenizer": tokenizer(), "tokenizer_config": tokenizer_config()}
    if family == "qwen2_5":
        files["chat_template"] = {"chat_template": TEMPLATE}
    else:
        files["tokenizer_config"]["chat_template"] = TEMPLATE
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_weights(folder, family, config)
    return folder


def write_weights(folder, family, config):
    """Write random bf16 weights in two files and an index, without the LM head, which is tied."""
    if family == "qwen2_5":
        like, kind = Qwen2_5_VLConfig(**config), Qwen2_5_VLForConditionalGeneration
    else:
        like, kind = Qwen3VLConfig(**config), Qwen3VLForConditionalGeneration
    with init_empty_weights():
        names = {k: v.shape for k, v in kind(like).state_dict().items() if k != "lm_head.weight"}
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in names.items():
        if family == "qwen2_5":  # names used before transformers 4.52
            name = name.replace("model.language_model.", "model.").replace("model.visual", "visual")
        weight = torch.empty(shape).normal_(0, 0.05, generator=generator)
        weights[name] = (weight + (len(shape) == 1 and "bias" not in name)).bfloat16()
    half, where = len(weights) // 2, {}
    for number, part in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({k: weights[k] for k in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}}
    index = json.dumps(index | {"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def tokenizer():
    """tokenizer.json: Qwen's byte-level BPE with the same number of entries, but with made-up words
    and no merges, so that text is split into bytes."""
    words = sorted(ByteLevel.alphabet())
    words += [f"w{i}" for i in range(len(words), SPECIAL["<|endoftext|>"])]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    pattern += r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bytes_ = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name} | flags for name, id in SPECIAL.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": bytes_,
        "decoder": bytes_,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [],
        },
    }


def tokenizer_config():
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": name} | flags for name, i in SPECIAL.items()},
        "additional_special_tokens": list(SPECIAL)[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131_072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
