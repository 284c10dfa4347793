"""Tests of sources/pretrained.py: the device and its compute type, damaged model folders, adapters
and GPU errors. CUDA is simulated."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, ask, load
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import sayo_mini
from config import InputError
from model import load_vlm
from runtime.errors import one_line_errors
from sources import pretrained
from sources.packages import import_problem
from sources.pretrained import choose_device

FAST = "--device cpu --no-load_in_4bit --prompts_per_step 1 --num_generations 2 --eval_examples 2"
FAST = [*FAST.split(), "--model_name_or_path", str(TINY)]
ROOT = Path(__file__).parent.parent


def one_error(capfd):
    """The error line on stderr, which must be the only one."""
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("sayo_mini.py: ")]
    assert len(lines) == 1, lines
    return lines[0]


# --- the device ---


@pytest.fixture
def machine(monkeypatch):
    """Returns: a function that simulates a machine; `card` is a compute capability or None."""

    def simulate(card=None, smi=True, cuda="13.0", code="sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"):
        monkeypatch.setattr(pretrained.shutil, "which", lambda name: smi and f"/bin/{name}" or None)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", code.split)
        monkeypatch.setattr(
            torch.cuda,  # like torch, counts emulation as support
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or card >= (8, 0),
        )

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return simulate


@pytest.mark.parametrize("device", ["auto", None, "cuda"])
@pytest.mark.parametrize(
    "cuda, word, index", [(None, "without CUDA", 130), ("13.0", "driver", 126)]
)
def test_a_card_without_usable_cuda_is_an_error_that_says_what_to_install(
    machine, device, cuda, word, index
):
    machine(cuda=cuda)
    with pytest.raises(InputError, match=word) as error:
        choose_device(device)
    release = torch.__version__.split("+")[0]
    command = f"torch=={release} --index-url https://download.pytorch.org/whl/cu{index}"
    assert command in str(error.value) and "--device cpu" in str(error.value)
    assert choose_device("cpu") == (torch.device("cpu"), torch.float32)


def test_no_card_or_a_hidden_one_means_the_cpu(machine, monkeypatch):
    machine(smi=False)
    assert choose_device()[0].type == "cpu"
    with pytest.raises(InputError, match="CUDA is not available"):
        choose_device("cuda")
    machine(smi=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device()[0].type == "cpu"


def test_a_run_without_usable_cuda_does_not_train_the_tiny_model(machine, tmp_path, capfd):
    machine(cuda=None)
    assert sayo_mini.main(["--max_steps", "1", "--output_dir", str(tmp_path / "run")]) == 2
    assert "without CUDA" in one_error(capfd)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "card, code, index",
    [
        ((7, 0), "sm_75 sm_80 sm_90", "cu126"),  # V100, CUDA 13
        ((6, 1), "sm_75 sm_80 compute_80", "cu126"),
        ((12, 0), "sm_50 sm_80 sm_90", "cu130"),  # newer than the wheel, which has no PTX
        ((8, 0), "sm_86", "cu130"),  # code for a later minor version does not run
    ],
)
def test_a_card_that_the_wheel_has_no_code_for_is_refused_before_loading(
    machine, monkeypatch, card, code, index
):
    machine(card, code=code)
    monkeypatch.setattr(pretrained, "load_pretrained", None)  # must not be called
    with pytest.raises(InputError, match=f"capability {card[0]}.{card[1]}.*{index}"):
        load_vlm(TINY, device="cuda")


@pytest.mark.parametrize(
    "card, code",
    [
        ((7, 5), "sm_75"),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90"),  # RTX 4090: no wheel lists it
        ((9, 0), "sm_90a"),
        ((12, 1), "sm_100 sm_120"),
        ((12, 0), "sm_80 compute_90"),  # PTX is compiled for later cards
    ],
)
def test_a_card_that_the_wheel_has_code_for_is_accepted(machine, card, code):
    machine(card, code=code)
    assert choose_device()[0].type == "cuda"


@pytest.mark.parametrize(
    "card, dtype", [((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16")]
)
def test_compute_type_follows_the_capability_and_is_printed(machine, capsys, card, dtype):
    machine(card, code="sm_75 sm_80")
    device, chosen = choose_device()
    assert chosen == getattr(torch, dtype)
    pretrained.print_compute_type(device, chosen)
    line = f"computing in {dtype} on Card (compute capability {card[0]}.{card[1]}, bf16 needs 8.0)"
    assert capsys.readouterr().out == line + "\n"
    assert choose_device(None, torch.float32)[1] == torch.float32
    pretrained.print_compute_type(device, torch.float32)
    assert "float32 on Card (as requested)" in capsys.readouterr().out


def test_the_compute_type_is_printed_once_and_only_on_cuda(monkeypatch, capsys):
    printed = []
    monkeypatch.setattr(pretrained, "print_compute_type", lambda *args: printed.append(args))
    load_vlm(TINY, load_in_4bit=False, device="cpu")
    assert not printed

    def fail(*_):
        raise OSError("enough")

    monkeypatch.setattr(pretrained, "load_parts", fail)
    with pytest.raises(InputError):
        pretrained.load_pretrained(str(TINY), False, torch.device("cuda"), torch.float16)
    assert len(printed) == 1


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
    saved = load_file(qwen2_5 / "model.safetensors")
    name = "patch_embed.proj.weight"
    exact = next(value for key, value in saved.items() if key.endswith(name))
    assert torch.equal(visual.get_parameter(name), exact)  # not rounded through fp16


def test_vision_features_that_overflow_in_fp16_arrive_finite(qwen2_5):
    """As in the real tower, intermediate values of a block exceed 65,504 but the output does not.
    In fp16, the output of the same tower is NaN."""
    vlm = load_vlm(qwen2_5, load_in_4bit=False, device="cpu", dtype=torch.float16)
    visual = vlm.core.model.visual
    with torch.no_grad():
        visual.blocks[0].mlp.down_proj.weight *= 1e7
    prompt, completions = ask(vlm)
    entered = []
    layer = vlm.core.model.language_model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    scores = vlm.score(prompt, completions)
    assert entered[0].dtype == torch.float16 and entered[0].isfinite().all()
    assert scores.logps.isfinite().all() and scores.attention.isfinite().all()
    visual.half()
    prompt.features = None
    assert not vlm.score(prompt, completions).logps.isfinite().all()


# --- model folders and the hub ---


def cut(path):
    path.write_bytes(path.read_bytes()[:100_000])


def drop_weight(path):
    weights = load_file(path)
    del weights["model.language_model.layers.0.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def no_tokenizer(path):
    path.unlink()
    path.with_name("tokenizer_config.json").unlink()


DAMAGE = {  # case -> (the damage, the file, a word of the message)
    "half-downloaded": (cut, "model.safetensors", "damaged: download it again"),
    "empty weights": (lambda p: p.write_bytes(b""), "model.safetensors", "damaged"),
    "no weights": (Path.unlink, "model.safetensors", "not an intact model folder"),
    "a tensor missing": (drop_weight, "model.safetensors", "layers.0.mlp.up_proj.weight"),
    "no tokenizer": (no_tokenizer, "tokenizer.json", "no tokenizer"),
    "half a tokenizer": (lambda p: p.write_text("{}"), "tokenizer.json", "not an intact"),
    "no template": (Path.unlink, "chat_template.jinja", "no chat template"),
    "no processor": (Path.unlink, "preprocessor_config.json", "not an intact"),
    "another processor": (
        lambda p: p.write_text(p.read_text().replace('"patch_size": 8', '"patch_size": 16')),
        "preprocessor_config.json",
        "patch_size",
    ),
    "half a config": (
        cut_text := lambda p: p.write_text(p.read_text()[:300]),
        "config.json",
        "not an intact",
    ),
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


def test_missing_tensors_are_not_also_printed_as_a_table(tmp_path):
    folder, printed = tmp_path / "model", []
    shutil.copytree(TINY, folder)
    drop_weight(folder / "model.safetensors")
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    log = logging.getLogger("transformers.modeling_utils")
    log.addHandler(handler)
    with pytest.raises(InputError):
        load(folder)
    log.removeHandler(handler)
    assert printed == []


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


@pytest.mark.slow
def test_without_a_network_the_error_comes_immediately(tmp_path):
    """This runs in its own process, because the tests set HF_HUB_OFFLINE. The hub is a port that
    nobody listens to; transformers alone would retry for 23 seconds."""
    code = "from model import load_vlm\nimport time\nstart = time.time()\n"
    code += "try:\n  load_vlm('Qwen/Qwen3-VL-2B-Instruct', device='cpu')\n"
    code += "except ValueError as e:\n  print(type(e).__name__, e, time.time() - start)"
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    env |= {"HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    words = found.stdout.decode().split()
    assert words[0] == "InputError" and "network" in found.stdout.decode()
    assert float(words[-1]) < 10


# --- packages that break the import ---


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["sayo_mini.py"])
def test_a_mismatched_torchvision_is_an_error_that_says_what_to_uninstall(tmp_path, entry):
    info = tmp_path / "torchvision-0.20.0.dist-info"
    for folder in (tmp_path / "torchvision", info):
        folder.mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.0\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, entry, "--output_dir", str(tmp_path / "run")]
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "torchvision::nms does not exist" in line and "pip uninstall torchvision" in line


def test_an_old_torchao_or_a_missing_package_is_a_one_line_error(monkeypatch):
    def refuse(*_):
        raise ImportError("Found an incompatible version of torchao. Found version 0.1.0")

    monkeypatch.setattr(pretrained, "get_peft_model", refuse)
    with pytest.raises(InputError, match="0.1.0.*pip uninstall torchvision torchaudio torchao"):
        load_vlm(TINY, load_in_4bit=False, device="cpu")
    problem = import_problem(ModuleNotFoundError("No module named 'peft'"))
    assert str(problem) == "No module named 'peft': pip install -r requirements.txt"


# --- GPU errors ---


@pytest.mark.parametrize(
    "error, word",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "lower --completions_per_forward"),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "lower --completions_per_forward",
        ),
        (torch.AcceleratorError("CUDA error: out of memory\nmore"), "lower --completions_per"),
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with"),
            "the GPU failed (CUDA error: device-side assert triggered); nothing was saved",
        ),
    ],
)
def test_a_gpu_error_is_a_one_line_error(capsys, tmp_path, error, word):
    with one_line_errors(["--output_dir", str(tmp_path / "run")], "python sayo_mini.py") as outcome:
        raise error
    assert outcome.exit_code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sayo_mini.py: ") and word in line


def test_other_runtime_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors([], "python sayo_mini.py"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, None),
    ],
)
def test_expandable_segments_are_used_unless_the_user_sets_the_allocator(given, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    env = {k: v for k, v in os.environ.items() if k not in names} | given
    code = "import runtime, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert found.stdout.decode().strip() == str(expected if sys.platform == "linux" else None)


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


def test_rank_and_alpha_come_from_the_adapter(tmp_path, adapter):
    assert train_with(adapter, tmp_path / "run") == 0
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (cfg["lora_r"], cfg["lora_alpha"]) == (4, 64)
    weights = (
        folder / "adapter_model.safetensors" for folder in (tmp_path / "run/adapter", adapter)
    )
    one, other = map(load_file, weights)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_loaded_adapter_scores_as_it_does_in_plain_peft(adapter):
    """With alpha 32 instead of 64, the effect of the adapter would be half as large."""
    vlm = load(lora_r=4, lora_alpha=64)
    vlm.load_adapter(adapter)
    plain = AutoModelForImageTextToText.from_pretrained(TINY)
    plain = PeftModel.from_pretrained(plain, adapter)
    ids = torch.tensor([[1, 10, 13, 14, 16, 2]])
    with torch.no_grad():
        one, other = vlm.core(input_ids=ids).logits, plain(input_ids=ids).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_look_takes_rank_and_alpha_from_the_adapter(tmp_path, adapter, monkeypatch):
    seen, original = [], sayo_mini.load_vlm

    def record(*args, **settings):
        seen.append((settings["lora_r"], settings["lora_alpha"]))
        return original(*args, **settings)

    monkeypatch.setattr(sayo_mini, "load_vlm", record)
    flags = ["look", "--image", str(ROOT / "example" / "one.png"), "--question", "what color ?"]
    flags += [*FAST, "--adapter", str(adapter), "--output", str(tmp_path / "look.png")]
    assert sayo_mini.main(flags) == 0
    assert seen == [(4, 64)]


@pytest.mark.parametrize("flags", ["--lora_r 8", "--lora_alpha 32"])
@pytest.mark.parametrize("command", ["train", "look"])
def test_a_flag_that_contradicts_the_adapter_is_refused_before_loading(
    tmp_path, capfd, adapter, flags, command, monkeypatch
):
    monkeypatch.setattr(sayo_mini, "load_vlm", None)
    if command == "train":
        assert train_with(adapter, tmp_path / "run", *flags.split()) == 2
    else:
        look = ["look", "--image", str(ROOT / "example" / "one.png"), "--question", "what ?"]
        look += [*FAST, *flags.split(), "--adapter", str(adapter)]
        assert sayo_mini.main([*look, "--output", str(tmp_path / "look.png")]) == 2
    line = one_error(capfd)
    assert flags in line and "leave the flag out" in line
    assert not any(tmp_path.iterdir())


def change(adapter, folder, edit):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    edit(weights, sorted(weights)[3])
    save_file(weights, path)
    return folder


EDITS = {
    "missing": (lambda w, name: w.pop(name), "missing key"),
    "extra": (lambda w, name: w.update({f"{name}.more": torch.ones(2)}), "unexpected key"),
    "another shape": (lambda w, name: w.update({name: torch.ones(4, 4)}), "wrong shape"),
    "NaN": (lambda w, name: w[name].fill_(torch.nan), "NaN or infinity"),
    "inf": (lambda w, name: w[name].view(-1)[0].fill_(torch.inf), "NaN or infinity"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path, capfd, adapter, case
):
    edit, word = EDITS[case]
    changed = change(adapter, tmp_path / "changed", edit)
    assert train_with(changed, tmp_path / "run") == 2
    line = one_error(capfd)
    assert str(changed) in line and word in line and "lora_" in line
    vlm = load(lora_r=4, lora_alpha=64)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    with pytest.raises(InputError):
        vlm.load_adapter(changed)
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters())


@pytest.mark.parametrize(
    "text, word",
    [
        (None, "no adapter"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"r": 4}', "damaged"),
        ('{"r": "x", "lora_alpha": 64}', "damaged"),
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


def test_without_steps_the_adapter_is_compared_with_the_base_model(tmp_path, adapter):
    base = [*FAST, "--max_steps", "0", "--output_dir", str(tmp_path / "base")]
    assert sayo_mini.main(base) == 0
    assert train_with(adapter, tmp_path / "run") == 0
    before, after, plain = (
        json.loads((tmp_path / name).read_text())
        for name in ("run/before.json", "run/after.json", "base/before.json")
    )
    assert before == plain != after
