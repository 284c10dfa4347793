"""Loading a model and an adapter: the device and its type, damaged folders, adapters that do not
fit, and the adapter in other hands. CUDA is simulated."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, ask, load
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import model
import sayo_mini
from config import Config, InputError
from model import choose_device, load_vlm

ROOT = Path(__file__).parent.parent
FAST = "--device cpu --no-load_in_4bit --prompts_per_step 1 --num_generations 2 --eval_examples 2"
FAST = [*FAST.split(), "--model_name_or_path", str(TINY)]
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
GUIDE = (ROOT / "docs" / "use_your_adapter.md").read_text()


def one_error(capfd):
    """The error line on stderr, which must be the only one."""
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("sayo_mini.py: ")]
    assert len(lines) == 1, lines
    return lines[0]


# --- the device ---


@pytest.fixture
def machine(monkeypatch):
    """Returns: a function that simulates a machine; `card` is a compute capability or None."""

    def simulate(card=None, smi=True):
        monkeypatch.setattr(model.shutil, "which", lambda name: smi and f"/bin/{name}" or None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
        monkeypatch.setattr(
            torch.cuda,  # like torch, counts emulation as support
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or card >= (8, 0),
        )

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return simulate


@pytest.mark.parametrize("device", ["auto", None, "cuda"])
def test_a_card_without_usable_cuda_is_an_error_that_says_what_to_install(machine, device):
    machine()
    with pytest.raises(InputError, match="CUDA is not available") as error:
        choose_device(device)
    assert "https://pytorch.org/get-started/locally/" in str(error.value)
    assert torch.__version__ in str(error.value) and "--device cpu" in str(error.value)
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)


def test_no_card_or_a_hidden_one_means_the_cpu(machine, monkeypatch):
    machine(smi=False)
    assert choose_device() == (torch.device("cpu"), torch.float32)
    with pytest.raises(InputError, match="CUDA is not available"):
        choose_device("cuda")
    machine(smi=True)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device()[0].type == "cpu"


def test_a_run_without_usable_cuda_does_not_train_the_tiny_model(machine, tmp_path, capfd):
    machine()
    assert sayo_mini.main(["--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 2
    assert "CUDA is not available" in one_error(capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("card, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_compute_type_follows_the_capability(machine, card, dtype):
    machine(card)
    for device in ("auto", None, "cuda"):
        assert choose_device(device) == (torch.device("cuda"), getattr(torch, dtype))
    assert choose_device(None, torch.float32)[1] == torch.float32
    assert choose_device("cpu", torch.bfloat16) == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, None),
    ],
)
@pytest.mark.slow
def test_expandable_segments_are_used_unless_the_user_sets_the_allocator(given, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    code = "import sayo_mini, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert found.stdout.decode().strip() == str(expected if sys.platform == "linux" else None)


# --- fp16 and the vision tower ---


@pytest.mark.parametrize("quantized", [False, True])
def test_vision_tower_of_qwen2_5_stays_in_fp32_beside_fp16(qwen2_5, quantized):
    settings = dict(load_in_4bit=quantized, device="cpu")
    half = load_vlm(qwen2_5, dtype=torch.float16, **settings)
    visual = half.core.model.visual
    assert {p.dtype for p in visual.parameters()} == {torch.float32}
    assert half.core.lm_head.weight.dtype == half.dtype == torch.float16
    whole = load_vlm(qwen2_5, dtype=torch.bfloat16, **settings)
    assert {p.dtype for p in whole.core.model.visual.parameters()} == {torch.bfloat16}


def test_vision_features_that_overflow_in_fp16_arrive_finite(qwen2_5):
    """As in the real tower, intermediate values of a block exceed 65,504 but the output does not.
    In fp16, the output of the same tower is NaN."""
    vlm = load_vlm(qwen2_5, load_in_4bit=False, device="cpu", dtype=torch.float16)
    visual = vlm.core.model.visual
    with torch.no_grad():
        visual.blocks[0].mlp.down_proj.weight *= 1e7
    prompt, completions = ask(vlm)
    scores = vlm.score(prompt, completions)
    assert scores.logps.isfinite().all() and scores.attention.isfinite().all()
    visual.half()
    prompt.features = None
    assert not vlm.score(prompt, completions).logps.isfinite().all()


# --- model folders ---


def drop_weight(path):
    weights = load_file(path)
    del weights["model.language_model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def no_tokenizer(path):
    path.unlink()
    path.with_name("tokenizer_config.json").unlink()


def other_type(path):
    path.write_text(path.read_text().replace('"qwen3_vl"', '"qwen2_vl"'))


DAMAGE = {  # case -> (the damage, the file, a word of the message)
    "half-downloaded": (
        lambda p: p.write_bytes(p.read_bytes()[:100_000]),
        "model.safetensors",
        "download it again",
    ),
    "no weights": (Path.unlink, "model.safetensors", "download it again"),
    "a tensor missing": (drop_weight, "model.safetensors", "layers.0.mlp.up_proj.weight"),
    "no tokenizer": (no_tokenizer, "tokenizer.json", "no tokenizer"),
    "no template": (Path.unlink, "chat_template.jinja", "no chat template"),
    "no processor": (Path.unlink, "preprocessor_config.json", "download it again"),
    "half a config": (lambda p: p.write_text(p.read_text()[:300]), "config.json", "download it"),
    "another model": (other_type, "config.json", "supported: qwen2_5_vl and qwen3_vl"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_folder_is_a_one_line_error(tmp_path, capfd, case):
    damage, name, word = DAMAGE[case]
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    damage(folder / name)
    flags = [*FAST[:-1], str(folder), "--output_dir", str(tmp_path / "run")]
    capfd.readouterr()
    assert sayo_mini.main(flags) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and str(folder) in err[0] and word in err[0], err
    assert not (tmp_path / "run").exists()


def test_chat_template_json_is_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    vlm, tiny = load(folder), load()
    assert vlm.tokenizer.chat_template == tiny.tokenizer.chat_template
    (one, _), (other, _) = ask(vlm, C=1), ask(tiny, C=1)
    assert torch.equal(one.input_ids, other.input_ids)


# --- adapters ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of rank 4 and alpha 64 that changes the output. There is no config.json."""
    folder = tmp_path_factory.mktemp("adapter")
    load(lora_r=4, lora_alpha=64).model.save_pretrained(folder)
    return folder


