"""What several tests share: small models of both families, made on the spot or shipped in tiny/."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; read when huggingface_hub is imported

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from model import load_vlm
from scenes import Scenes

torch.set_num_threads(1)  # as the program does for models so small
TINY = Path(__file__).parent.parent / "tiny"


@pytest.fixture(scope="session")
def qwen2_5(tmp_path_factory):
    """A folder with a random Qwen2.5-VL of two layers; its tokenizer and image processor are tiny/'s."""
    folder = tmp_path_factory.mktemp("qwen2_5")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.convert_tokens_to_ids
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3]),
            eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"),
        ),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8,
                           out_hidden_size=64, window_size=32, fullatt_block_indexes=[1]),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=dict(shortest_edge=64, longest_edge=112 * 112)
                             ).save_pretrained(folder)  # fmt: skip
    return folder


def load(folder=TINY, load_in_4bit=False, **settings):
    """A Vlm whose adapter is not the identity: LoRA's B starts at 0, and much would be true for 0 alone."""
    torch.manual_seed(0)
    vlm = load_vlm(folder, load_in_4bit=load_in_4bit, device="cpu", **settings)
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return vlm


def ask(vlm, index=0, G=4, C=12, temperature=1.0, seed=0):
    """(prompt, sampled completions) for one validation scene."""
    example = Scenes("validation", 100)[index]
    prompt = vlm.encode(example.image, example.question)
    return prompt, vlm.sample(prompt, G, C, temperature, torch.Generator().manual_seed(seed))
