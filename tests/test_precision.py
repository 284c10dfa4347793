"""Tests of bf16 and fp16 on the CPU: the difference of a step from fp32, the loss scale, and
non-finite outputs. bench/precision.py measures the same on more examples and on whole runs."""

import json
import math
import shlex
from functools import partial

import pytest
import torch
from conftest import TINY, ask, load
from safetensors.torch import load_file, save_file

import model
import sayo_mini
from analysis.metrics import json_row
from bench.precision import CFG, compare_steps
from runtime.parser import build_config
from sources.scenes import Scenes

FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += "--max_completion_length 20 --model_name_or_path".split() + [str(TINY)]


def run(folder, flags="", expect=0):
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def read_log(folder, name="metrics.jsonl"):
    """The rows of a log, parsed as strict JSON: without NaN and Infinity, which Python accepts."""
    lines = (folder / name).read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


# --- against fp32 ---


def test_one_step_is_close_to_fp32():
    """The bounds are loose: several times the differences in bench/results/precision.json."""
    scenes = Scenes("validation", 2)
    found = compare_steps(TINY, [scenes[0], scenes[1]], CFG)
    for name, logps, cosine in (("bf16", 0.5, 0.95), ("fp16", 0.1, 0.999)):
        row = found[name]
        assert 0 < row["logps_max"] < logps and row["rewards_max"] < logps
        assert row["gradient_cosine"] > cosine
        assert row["gradient_norm_ratio"] == pytest.approx(1, abs=0.1)
        assert row["greedy_differs"] < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_and_scores_stay_in_fp32(dtype):
    vlm = load(dtype=dtype)
    assert vlm.dtype == dtype
    scores = vlm.score(*ask(vlm))
    scores.logps.sum().backward()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {p.grad.dtype for p in trained} == {torch.float32}
    kept = scores.logps, scores.entropy, scores.attention, scores.prompt_attention
    assert {tensor.dtype for tensor in kept} == {torch.float32}


# --- the loss scale of fp16 ---


def small_gradient(dtype, loss_scale):
    """The gradient of a loss of about 1e-6, as one vector in fp64."""
    vlm = load(dtype=dtype)
    prompt, completions = ask(vlm, G=4, C=12)
    completions.ids.copy_(
        torch.arange(completions.ids.numel()).view(completions.ids.shape) % 40 + 10
    )
    loss = vlm.score(prompt, completions).logps.sum() * 1e-8
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale > 1)
    scaler.scale(loss).backward()
    trained = [p for p in vlm.model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained]).double() / loss_scale


def test_small_gradients_need_the_loss_scale():
    """fp16 has no positive numbers below 6e-8, so without a loss scale such a gradient is 0."""

    def cosine(a, b):
        return (a @ b / (a.norm() * b.norm()).clamp(min=1e-30)).item()

    expected = small_gradient(torch.float32, 1)
    assert cosine(small_gradient(torch.float16, 1), expected) < 0.9
    assert cosine(small_gradient(torch.float16, 2.0**10), expected) > 0.99


@pytest.fixture
def fp16(monkeypatch):
    """Make every model of a run compute in fp16."""
    monkeypatch.setattr(sayo_mini, "load_vlm", partial(model.load_vlm, dtype=torch.float16))


def loss_scale(folder):
    """The loss scale in the newest checkpoint, or None if it has none."""
    tensors = load_file(folder / "checkpoint.safetensors")
    return tensors["loss_scale"][0].item() if "loss_scale" in tensors else None


def test_only_fp16_has_a_loss_scale(tmp_path, fp16, monkeypatch):
    run(tmp_path / "fp16", "--max_steps 1 --eval_examples 0")
    assert loss_scale(tmp_path / "fp16") == 2**10
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setattr(sayo_mini, "load_vlm", partial(model.load_vlm, dtype=dtype))
        run(tmp_path / name, "--max_steps 1 --eval_examples 0")
        assert loss_scale(tmp_path / name) is None


def overflow_at_steps(monkeypatch, steps):
    """Make the scaled loss of these steps too large for the type of the gradient."""
    original, calls = sayo_mini.train_step, []

    def train_step(*args):
        calls.append(1)
        large = len(calls) in steps
        scale = torch.amp.GradScaler.scale
        with monkeypatch.context() as patch:
            if large:
                patch.setattr(
                    torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * 1e30
                )
            return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", train_step)


