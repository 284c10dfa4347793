"""Fixtures and helpers for all tests: small models of both families, from tiny/ or built here.

transformers is imported where it is needed: tests/test_reward.py runs without it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# No test needs network access. Set before huggingface_hub is imported, which reads it then.
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs that tests start: two threads each would wait for one another on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# nohup and background jobs ignore these, which the program and so the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # the program also does so for models this small
ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny"
# At temperature 1, the completions of the tiny model are often equal, so nothing would be learned.
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += ["--temperature", "2"]
FAST += ["--model_name_or_path", str(TINY)]
SMALL_TEXT = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SMALL_TEXT |= dict(num_attention_heads=4, num_key_value_heads=2)
# For tests marked cuda. `study/gpu.py --small` runs some on the CPU to check the tests themselves.
DEVICE = os.environ.get("TEST_DEVICE", "cuda")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA card; skipped without one")


def pytest_collection_modifyitems(items):
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA"))


@pytest.fixture(scope="module")  # an open browser would block the event loops of other modules
def browser():
    """Headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root cannot use the sandbox
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def qwen2_5(tmp_path_factory):
    """A folder with a random two-layer Qwen2.5-VL and the tokenizer of tiny/."""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    folder = tmp_path_factory.mktemp("qwen2_5")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer.convert_tokens_to_ids
    text = SMALL_TEXT | dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3]))
    text |= dict(eos_token_id=ids("<|im_end|>"), pad_token_id=ids("<|endoftext|>"))
    vision = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8)
    vision |= dict(out_hidden_size=64, window_size=32, fullatt_block_indexes=[1])
    names = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
    tokens = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
    special = dict(zip(names, map(ids, tokens)))
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 112 * 112}  # areas, despite the names
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def internvl(tmp_path_factory):
    """A folder with a random two-layer InternVL3.5 and the tokenizer of tiny/, two of whose words
    stand for <img> and </img>. Its tile has 4 x 4 image tokens."""
    from transformers import AutoTokenizer, GotOcr2ImageProcessorPil, InternVLConfig
    from transformers import InternVLForConditionalGeneration as Model

    folder = tmp_path_factory.mktemp("internvl")
    names = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(TINY, extra_special_tokens=names)
    tokenizer.chat_template = INTERNVL_TEMPLATE
    text = SMALL_TEXT | dict(model_type="qwen3", head_dim=16)
    text |= dict(eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, image_size=64)
    vision |= dict(num_attention_heads=2, patch_size=8)
    image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=image_id)
    Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    GotOcr2ImageProcessorPil(size=size, crop_to_patches=True).save_pretrained(folder)
    return folder


# The template that transformers' conversion script writes (older checkpoints: <image>).
INTERNVL_TEMPLATE = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
'}}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>
' }}{% elif content['type'] == 'video' %}{{ '<video>
' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}\
{{'<|im_end|>
'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant
' }}{% endif %}"""


@pytest.fixture(params=["qwen3", "qwen2_5", "internvl"])
def any_model(request):
    """The folder of a small model, one of each family."""
    return TINY if request.param == "qwen3" else request.getfixturevalue(request.param)


def run_program(folder, flags="", expect=0):
    """Run the program in this process with FAST and these flags; check the exit code."""
    import sayo_mini

    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def resume(folder, flags="", expect=0):
    """Resume a run; settings that are not in `flags` come from the run."""
    import sayo_mini

    argv = ["--resume", "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def run_python(*args, cwd=ROOT):
    """Run Python in a new process. Returns: the finished process; its output is text."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def read_log(folder, name="metrics.jsonl"):
    """The rows of a log, parsed as strict JSON: without NaN and Infinity, which Python accepts."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def adapter_weights(folder):
    """The tensors of a run's adapter."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def error_line(capfd, program="sayo_mini.py"):
    """The only line that the program itself wrote to stderr; progress bars do not count."""
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith(f"{program}: ")]
    assert len(lines) == 1, lines
    return lines[0]


def trained(vlm):
    """The parameters of the adapter, {name: tensor}."""
    return {name: p for name, p in vlm.model.named_parameters() if p.requires_grad}


def load(folder=TINY, load_in_4bit=False, **settings):
    """Load a Vlm whose adapter changes its output. LoRA initializes B to 0, and many tests would
    pass by accident with an adapter that does nothing."""
    from model import load_vlm

    torch.manual_seed(0)
    vlm = load_vlm(folder, load_in_4bit=load_in_4bit, device="cpu", **settings)
    randomize_adapter(vlm)
    return vlm


def randomize_adapter(vlm):
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)


def ask(vlm, index=0, G=4, C=12, temperature=1.0, seed=0):
    """Sample G completions for one validation scene. Returns: (Prompt, Completions)."""
    from scenes import Scenes

    example = Scenes("validation", 100)[index]
    prompt = vlm.encode(example.image, example.question)
    generator = torch.Generator(vlm.device).manual_seed(seed)
    return prompt, vlm.sample(prompt, G, C, temperature, generator)