def train_with(adapter, folder, *flags):
    flags = [*FAST, "--max_steps", "0", "--adapter", str(adapter), *flags]
    return sayo_mini.main([*flags, "--output_dir", str(folder)])


def test_an_adapter_without_steps_is_compared_with_the_base_model(tmp_path, adapter):
    """Rank and alpha come from the adapter, and its weights are written unchanged."""
    base = [*FAST, "--max_steps", "0", "--output_dir", str(tmp_path / "base")]
    assert sayo_mini.main(base) == 0
    assert train_with(adapter, tmp_path / "run") == 0
    before, after, plain = (
        json.loads((tmp_path / name).read_text())
        for name in ("run/before.json", "run/after.json", "base/before.json")
    )
    assert before == plain != after
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (cfg["lora_r"], cfg["lora_alpha"]) == (4, 64)
    files = (path / "adapter_model.safetensors" for path in (tmp_path / "run/adapter", adapter))
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


def test_a_loaded_adapter_scores_as_it_does_in_plain_peft(adapter):
    """With alpha 32 instead of 64, the effect of the adapter would be half as large."""
    vlm = load(lora_r=4, lora_alpha=64)
    vlm.load_adapter(adapter)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(TINY), adapter)
    ids = torch.tensor([[1, 10, 13, 14, 16, 2]])
    with torch.no_grad():
        one, other = vlm.core(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flags", ["--lora_r 8", "--lora_alpha 32"])
def test_a_flag_that_contradicts_the_adapter_is_refused(tmp_path, capfd, adapter, flags):
    assert train_with(adapter, tmp_path / "run", *flags.split()) == 2
    line = one_error(capfd)
    assert flags in line and "leave the flag out" in line
    assert not any(tmp_path.iterdir())


EDITS = {
    "missing": (lambda w, name: w.pop(name), "does not fit"),
    "extra": (lambda w, name: w.update({f"{name}.more": torch.ones(2)}), "does not fit"),
    "another shape": (lambda w, name: w.update({name: torch.ones(4, 4)}), "does not fit"),
    "NaN": (lambda w, name: w[name].fill_(torch.nan), "NaN or infinity"),
    "inf": (lambda w, name: w[name].view(-1)[0].fill_(torch.inf), "NaN or infinity"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, adapter, case):
    edit, word = EDITS[case]
    changed = tmp_path / "changed"
    shutil.copytree(adapter, changed)
    path = changed / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    edit(weights, name)
    save_file(weights, path)
    vlm = load(lora_r=4, lora_alpha=64)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    with pytest.raises(InputError, match=word) as error:
        vlm.load_adapter(changed)
    assert str(changed) in str(error.value) and name in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters())


@pytest.mark.parametrize(
    "text, word",
    [
        (None, "no adapter"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"r": 4}', "damaged"),
        ('{"r": 4, "lora_alpha": 64, "use_rslora": true}', "use_rslora"),
        ('{"r": 4, "lora_alpha": 64, "rank_pattern": {"q": 8}}', "rank_pattern"),
    ],
)
def test_an_unusable_adapter_config_is_a_one_line_error(tmp_path, capfd, adapter, text, word):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / "adapter_config.json").unlink()
    if text is not None:
        (folder / "adapter_config.json").write_text(text)
    assert train_with(folder, tmp_path / "run") == 2
    assert word in one_error(capfd)
    assert not (tmp_path / "run").exists()


