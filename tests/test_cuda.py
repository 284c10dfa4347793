"""Tests that need a CUDA card; skipped without one. `study/gpu.py` runs them."""

import pytest
import torch
from conftest import DEVICE, TINY, adapter_weights, ask, load, read_log, trained

import sayo_mini
from model import Completions, choose_device, load_vlm

pytestmark = pytest.mark.cuda
FLAGS = ["--device", DEVICE, "--model_name_or_path", str(TINY), "--prompts_per_step", "2"]
FLAGS += "--num_generations 4 --eval_examples 4 --save_steps 1".split()


def run(folder, *flags):
    assert sayo_mini.main([*FLAGS, *flags, "--output_dir", str(folder)]) == 0
    return read_log(folder)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5"])
def test_scores_and_gradients_in_fp32_equal_those_of_the_cpu(family, qwen2_5, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in the patch embedding
    folder = {"qwen3": TINY, "qwen2_5": qwen2_5}[family]
    cpu = load(folder)
    card = load_vlm(folder, load_in_4bit=False, device=DEVICE, dtype=torch.float32)
    card.model.load_state_dict(cpu.model.state_dict())
    (prompt, completions), (moved, _) = ask(cpu), ask(card, C=1)
    there = Completions(completions.ids.to(DEVICE), completions.mask.to(DEVICE), completions.texts)
    ours, theirs = card.score(moved, there), cpu.score(prompt, completions)
    for name in ("logps", "entropy", "attention", "prompt_attention"):
        one, other = (getattr(scores, name).detach().cpu() for scores in (ours, theirs))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=name)
    gradients = []
    for vlm, scores in ((card, ours), (cpu, theirs)):
        scores.logps.mean().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in trained(vlm).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9999
    assert gradients[0].norm() == pytest.approx(gradients[1].norm().item(), rel=1e-3)


@pytest.mark.parametrize("quantized", ["--load_in_4bit", "--no-load_in_4bit"])
def test_a_run_trains_and_resumes_in_the_compute_type_of_the_device(tmp_path, quantized):
    run(tmp_path / "run", quantized, "--max_steps", "2")
    metrics = run(tmp_path / "run", "--resume", "--max_steps", "3")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(torch.tensor(row["grad_norm"]).isfinite() for row in metrics)
    adapter = adapter_weights(tmp_path / "run")
    assert any(w.abs().max() > 0 for name, w in adapter.items() if "lora_B" in name)
    vlm = load_vlm(TINY, load_in_4bit=quantized == "--load_in_4bit", device=DEVICE)
    assert vlm.dtype == choose_device(DEVICE)[1]
    scores = vlm.score(*ask(vlm))
    assert scores.logps.isfinite().all() and scores.attention.isfinite().all()


@pytest.mark.parametrize("quantized", [True, False])
def test_a_cuda_graph_samples_the_same_completions(quantized):
    vlm, samples = load_vlm(TINY, load_in_4bit=quantized, device=DEVICE), []
    for vlm.cuda_graph in (False, True):
        samples.append(ask(vlm)[1].texts)
    assert sum(a == b for a, b in zip(*samples)) >= 3  # in 16 bits, rounding may change a token


def test_nan_does_not_break_the_cuda_context():
    """torch.multinomial would raise a device assert, after which nothing runs on the card."""
    vlm = load_vlm(TINY, load_in_4bit=False, device=DEVICE)
    with torch.no_grad():
        vlm.core.lm_head.weight.fill_(torch.nan)
    _, completions = ask(vlm)
    assert len(completions.ids) == 4
    assert torch.ones(3, device=DEVICE).sum().item() == 3


def test_two_runs_with_deterministic_are_bit_identical(tmp_path):
    for name in ("one", "two"):
        run(tmp_path / name, "--deterministic", "--max_steps", "2")
    for file in ("metrics.jsonl", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