def test_overflow_halves_the_loss_scale_and_skips_the_update(tmp_path, fp16, monkeypatch):
    overflow_at_steps(monkeypatch, {2, 3})
    run(tmp_path, "--max_steps 4 --eval_examples 0")
    rows = read_log(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 0]
    assert rows[1]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    assert loss_scale(tmp_path) == 2**8


def test_ten_overflows_in_a_row_stop_the_run(tmp_path, fp16, monkeypatch, capsys):
    overflow_at_steps(monkeypatch, range(2, 99))
    run(tmp_path, "--max_steps 20 --eval_examples 0", expect=2)
    err = capsys.readouterr().err.splitlines()[-1]
    assert "stopped after step 11" in err and "10 in a row" in err
    assert len(read_log(tmp_path)) == 11 and loss_scale(tmp_path) == 1


def test_step_without_gradient_keeps_the_loss_scale(tmp_path, fp16):
    """All rewards are equal, so there is no backward pass that could overflow."""
    run(tmp_path, "--max_steps 2 --eval_examples 0 --reward_weights format=1e-9,attention=0")
    assert loss_scale(tmp_path) == 2**10
    assert [row["skipped_updates"] for row in read_log(tmp_path)] == [0, 0]


@pytest.mark.slow
def test_resumed_fp16_run_equals_an_uninterrupted_one(tmp_path, fp16, monkeypatch):
    """The checkpoint is saved after an overflow, and the run resumes with the halved scale."""
    flags = "--max_steps 4 --save_steps 2 --eval_examples 2"
    overflow_at_steps(monkeypatch, {2})
    run(tmp_path / "whole", flags)
    monkeypatch.undo()
    monkeypatch.setattr(sayo_mini, "load_vlm", partial(model.load_vlm, dtype=torch.float16))
    overflow_at_steps(monkeypatch, {2})
    original, steps = sayo_mini.train_step, []

    def killed(*args):
        steps.append(1)
        if len(steps) == 3:
            raise RuntimeError("power cut")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sayo_mini, "train_step", killed)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tmp_path / "cut", flags)
    assert loss_scale(tmp_path / "cut") == 2**9
    overflow_at_steps(monkeypatch, set())
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "cut")]) == 0
    for file in ("metrics.jsonl", "samples.jsonl", "after.json", "checkpoint.safetensors"):
        whole, cut = ((tmp_path / name / file) for name in ("whole", "cut"))
        if file.endswith("json") or file.endswith("jsonl"):
            assert whole.read_bytes() == cut.read_bytes(), file
        else:
            a, b = load_file(whole), load_file(cut)
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_fp16_run_resumes_from_a_checkpoint_without_loss_scale(tmp_path, fp16, monkeypatch):
    """A checkpoint made with a different dtype has no loss scale; fp16 starts at the default."""
    monkeypatch.setattr(sayo_mini, "load_vlm", model.load_vlm)
    run(tmp_path, "--max_steps 1 --eval_examples 2")
    monkeypatch.setattr(sayo_mini, "load_vlm", partial(model.load_vlm, dtype=torch.float16))
    assert sayo_mini.main(["--resume", "--max_steps", "2", "--output_dir", str(tmp_path)]) == 0
    assert loss_scale(tmp_path) == 2**10


# --- non-finite output ---


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_sampling_passes_nan_on(monkeypatch, temperature):
    """torch.multinomial would raise an error, and on CUDA the process could then no longer use the
    card. The other completions of the batch are the same as without the NaN."""
    vlm = load()
    _, expected = ask(vlm, temperature=temperature)
    original = vlm._logits

    def nan_in_row_0(hidden, *args):
        logits = original(hidden, *args)
        logits[0] = math.nan
        return logits

    monkeypatch.setattr(vlm, "_logits", nan_in_row_0)
    _, found = ask(vlm, temperature=temperature)
    for row in (1, 2, 3):
        length = expected.mask[row].sum()
        assert torch.equal(found.ids[row][:length], expected.ids[row][:length])
    assert found.ids.min() >= 0 and found.ids.max() < vlm.core.config.text_config.vocab_size


def test_sampling_draws_what_multinomial_draws():
    """Both draw the same tokens from the same random numbers, at tiny and real vocabulary sizes."""
    for rows, vocabulary in ((64, 64), (8, 9216), (4, 151936)):
        p = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).softmax(-1)
        p[:, 3:7] = 0
        a, b = (torch.Generator().manual_seed(2) for _ in "ab")
        token = (p / torch.empty_like(p).exponential_(generator=a)).argmax(-1)
        assert torch.equal(token, torch.multinomial(p, 1, generator=b)[:, 0])
        assert torch.equal(a.get_state(), b.get_state())