# --- the adapter in other hands ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose large steps change the output."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = "--max_steps 2 --num_generations 4 --learning_rate 1e-2 --warmup_steps 0".split()
    assert sayo_mini.main([*FAST, *flags, "--output_dir", str(folder)]) == 0
    return folder


def test_no_file_of_an_adapter_contains_a_path_of_this_machine(tmp_path, trained):
    """Model, data set, earlier adapter and run are all given by absolute paths."""
    data = ["--dataset", str(ROOT / "example" / "example.jsonl"), "--eval_examples", "1"]
    assert train_with(trained / "adapter", tmp_path / "run", *data) == 0
    files = list((tmp_path / "run" / "adapter").iterdir())
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in files} == names
    for path in files:
        for private in (ROOT, tmp_path, trained, TINY):
            assert str(private).encode() not in path.read_bytes(), path.name
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


def test_code_of_the_card_loads_the_adapter(trained, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the base model is called tiny
    (code,) = CODE.findall((trained / "adapter" / "README.md").read_text())
    namespace, changed = (
        {},
        code.replace('adapter = "."', f"adapter = {str(trained / 'adapter')!r}"),
    )
    assert changed != code
    exec(changed, namespace)
    lora_b = [p for name, p in namespace["model"].named_parameters() if "lora_B" in name]
    assert lora_b and all(p.abs().max() > 0 for p in lora_b)


def test_the_guide_uses_the_defaults():
    (code,) = CODE.findall(GUIDE)
    namespace = {}
    exec(re.search(r"instruction = \(.*?\n\)", code, re.DOTALL)[0], namespace)
    assert namespace["instruction"] == Config.instruction
    assert Config.model_name_or_path in code and Config.output_dir + "/adapter" in code
    assert Config.max_pixels == 2**18 and "= 2**18" in code
    assert f"max_new_tokens={Config.max_completion_length}" in code


@pytest.mark.slow
def test_the_guide_answers_as_the_program_does_and_merges(tmp_path, trained):
    """Outside the repository, in a process that imports nothing of it."""
    image, question = ROOT / "example" / "one.png", "What color is the dot on the pink card?"
    merged, adapter = tmp_path / "merged", trained / "adapter"
    changes = {  # lines of the guide that name the defaults -> what this test uses instead
        r'base, adapter = "Qwen/[^\n]*"': f"base, adapter = {str(TINY)!r}, {str(adapter)!r}",
        r'"example/one.png"': repr(str(image)),
        r"instruction = \(.*?\n\)": 'instruction = ""',
        r'"runs/sayo/merged"': repr(str(merged)),
    }
    (code,) = CODE.findall(GUIDE)
    for pattern, new in changes.items():
        code, count = re.subn(pattern, lambda _, new=new: new, code, flags=re.DOTALL)
        assert count, pattern
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    vlm = load(max_pixels=2**18)
    vlm.load_adapter(adapter)
    prompt = vlm.encode(Image.open(image), question)
    answer = vlm.sample(prompt, 1, 110, temperature=0)
    assert process.stdout.strip() == answer.texts[0].strip()
    ids = torch.tensor([[1, 12, 13, 14]])
    with torch.no_grad():
        base = AutoModelForImageTextToText.from_pretrained(TINY)
        without = base(input_ids=ids).logits
        expected = PeftModel.from_pretrained(base, adapter)(input_ids=ids).logits
        found = AutoModelForImageTextToText.from_pretrained(merged)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - without).abs().max() > 1e-2
