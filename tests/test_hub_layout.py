"""Checkpoints of all families in the layout of the hub, with small random weights and the published
vocabulary: train, look, probe and resume without warnings. `save_pretrained` of current
transformers versions writes a different layout."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from conftest import INTERNVL_TEMPLATE, ROOT, TINY, ask, run_python
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText

from model import load_vlm

pytestmark = pytest.mark.slow
VOCABULARY = 151_936  # rows of the embedding; the tokenizer has fewer entries
SPECIAL = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
SPECIAL += "quad_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = {f"<|{name}|>": 151_643 + i for i, name in enumerate(SPECIAL.split())}
IDS = {f"{name}_token_id": SPECIAL[f"<|{name}_pad|>"] for name in ("image", "video")}
IDS |= {f"{name}_token_id": SPECIAL[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
ENDS = {"bos_token_id": SPECIAL["<|endoftext|>"], "eos_token_id": SPECIAL["<|im_end|>"]}
TEXT = ENDS | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128_000}
TEXT |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": VOCABULARY}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
VISION |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2}
ROPE = {"mrope_section": [2, 1, 1]}
QWEN2_5 = {  # flat: the settings of the language model are at the top
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    **TEXT,
    **IDS,
    "rope_theta": 1000000.0,
    "rope_scaling": ROPE | {"type": "mrope"},
    "sliding_window": 32768,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "vision_config": VISION
    | {"in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "window_size": 112}
    | {"fullatt_block_indexes": [1], "tokens_per_second": 2},
}
QWEN3_TEXT = {"dtype": "bfloat16", "head_dim": 8, "model_type": "qwen3_vl_text"}
QWEN3_TEXT |= {"rope_scaling": ROPE | {"mrope_interleaved": True, "rope_type": "default"}}
QWEN3 = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    **IDS,
    "text_config": TEXT | QWEN3_TEXT | {"rope_theta": 5000000},
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "vision_config": VISION
    | {"deepstack_visual_indexes": [0], "in_channels": 3, "model_type": "qwen3_vl"}
    | {"num_position_embeddings": 64, "patch_size": 16},
}
SIZES = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
QWEN3_SIZES = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16}
IMAGES = {"temporal_patch_size": 2, "merge_size": 2}
PREPROCESSORS = {
    "qwen2_5": IMAGES | SIZES | {"image_processor_type": "Qwen2VLImageProcessor"},
    "qwen3": IMAGES | QWEN3_SIZES | {"image_processor_type": "Qwen2VLImageProcessorFast"},
}
MARKS = {"<img>": 151_657, "</img>": 151_658, "<IMG_CONTEXT>": 151_659, "<video>": 151_660}
INTERNVL = {  # OpenGVLab/InternVL3_5-1B-HF
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "image_token_id": MARKS["<IMG_CONTEXT>"],
    "image_seq_length": 16,
    "downsample_ratio": 0.5,
    "text_config": TEXT | {"head_dim": 8, "model_type": "qwen3", "rope_theta": 1000000},
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.55.0",
    "vision_config": {"hidden_size": 32, "image_size": [112, 112], "intermediate_size": 64}
    | {"model_type": "internvl_vision", "num_attention_heads": 2, "num_hidden_layers": 2}
    | {"attention_bias": True, "patch_size": [14, 14]},
}
TILES = {"crop_to_patches": True, "max_patches": 12, "min_patches": 1, "do_resize": True}
TILES |= {"size": {"height": 112, "width": 112}, "processor_class": "InternVLProcessor"}
PREPROCESSORS["internvl"] = TILES | {"image_processor_type": "GotOcr2ImageProcessorFast"}
CONFIGS = {"qwen2_5": QWEN2_5, "qwen3": QWEN3, "internvl": INTERNVL}
GENERATION = ENDS | {"eos_token_id": [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]}
GENERATION |= {"do_sample": True, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
TEMPLATE = (TINY / "chat_template.jinja").read_text()
TOKENIZER = {
    "added_tokens_decoder": {
        str(i): {"content": name, "special": True, "normalized": False}
        for name, i in SPECIAL.items()
    },
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
}


def write_checkpoint(folder, family):
    """Write a checkpoint of a family in CONFIGS. The chat template is in chat_template.json for
    qwen2_5, in tokenizer_config.json for qwen3 and in chat_template.jinja for internvl: the hub has
    all these forms. Returns: the folder."""
    config, processor = CONFIGS[family], PREPROCESSORS[family]
    files = {"config": config, "preprocessor_config": processor, "generation_config": GENERATION}
    if family == "qwen2_5":
        files |= {"tokenizer_config": TOKENIZER, "chat_template": {"chat_template": TEMPLATE}}
    elif family == "internvl":
        names = "start_image_token", "end_image_token", "context_image_token", "video_token"
        added = {str(i): {"content": name, "special": True} for name, i in MARKS.items()}
        added = {"added_tokens_decoder": TOKENIZER["added_tokens_decoder"] | added}
        added["extra_special_tokens"] = dict(zip(names, MARKS))
        files["tokenizer_config"] = TOKENIZER | added
        template = INTERNVL_TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
        (folder / "chat_template.jinja").write_text(template)
    else:
        files["tokenizer_config"] = TOKENIZER | {"chat_template": TEMPLATE}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_tokenizer(folder / "tokenizer.json", MARKS if family == "internvl" else {})
    write_weights(folder, family, config)
    return folder


def write_weights(folder, family, config):
    """Write random bf16 weights without the LM head, which is tied."""
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    names = {k: v.shape for k, v in model.state_dict().items() if k != "lm_head.weight"}
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in names.items():
        if family == "qwen2_5":  # names used before transformers 4.52
            name = name.replace("model.language_model.", "model.").replace("model.visual", "visual")
        if family == "internvl":
            name = name.replace("model.language_model.", "language_model.model.")
            name = name.replace("model.vision", "vision").replace("model.multi", "multi")
        weight = torch.empty(shape).normal_(0, 0.05, generator=generator)
        weights[name] = (weight + (len(shape) == 1 and "bias" not in name)).bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(path, more=()):
    """Write a byte-level BPE with as many entries as Qwen's, but with made-up words and no merges,
    so that text is split into bytes."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{i}" for i in range(len(words), SPECIAL["<|endoftext|>"])]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL, *more]
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    tokenizer.save(str(path))


