"""study/: all variants of a step have the same loss, the documents show the committed results, the
kill test finds a planted difference, and the model in tiny/ makes mistakes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, ask, load
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

import checkpoint
import reward
import sayo_mini
from config import TINY as SETTINGS
from config import Config
from data import region_mask
from model import load_vlm
from scenes import Scenes
from study import kill, make_tiny, memory, step
from study.common import RESULTS, ROOT
from study.random_model import make_model, make_question, model_config
from study.step_arms import NaiveVlm, make_trl_trainer

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
def test_trl_has_the_same_loss_and_gradient(tmp_path, monkeypatch):
    """TRL samples, rewards and updates. Our loss of the same completions has the same gradient."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    monkeypatch.chdir(tmp_path)
    ours, theirs, seen = load(), load(), {}
    adapter = {k: v.clone() for k, v in get_peft_model_state_dict(theirs.model).items()}

    def rewards(prompts, completion_ids, **kwargs):
        seen["ids"] = torch.tensor(completion_ids)
        return [float(i % 2) for i in range(len(prompts))]

    trainer = make_trl_trainer(theirs, SCENES[0], rewards, 12, 4, checkpointing=True)
    set_peft_model_state_dict(trainer.model, adapter)
    trainer.args.max_steps = trainer.args.logging_steps = 1
    trainer.train()
    log = trainer.state.log_history[0]
    prompt, completions = ask(ours, G=4, C=12)
    completions.ids, completions.mask = seen["ids"], torch.ones(4, 12, dtype=torch.bool)
    logps = ours.score(prompt, completions).logps
    with torch.no_grad():
        reference = ours.score(prompt, completions, attention=False, reference=True)
    advantages = reward.group_advantages(torch.tensor([0.0, 1, 0, 1]))
    fixed = logps.detach(), reference.logps, advantages, completions.mask
    loss, stats = reward.grpo_loss(logps, *fixed, beta=0.001)
    loss.backward()
    gradients = [p.grad.norm() for p in ours.model.parameters() if p.requires_grad]
    assert log["kl"] == pytest.approx(stats["kl"], rel=1e-4) and stats["kl"] > 1e-3
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-8)
    assert log["grad_norm"] == pytest.approx(torch.stack(gradients).norm().item(), rel=1e-4)


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


@pytest.mark.parametrize("shape, billions", [("2b", 2.13), ("8b", 8.77)])
def test_shapes_have_the_published_sizes(shape, billions):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config(shape))
    model.tie_weights()
    assert model.num_parameters() == pytest.approx(1e9 * billions, rel=0.003)


# --- tables ---


def entry(part, point, seconds, **options):
    """A measured point where the naive variant takes twice as long as ours, and TRL three times."""
    rows = {}
    for k, arm in enumerate(step.ARMS, 1):
        rows[arm] = [{"peak": k * 2**20}] + 2 * [{"seconds": k * seconds, "capture": seconds / 100}]
    usual = {"device": "cpu", "load_in_4bit": True, "gradient_checkpointing": True}
    return {"part": part, **dict(zip("PCG", point)), **usual, **options, "rows": rows}


def test_step_tables():
    measured = [entry("setting", (20, 20, 4), 2.0), entry("point", (20, 30, 4), 1.0)]
    measured[1]["rows"].pop("trl")
    measured += [entry("scaling G", (20, 20, G), 1 + G / 4) for G in (4, 8, 16)]
    for n in (1, 2, 5):
        measured.append(entry("scaling layers", (20, 20, 4), 2.0 * n, layers=list(range(n))))
    tables = {name: rows_of(text) for name, text in step.tables({"measured": measured}).items()}
    (setting,), (point,) = tables["setting"], tables["point"]
    assert setting["ours, s"] == "2.00" and setting["TRL / ours"] == "3.0 (3.0 to 3.0)"
    assert setting["weights"] == "NF4" and setting["naive, MB"] == "2"
    assert point["naive / ours"] == "2.0 (2.0 to 2.0)" and point["TRL, s"] == ""
    fits = [row["linear fit"] for row in tables["scaling"]]
    assert fits == ["1.000 + 0.2500 G", "0.000 + 0.0200 layers"]


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


@pytest.mark.slow
def test_missing_memory_is_measured_and_predicted(tmp_path, monkeypatch):
    costs = {"ours": [{"before": 2**27, "peak": 2**26}, {"seconds": 2.5}]}
    monkeypatch.setattr(memory, "SMALL", "")
    monkeypatch.setattr(memory, "POINTS", [(64, 2), (64, 4)])
    monkeypatch.setattr(memory, "make_model", lambda *args: "folder")
    monkeypatch.setattr(memory, "compare", lambda *args: costs)
    results = {"measured": [{"shape": "30m", "N": 64, "G": 2, "peak": 2**24}]}
    args = dict(shapes=["30m"], models="", device="", results=tmp_path / "memory.json")
    memory.measure_missing(SimpleNamespace(**args), results)
    assert json.loads(args["results"].read_text()) == results
    _, row = rows_of(memory.table(results))
    predicted = results["measured"][1]["predicted"]
    assert row["G"] == "4" and row["model, MB"] == "128" and row["s per step"] == "2.50"
    assert 2**26 < predicted < 2**28 and row["error"] == f"{predicted / (3 * 2**26) - 1:+.1%}"


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


def test_the_teacher_names_cells_and_its_words_are_tokens():
    cards, grid, size = Scenes("train", 1).layout(0), make_tiny.GRID, (make_tiny.SIZE,) * 2
    words = make_tiny.cell_words(cards)
    for card in cards:
        row, column = make_tiny.place_words(card)
        cell = (int(row[1]) - 1) * grid[1] + int(column[1]) - 1
        assert region_mask([card.box], size, grid)[cell]
        assert words[cell] == [card.color, card.mark, row, column]
    touched = region_mask([card.box for card in cards], size, grid)
    assert all(words[i] == ["."] for i in range(len(words)) if not touched[i])
    text, tokenizer = make_tiny.answer_text(cards[0], cards[1]), AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