def nan_after_calls(monkeypatch, calls, module="layers.0"):
    """Make the output of this language-model module NaN after this many calls."""
    counter = []

    def hook(module, args, out):
        counter.append(1)
        return out * math.nan if len(counter) > calls else out

    def load_vlm(*args, **settings):
        vlm = model.load_vlm(*args, **settings)
        vlm.core.model.language_model.get_submodule(module).register_forward_hook(hook)
        return vlm

    monkeypatch.setattr(sayo_mini, "load_vlm", load_vlm)


def assert_one_line(capfd, word):
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("sayo_mini.py")]
    assert len(err) == 1 and word in err[0], err
    return err[0]


def test_nan_during_training_stops_after_ten_skipped_updates(tmp_path, monkeypatch, capfd):
    """Each skipped step is logged with its samples as JSON, and no half-written file remains."""
    nan_after_calls(monkeypatch, 6)  # in the second or third step
    run(tmp_path, "--max_steps 30 --eval_examples 0", expect=2)
    assert "10 in a row" in assert_one_line(capfd, "non-finite")
    rows, samples = read_log(tmp_path), read_log(tmp_path, "samples.jsonl")
    skipped = [row["skipped_updates"] for row in rows]
    assert skipped[0] == 0 and skipped[-10:] == [1] * 10
    assert rows[-1]["loss"] is None and rows[-1]["attention/auroc"] is None
    assert len(samples) == 8 * len(rows) and samples[-1]["attention"] is None
    assert load_file(tmp_path / "checkpoint.safetensors")
    assert not list(tmp_path.glob("unfinished-*"))


def test_run_with_skipped_updates_ends_with_a_report(tmp_path, monkeypatch):
    """All completions and therefore all rewards are equal in the skipped steps, but the NaN
    log-probabilities still skip the update."""
    nan_after_calls(monkeypatch, 6, module="norm")  # in the second or third step
    run(tmp_path, "--max_steps 4 --eval_examples 0")
    skipped = [row["skipped_updates"] for row in read_log(tmp_path)]
    assert skipped[0] == 0 and skipped[-1] == 1
    assert "NaN" not in (tmp_path / "report.html").read_text()


@pytest.fixture
def nan_model(tmp_path):
    """The path of a model folder whose last norm is NaN."""
    folder = tmp_path / "nan"
    folder.mkdir()
    for path in TINY.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("language_model.norm.weight")]
    weights[name].fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_nan_in_evaluation_is_a_one_line_error(tmp_path, nan_model, capfd):
    flags = f"--max_steps 1 --eval_examples 2 --model_name_or_path {nan_model}"
    run(tmp_path / "run", flags, expect=2)
    assert "--no-load_in_4bit" in assert_one_line(capfd, "output is not finite")
    assert not (tmp_path / "run" / "before.json").exists()
    assert not list((tmp_path / "run").glob("unfinished-*"))


def test_nan_in_look_and_probe_is_a_one_line_error(tmp_path, nan_model, capfd):
    model_flags = ["--model_name_or_path", nan_model, "--no-load_in_4bit", "--device", "cpu"]
    picture = tmp_path / "look.png"
    image = tmp_path / "card.png"
    Scenes("validation", 1)[0].image.save(image)
    look = ["look", "--image", str(image), "--question", "what color ?", "--output", str(picture)]
    assert sayo_mini.main([*look, *model_flags]) == 2
    assert_one_line(capfd, "output is not finite")
    assert not picture.exists()
    probe = ["probe", "--eval_examples", "2", "--output_dir", str(tmp_path / "probe")]
    assert sayo_mini.main([*probe, *model_flags]) == 2
    assert_one_line(capfd, "output is not finite")
    assert not (tmp_path / "probe" / "probe.png").exists()


def test_json_row_replaces_nan_and_infinity_by_null():
    row = {"a": math.nan, "b": -math.inf, "c": 1.5, "d": "NaN", "e": 3, "f": True}
    assert json_row(row) == row | {"a": None, "b": None}


def test_default_config_equals_that_of_the_bench():
    """bench/precision.py measures the default step of the tiny model."""
    assert build_config({"model_name_or_path": str(TINY)}) == CFG
