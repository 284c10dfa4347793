"""study/: all variants of a step have the same loss, gpu.py runs on a CPU, documents show committed
results, the kill test finds a planted difference, and the model in tiny/ makes mistakes."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, ask, load, run_python, trained

import checkpoint
import sayo_mini
from config import TINY as SETTINGS
from config import Config
from scenes import Scenes
from study import ablation, count, growth, kill, make_tiny, step
from study.common import RESULTS, ROOT
from study.step_arms import NaiveVlm

SCENES = Scenes("validation", 10)


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
    settings |= dict(temperature=3.0)  # so that the completions differ
    cfg = Config(**SETTINGS | settings | dict(completions_per_forward=0))
    weights = list(trained(vlm).values())
    optimizer, generator = torch.optim.AdamW(weights, lr=1e-3), torch.Generator().manual_seed(1)
    metrics, samples = sayo_mini.train_step(vlm, [SCENES[0]], cfg, optimizer, generator)
    return metrics, samples, weights, counts


def test_ours_and_naive_make_the_same_step_and_ours_from_fewer_tokens():
    metrics, samples, weights, counts = train_one_step(naive=False)
    other, other_samples, other_weights, naive = train_one_step(naive=True)
    assert [row["text"] for row in samples] == [row["text"] for row in other_samples]
    assert metrics["reward_std"] > 0 and metrics["kl"] > 0
    for name in ("loss", "grad_norm", "kl", "rewards/attention/mean"):
        assert other[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    for ours, theirs in zip(weights, other_weights):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # the step was up to 1e-3
    prompt, _ = ask(load(), G=1, C=1)
    P, C, G = len(prompt.input_ids), 6, 4
    assert counts["tokens"] == P + 2 * (P + G * C)  # prefill, reference, training
    assert naive["tokens"] == G * P + 2 * G * (P + C)
    assert naive["patches"] == 3 * G * counts["patches"]


@pytest.mark.slow
def test_the_gpu_is_rarely_waited_for():
    """Not once per completion, and decoding waits only to see whether all have ended."""
    cfg = Config(num_generations=4, max_completion_length=12, prompts_per_step=2, max_pixels=2**14)
    counts = count.count_step("30m", replace(cfg, eval_examples=0))
    assert sum(c["waits"] for c in counts.values()) < 30
    assert counts["token"]["launches"] < 11 * 7 * 75  # tokens, layers, launches of a layer
    assert all(c["bytes"] and c["flops"] and c["4090"] for c in counts.values())
    fused = count.count_step("30m", replace(cfg, eval_examples=0), fused=True)["token"]
    assert fused["bytes"] < counts["token"]["bytes"] * 2 / 3  # weights are read in 4 bits
    assert fused["flops"] == counts["token"]["flops"]


def gpu(folder, *flags):
    """Returns: the exit code and gpu.json."""
    process = run_python("study/gpu.py", folder, "1500", "--small", *flags)
    return process.returncode, json.loads((folder / "gpu.json").read_text())


@pytest.mark.slow
def test_the_small_form_runs_every_part_on_a_cpu(tmp_path):
    code, found = gpu(tmp_path, "tests", "decode", "step", "tiny", "trl")  # "card": see below
    assert code == 0, found
    assert "passed" in found["tests"]["last"][0]
    assert len(found["decode"]) == 5 and "s" in found["decode"]["graph and dequantized, 4 rows"]
    assert found["step"]["graph, P 384"][0]["update"] > 0
    assert 0 < found["tiny"]["auroc after"] < 1
    assert found["trl"]["trl, P, C, G = (60, 4, 2)"]["s"][0] > 0


@pytest.mark.slow
def test_a_part_that_fails_stops_no_other_and_keeps_what_it_found(tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, found = gpu(tmp_path / "out", "tests", "card")
    assert code == 1 and list(found) == ["tests", "card"] and found["tests"]["exit"] == 1
    assert found["card"]["exit"] == 0 and found["card"]["torch"]
    assert found["tests"]["failed tests"] == [] and "broken" in found["tests"]["failed"]


def rows_of(table):
    """The rows of a Markdown table, as dicts."""
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_documents_show_the_committed_results():
    """Every row of a table with TRL's costs is a row of the results, perhaps with fewer columns."""
    results = json.loads((RESULTS / "step.json").read_text())
    committed = rows_of(step.table(results).split("\n\n")[0])
    shown = 0
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            for row in rows_of(table) if "| TRL / ours " in table else []:
                assert any(row.items() <= other.items() for other in committed), (page, row)
                shown += 1
    assert shown >= 13 + 3


