"""Loading a model and an adapter: the device and its type, damaged folders, adapters that do not
fit, and the adapter in other hands. CUDA is simulated."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, error_line, load, read_log, resume, run_program, run_python
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import model
import sayo_mini
from config import Config, InputError, build_config
from model import adapter_settings, choose_device

CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
GUIDE = (ROOT / "docs" / "use_your_adapter.md").read_text()


def run(folder, flags="", expect=0):
    run_program(folder, f"--prompts_per_step 1 --eval_examples 2 {flags}", expect)


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
def test_a_card_without_usable_cuda_is_an_error_that_says_what_to_install(
    machine, device, tmp_path, capfd
):
    """No run trains the tiny model on the CPU instead."""
    machine()
    with pytest.raises(InputError, match="CUDA is not available") as error:
        choose_device(device)
    for word in ("https://pytorch.org/get-started/locally/", torch.__version__, "--device cpu"):
        assert word in str(error.value)
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)
    assert sayo_mini.main(["--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 2
    assert "CUDA is not available" in error_line(capfd) and not (tmp_path / "run").exists()


def test_no_card_or_a_hidden_one_means_the_cpu(machine, monkeypatch):
    machine(smi=False)
    assert choose_device() == (torch.device("cpu"), torch.float32)
    machine(smi=True)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert choose_device()[0].type == "cpu"


@pytest.mark.parametrize("card, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16")])
def test_compute_type_follows_the_capability(machine, card, dtype):
    machine(card)
    for device in ("auto", None, "cuda"):
        assert choose_device(device) == (torch.device("cuda"), getattr(torch, dtype))
    assert choose_device(None, torch.float32)[1] == torch.float32
    assert choose_device("cpu", torch.bfloat16) == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("quantized", [False, True])
def test_vision_tower_of_qwen2_5_stays_in_fp32_beside_fp16(qwen2_5, quantized):
    half = load(qwen2_5, quantized, dtype=torch.float16)
    visual = half.core.model.visual
    assert {p.dtype for p in visual.parameters()} == {torch.float32}
    assert half.core.lm_head.weight.dtype == half.dtype == torch.float16
    whole = load(qwen2_5, quantized, dtype=torch.bfloat16)
    assert {p.dtype for p in whole.core.model.visual.parameters()} == {torch.bfloat16}


def drop_weight(path):
    weights = load_file(path)
    del weights["model.language_model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def no_tokenizer(path):
    path.unlink()
    path.with_name("tokenizer_config.json").unlink()


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def quantized(path):
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))


def weights_in_a_pickle(path):
    weights = load_file(path)
    torch.save(weights, path.with_suffix(".bin"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model.bin")}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()


DAMAGE = {  # case -> (the damage, the file, a word of the message)
    "a pickle": (weights_in_a_pickle, "model.safetensors", "names model.bin: only .safetensors"),
    "half-downloaded": (cut_in_half, "model.safetensors", "download it again"),
    "a tensor missing": (drop_weight, "model.safetensors", "layers.0.mlp.up_proj.weight"),
    "no tokenizer": (no_tokenizer, "tokenizer.json", "no tokenizer"),
    "no template": (Path.unlink, "chat_template.jinja", "no chat template"),
    "half a config": (cut_in_half, "config.json", "download it"),
    "quantized": (quantized, "config.json", "is already quantized: use the original checkpoint"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_model_folder_is_a_one_line_error(tmp_path, capfd, case):
    damage, name, word = DAMAGE[case]
    folder = shutil.copytree(TINY, tmp_path / "model")
    damage(folder / name)
    capfd.readouterr()
    run(tmp_path / "run", f"--model_name_or_path {folder}", expect=2)
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and str(folder) in err[0] and word in err[0], err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of rank 4 and alpha 64 that changes the output. There is no config.json."""
    folder = tmp_path_factory.mktemp("adapter")
    load(lora_r=4, lora_alpha=64).model.save_pretrained(folder)
    return folder


def test_an_adapter_without_steps_is_compared_with_the_base_model(tmp_path, adapter):
    """Rank and alpha come from the adapter, and its weights are written unchanged. A run that
    trains the adapter further is compared with the adapter as it was."""
    run(tmp_path / "base", "--max_steps 0")
    run(tmp_path / "run", f"--max_steps 0 --adapter {adapter}")
    before, after = (read_log(tmp_path / "run", name)[0] for name in ("before.json", "after.json"))
    assert before == read_log(tmp_path / "base", "before.json")[0] != after
    cfg = read_log(tmp_path / "run", "config.json")[0]
    assert (cfg["lora_r"], cfg["lora_alpha"]) == (4, 64)
    files = (path / "adapter_model.safetensors" for path in (tmp_path / "run/adapter", adapter))
    one, other = map(load_file, files)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)
    resume(tmp_path / "run", "--max_steps 1", expect=2)  # `before` is about the base model
    run(tmp_path / "more", f"--max_steps 1 --adapter {adapter}")
    start = read_log(tmp_path / "more", "before.json")[0]
    assert [(x["text"], x["auroc"]) for x in start] == [(x["text"], x["auroc"]) for x in after]