FLAGS = "--device cpu --max_pixels 12544 --prompts_per_step 1 --num_generations 3 --eval_examples 2"
FLAGS = f"{FLAGS} --max_completion_length 6 --save_steps 1 --learning_rate 1e-2".split()
# Runs in its own process, because some warnings are issued only once per process.
SCRIPT = """
import json, sys, sayo_mini
for flags in json.loads(sys.argv[1]):
    assert sayo_mini.main(flags) == 0, flags
"""


@pytest.fixture(scope="module", params=["qwen2_5", "qwen3", "internvl"])
def checkpoint(request, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """Train two steps with NF4, resume for a third, then run look and probe.
    Returns: (the folder of all outputs, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("run")
    model, output = ["--model_name_or_path", str(checkpoint)], ["--output_dir", str(folder / "run")]
    image = ["--image", str(ROOT / "example" / "one.png"), "--question", "What color is the dot?"]
    adapter = ["--adapter", str(folder / "run" / "adapter"), "--output", str(folder / "look.png")]
    probe = "--device cpu --max_pixels 12544 --eval_examples 2 --max_completion_length 6".split()
    probe += ["--output_dir", str(folder / "probe")]
    commands = [
        [*model, *FLAGS, "--max_steps", "2", *output],
        ["--resume", "--max_steps", "3", *output],
        ["look", *image, *adapter],
        ["probe", *model, *probe],
    ]
    process = run_python("-c", SCRIPT, json.dumps(commands))
    assert process.returncode == 0, process.stderr
    return folder, process.stdout, process.stderr


def test_the_checkpoint_loads_as_published(checkpoint):
    vlm = load_vlm(checkpoint, load_in_4bit=False, device="cpu", max_pixels=12544)
    assert vlm.core.lm_head.weight is vlm.core.get_input_embeddings().weight  # tied
    assert len(vlm.core.lm_head.weight) == VOCABULARY > len(vlm.tokenizer)
    assert vlm.stop_ids.tolist() == [SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"]]
    if "internvl" not in str(checkpoint):  # see `load_tokenizer`
        assert vlm.tokenizer.chat_template == TEMPLATE
    assert len(vlm.placeholders) == 4
    file = load_file(checkpoint / "model.safetensors")
    saved = {name.split("layers.1.")[-1]: weight for name, weight in file.items()}
    loaded = vlm.core.model.language_model.layers[1].mlp.down_proj.base_layer.weight
    assert torch.equal(loaded, saved["mlp.down_proj.weight"].float())  # not randomly initialized
    prompt, _ = ask(vlm, C=1)
    assert len(prompt.image_positions) == prompt.grid[0] * prompt.grid[1] >= 9


def test_training_look_probe_and_resume_work_and_nothing_warns(run):
    folder, out, err = run
    metrics = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(torch.tensor(row["grad_norm"]).isfinite() for row in metrics)
    assert "after step 2" in out and "before training" in out and "after training" in out
    for name in ("run/report.html", "look.png", "probe/probe.png"):
        assert (folder / name).stat().st_size > 1000
    bars = ("evaluate", "train", "probe")  # everything else on stderr is a warning
    lines = [line for part in err.splitlines() for line in part.split("\r") if line.strip()]
    assert [line for line in lines if not line.startswith(bars)] == []