def test_documents_show_the_committed_ablation():
    """The tables of evidence.md are those of the script, README shows some of their cells, and the
    decimals of the findings are in the tables. In this world, attention shows the places named."""
    results = json.loads(ablation.FILE.read_text())
    text = ablation.tables(results)
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    assert f"<!-- ablation -->\n{text}\n<!-- end ablation -->" in evidence
    findings = evidence.split("## Findings")[1].split("##")[0]
    assert set(re.findall(r"0\.\d+", findings)) <= set(re.findall(r"0\.\d+", text))
    (table,) = re.findall(r"(?:^\| arm .*\n(?:^\|.*\n)+)", (ROOT / "README.md").read_text(), re.M)
    committed = rows_of(re.search(r"(?:^\| arm .*\n(?:^\|.*\n)+)", text, re.M)[0])
    assert rows_of(table) and all(
        any(row.items() <= other.items() for other in committed) for row in rows_of(table)
    )
    default_run = {"arm": ablation.SAYO, "rate": 2e-4, "steps": 60}
    for row in results:
        if default_run.items() <= row.items():
            for rows in (row["before"], row["after"]):
                assert min(rows["early_agrees"], rows["late_agrees"]) >= 0.95


@pytest.mark.slow
def test_the_kill_test_passes_and_finds_a_planted_difference(tmp_path, monkeypatch):
    found = []
    for kind, different in kill.kill_and_resume(tmp_path, 2, 1, 1):
        assert not different
        found.append(kind)
    assert found.count(kill.KINDS[0]) == 2 and found[-2:] == list(kill.KINDS[2:])
    restore = checkpoint.RunDirectory.restore

    def restore_without_generator(run):
        restore(run)
        run.generator.manual_seed(5)

    monkeypatch.setattr(checkpoint.RunDirectory, "restore", restore_without_generator)
    folder, *_ = kill.kill_at_write(tmp_path, 32)  # after the second step
    kill.finish(folder)
    different = set(kill.differences(tmp_path / "uninterrupted", folder))
    assert {"metrics.jsonl", "samples.jsonl", "checkpoint.safetensors"} <= different
    assert not {"before.json", "config.json", "checkpoint-previous.safetensors"} & different


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.WORK)
def test_costs_do_not_grow(name):
    cost, size = growth.WORK[name]
    assert growth.growth(cost, size) < 4  # 10 is linear


@pytest.mark.slow
def test_tiny_is_as_its_maker_wants_it():
    for name, share in make_tiny.grade(TINY)[1].items():
        low, high = make_tiny.CRITERIA[name]
        assert low <= share <= high, (name, share)


@pytest.mark.parametrize("stage", ["see", "look again", "be careless"])
def test_a_chat_of_the_teacher_aligns_weights_labels_and_cells_with_its_words(stage):
    """Attention has a goal at the words for rows, in the last stage only."""
    teacher = make_tiny.Teacher(stage, 0)
    ids, weights, soft, cells = teacher.chat(random.Random(0), teacher.scenes.layout(0))
    words = teacher.tokenizer.convert_ids_to_tokens(ids)
    starts = [i + 1 for i, word in enumerate(words) if word == "assistant"]
    assert len(starts) == make_tiny.TURNS
    for start in starts:
        end = words.index("<|im_end|>", start)
        assert words[start] == ("the" if stage == "see" else "look")
        assert weights[start] == weights[end] == 1 and weights[end + 1 :][:1].sum() == 0
    image = [word == make_tiny.IMAGE_TOKEN for word in words]
    assert sum(image) == 49 and not soft[~torch.tensor(image)].any()
    goals = [(word, cell // 7 + 1) for word, cell in zip(words, cells.tolist()) if cell >= 0]
    assert len(goals) >= make_tiny.TURNS if stage == "be careless" else not goals
    assert all(word == f"r{row}" for word, row in goals)