def test_an_adapter_of_another_model_is_named(adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    cfg = build_config({"model_name_or_path": str(TINY), "device": "cpu", "adapter": str(folder)})
    config = folder / "adapter_config.json"
    for base, said in (("tiny", False), ("Qwen/tiny", False), ("Qwen/Qwen3-VL-2B", True)):
        saved = json.loads(config.read_text()) | {"base_model_name_or_path": base}
        config.write_text(json.dumps(saved))
        model.load_model(cfg)
        assert (f"was trained on {base}, not on {TINY}" in capsys.readouterr().out) == said


@pytest.mark.parametrize("flags", ["--lora_r 8", "--lora_alpha 32"])
def test_a_flag_that_contradicts_the_adapter_is_refused(tmp_path, capfd, adapter, flags):
    run(tmp_path / "run", f"--max_steps 0 --adapter {adapter} {flags}", expect=2)
    line = error_line(capfd)
    assert flags in line and "leave the flag out" in line
    assert not any(tmp_path.iterdir())


EDITS = {
    "missing": lambda w, name: w.pop(name),
    "extra": lambda w, name: w.update({f"{name}.more": torch.ones(2)}),
    "another shape": lambda w, name: w.update({name: torch.ones(4, 4)}),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, adapter, case):
    changed = shutil.copytree(adapter, tmp_path / "changed")
    path = changed / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[3]
    EDITS[case](weights, name)
    save_file(weights, path)
    vlm = load(lora_r=4, lora_alpha=64)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    with pytest.raises(InputError, match="does not fit") as error:
        vlm.load_adapter(changed)
    assert str(changed) in str(error.value) and name in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters())


VARIANTS = [  # a setting that a plain LoRA does not have, and a part of the message
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa: only plain LoRA can be loaded"),
    ({"peft_type": "ADALORA"}, "peft_type ADALORA"),
    ({"peft_type": "LOHA", "lora_alpha": None}, "peft_type LOHA"),
    ({"use_dora": True}, "use_dora"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens [5, 6]"),
    ({"bias": "all"}, "bias all"),
    ({"use_rslora": True}, "use_rslora"),
    ({"a_later_variant": {"x": 1}}, "a_later_variant"),
]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_a_plain_adapter_with_any_start_and_dropout_is_loaded(adapter, tmp_path, init):
    saved = json.loads((adapter / "adapter_config.json").read_text())
    saved |= {"init_lora_weights": init, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    assert adapter_settings(tmp_path, {}) == {"lora_r": 4, "lora_alpha": 64}


@pytest.mark.parametrize(
    "text, word",
    [
        (None, "no adapter"),
        *((text, "cannot read") for text in ("{", "[]", '{"r": 4}', "[" * 100_000)),
        *((json.dumps({"r": 4, "lora_alpha": 64} | setting), word) for setting, word in VARIANTS),
    ],
)
def test_an_unusable_adapter_config_is_a_one_line_error(tmp_path, capfd, adapter, text, word):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "adapter_config.json").unlink()
    if text is not None:
        (folder / "adapter_config.json").write_text(text)
    run(tmp_path / "run", f"--max_steps 0 --adapter {folder}", expect=2)
    assert word in error_line(capfd)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose large steps change the output."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, "--max_steps 2 --learning_rate 1e-2 --warmup_steps 0")
    return folder


def test_no_file_of_an_adapter_contains_a_path_of_this_machine(tmp_path, trained):
    """Model, data set, earlier adapter and run are all given by absolute paths."""
    data = f"--dataset {ROOT}/example/example.jsonl --eval_examples 1"
    run(tmp_path / "run", f"--max_steps 0 --adapter {trained / 'adapter'} {data}")
    files = list((tmp_path / "run" / "adapter").iterdir())
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in files} == names
    for path in files:
        for private in (ROOT, tmp_path, trained, TINY):
            assert str(private).encode() not in path.read_bytes(), path.name
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"


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
    process = run_python("-c", code, cwd=tmp_path)
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
