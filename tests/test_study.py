"""study/: all variants of a step have the same loss, the documents show the committed results, the
kill test finds a planted difference, and the model in tiny/ makes mistakes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, ask, load
from PIL import Image

import checkpoint
import sayo_mini
from config import TINY as SETTINGS
from config import Config
from model import load_vlm
from scenes import Scenes
from study import count, growth, kill, make_tiny, step
from study.common import RESULTS, ROOT
from study.random_model import make_model, make_question
from study.step_arms import NaiveVlm

SCENES = Scenes("validation", 10)


# --- the variants of the step benchmark ---


def train_one_step(naive):
    """Returns: metrics, samples and trained weights of a step; the tokens of its forward passes
    without the decoded ones, and its image patches."""
    vlm, counts = load(), {"tokens": 0, "patches": 0}
    if naive:
        vlm.__class__ = NaiveVlm

    def count_tokens(module, args, kwargs):
        counts["tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    def count_patches(module, args, kwargs):
        counts["patches"] += len(args[0] if args else kwargs["hidden_states"])

    vlm.core.model.language_model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    vlm.core.model.visual.register_forward_pre_hook(count_patches, with_kwargs=True)
    vlm.stop_ids = vlm.stop_ids[:0]  # no completion ends early
    settings = dict(num_generations=4, max_completion_length=6, format_lengths="1,6", beta=0.04)
    cfg = Config(**SETTINGS | settings | dict(completions_per_forward=0))
    weights = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer, generator = torch.optim.AdamW(weights, lr=1e-3), torch.Generator().manual_seed(1)
    metrics, samples = sayo_mini.train_step(vlm, [SCENES[0]], cfg, optimizer, generator)
    return metrics, samples, weights, counts


def test_ours_and_naive_make_the_same_step_and_ours_from_fewer_tokens():
    metrics, samples, weights, counts = train_one_step(naive=False)
    other, other_samples, other_weights, naive = train_one_step(naive=True)
    assert [row["text"] for row in samples] == [row["text"] for row in other_samples]
    assert metrics["reward_std"] > 0 and metrics["kl"] > 0
    for name in ("loss", "grad_norm", "kl", "rewards/attention/mean"):
        assert other[name] == pytest.approx(metrics[name], rel=1e-4), name
    for ours, theirs in zip(weights, other_weights):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # the step was up to 1e-3
    prompt, _ = ask(load(), G=1, C=1)
    P, C, G = len(prompt.input_ids), 6, 4
    assert counts["tokens"] == P + 2 * (P + G * C)  # prefill, reference, training
    assert naive["tokens"] == G * P + 2 * G * (P + C)
    assert naive["patches"] == 3 * G * counts["patches"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_variants_take_turns_and_finished_points_are_not_measured_again(tmp_path, monkeypatch):
    args = dict(points=["60,4,2"], arms=("ours", "trl"), rounds=1, device="cpu", cuda_graph=False)
    args = SimpleNamespace(**args, shape="30m", models=tmp_path)
    results, file = {"measured": []}, tmp_path / "step.json"
    step.measure_missing(args, results, file)
    assert json.loads(file.read_text()) == results
    for first, timed in results["measured"][0]["rows"].values():
        assert first["peak"] > 2**20
        parts = [timed[name] for name in ("sample", "score", "update")]
        assert min(parts) > 0 and timed["seconds"] == pytest.approx(sum(parts))
    assert "| 60 | 4 | 2 |" in step.tables(results)["point"]
    monkeypatch.setattr(step, "compare", None)
    step.measure_missing(args, results, file)
    vlm = load_vlm(make_model("30m", tmp_path), load_in_4bit=False, device="cpu")
    example = make_question(vlm, 300, 256)
    prompt = vlm.encode(example.image, example.question)
    assert len(prompt.input_ids) == 300 and len(prompt.image_positions) == 256


@pytest.mark.slow
def test_the_gpu_is_rarely_waited_for():
    """Not once per completion, and decoding waits only to see whether all have ended."""
    cfg = Config(num_generations=4, max_completion_length=12, prompts_per_step=2, max_pixels=2**14)
    counts = count.count_step("30m", replace(cfg, eval_examples=0))
    assert sum(c["waits"] for c in counts.values()) < 40
    assert counts["token"]["launches"] < 11 * 7 * 45
    assert all(c["bytes"] and c["flops"] and c["4090"] for c in counts.values())


# --- tables ---


def rows_of(table):
    """The rows of a Markdown table, as dicts."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_documents_show_the_committed_results():
    """Every row of a table with TRL's costs is a row of the results, perhaps with fewer columns."""
    results = json.loads((RESULTS / "step.json").read_text())
    committed = [row for text in step.tables(results).values() for row in rows_of(text)]
    shown = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            for row in rows_of(table) if "| TRL / ours " in table else []:
                assert any(row.items() <= other.items() for other in committed), (page, row)
                shown += 1
    assert shown >= 20


# --- the kill test ---


@pytest.mark.slow
def test_the_kill_test_passes_and_finds_a_planted_difference(tmp_path, monkeypatch):
    found, flags = [], ["--device", "cpu"]
    for kind, different in kill.kill_and_resume(tmp_path, 2, 1, flags):
        assert not different
        found.append(kind)
    assert found.count(kill.KINDS[0]) == 2 and found[-1] == kill.KINDS[2]
    restore = checkpoint.RunDirectory.restore

    def restore_without_generator(run):
        restore(run)
        run.generator.manual_seed(5)

    monkeypatch.setattr(checkpoint.RunDirectory, "restore", restore_without_generator)
    folder, *_ = kill.kill_at_write(tmp_path, 40, flags)  # after the second step
    kill.finish(folder, flags)
    different = set(kill.differences(tmp_path / "uninterrupted", folder))
    assert {"metrics.jsonl", "samples.jsonl", "checkpoint.safetensors"} <= different
    assert not {"before.json", "config.json", "checkpoint-previous.safetensors"} & different


# --- the cost of more work ---


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.WORK)
def test_costs_do_not_grow(name):
    cost, size = growth.WORK[name]
    assert growth.growth(cost, size) < 4  # 10 is linear


# --- the model in tiny/ and its maker ---


@pytest.mark.slow
def test_tiny_sees_but_makes_mistakes_and_needs_the_image():
    vlm, share = load_vlm(TINY, load_in_4bit=False, device="cpu"), {}
    scenes = list(Scenes("test", 64))
    for blank in (False, True):
        images = [Image.new("RGB", x.image.size) if blank else x.image for x in scenes]
        prompts = [vlm.encode(image, x.question) for image, x in zip(images, scenes)]
        answers = vlm.sample_groups(prompts, 1, make_tiny.MAX_TOKENS, temperature=0)
        right = [f"<answer> {x.answer} </answer>" in a.texts[0] for x, a in zip(scenes, answers)]
        share[blank] = sum(right) / len(right)
    assert 0.45 <= share[False] <= 0.75 and share[True] < 0.2, share
