"""bench/: that the arms compared do the same work, that the floors of memory are floors, and the tables."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from conftest import ask, load
from transformers import Qwen3VLForConditionalGeneration

from bench import memory, step
from bench.arms import repeat_prompt
from bench.shapes import CELL, configuration, make, question
from model import load_vlm

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read the Linux way")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make("30m", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder, load_in_4bit=True, device="cpu", gradient_checkpointing=True)


@pytest.mark.parametrize("shape, billions", [("2b", 2.13), ("4b", 4.44), ("8b", 8.77)])
def test_shapes_have_the_published_sizes(shape, billions):
    with init_empty_weights():
        model = Qwen3VLForConditionalGeneration(configuration(shape))
    tied = model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    assert sum(p.numel() for p in model.parameters()) - tied == pytest.approx(1e9 * billions, rel=0.003)


@pytest.mark.parametrize("tokens, image_tokens", [(40, None), (128, None), (300, 256)])
def test_question_has_the_length_asked_for(vlm, tokens, image_tokens):
    example = question(vlm, tokens, image_tokens)
    prompt = vlm.encode(example.image, example.question)
    assert len(prompt.input_ids) == tokens
    assert prompt.grid == (example.image.height // CELL, example.image.width // CELL)  # not scaled down
    assert len(prompt.image_positions) == (image_tokens or len(prompt.image_positions)) > tokens / 2


def test_naive_arm_computes_the_same():
    """The prompt G times: other work, the same tokens and scores."""
    vlm = load()
    prompt, completions = ask(vlm)
    scores = vlm.score(prompt, completions)
    repeat_prompt(vlm, 4)
    prompt, again = ask(vlm)
    assert torch.equal(again.ids, completions.ids)
    other = vlm.score(prompt, again)
    torch.testing.assert_close(other.logps, scores.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.attention, scores.attention, atol=1e-6, rtol=0)


@linux
def test_arms_do_the_work_they_are_said_to_do(folder):
    """Tokens of one step: ours within the floor of 3 (P + G C), the others all G prompts, in language and vision."""
    P, C, G = 40, 4, 2
    options = {"device": "cpu", "load_in_4bit": True, "gradient_checkpointing": True}
    rows = step.compare((P, C, G), step.ARMS, 1, folder, options)
    ours, naive, trl = (rows[arm][1] for arm in step.ARMS)
    assert ours["tokens"] == P + G * (C - 1) + 2 * (P + G * C) <= 3 * (P + G * C)
    assert naive["tokens"] == trl["tokens"] == G * P + G * (C - 1) + 2 * G * (P + C)
    assert naive["patches"] == trl["patches"] == 3 * G * ours["patches"]
    for row in (ours, naive, trl):
        assert row["seconds"] == pytest.approx(row["sample"] + row["score"] + row["update"])
        assert min(row["sample"], row["score"], row["update"]) > 0
    assert all(rows[arm][0]["peak"] > 2**20 for arm in step.ARMS)
    assert 0 < ours["capture"] < ours["update"]


def entry(part, point, seconds, **more):
    row = {"seconds": seconds, "sample": seconds / 2, "score": 0.0, "update": seconds / 2, "capture": seconds / 100,
           "tokens": 300, "patches": 4}  # fmt: skip
    rows = {arm: [{"peak": k * 2**20}, *[row | {"seconds": k * s} for s in (seconds, seconds)]]
            for k, arm in enumerate(("ours", "naive", "trl"), 1)}  # fmt: skip
    options = {"load_in_4bit": True, "gradient_checkpointing": True, **more}
    return {"part": part, **dict(zip("PCG", point)), **options, "rows": rows}


def test_tables_of_steps():
    """Twice, thrice as slow as ours; a straight line through points that lie on one; without what was not measured."""
    measured = [entry("setting", (20, 20, 4), 2.0)]
    measured += [entry("scaling G", (20, 20, G), 1 + G / 4) for G in (4, 8, 16)]
    measured += [entry("scaling layers", (20, 20, 4), 2.0 * n, layers=list(range(n))) for n in (1, 2, 5)]
    text = step.tables({"measured": measured})
    assert "| 3.0 (3.0 to 3.0) | 2.0 (2.0 to 2.0) |" in text["setting"]
    assert "| 1.000 " in text["setting"] and "| 1.0 % " in text["setting"]  # 300 tokens are the floor of this point
    assert "1.000 + 0.2500 G" in text["scaling"] and "0.000 + 0.0200 layers" in text["scaling"]
    assert "C" not in text["scaling"].replace("layers captured", "") and "grid" not in text
    alone = entry("point", (20, 20, 4), 2.0)
    alone["rows"].pop("trl")
    assert "| 2.00 = 1.00 + 0.00 + 1.00 | 4.00 = 1.00 + 0.00 + 1.00 |  " in step.tables({"measured": [alone]})["point"]
    bent = [entry("scaling G", (20, 20, G), G * G) for G in (4, 8, 16)]
    assert "| 0 %" in text["scaling"] and "| 0 %" not in step.tables({"measured": bent})["scaling"]


def test_results_of_another_kind_go_to_another_file():
    names = []
    for points, device, shape in ((None, "cpu", "30m"), (["1,1,1"], "cpu", "30m"), (None, "cuda", "2b")):
        args = SimpleNamespace(points=points, device=device, shape=shape, models="runs/bench", results=None)
        names.append(step.results_file(args).relative_to(step.ROOT if not points else Path()).as_posix())
    assert names == ["bench/results/step.json", "runs/bench/step.json", "bench/results/step_cuda_2b.json"]


def test_capture_grows_with_what_a_completion_sees():
    """Four floats for every pair of a token and what it sees; so twice the completions, twice the memory."""
    few, many = step.capture_bytes(100, 40, 8), step.capture_bytes(100, 40, 16)
    assert many / few == pytest.approx(2, abs=0.05)
    assert few < 4 * 4 * (1 + 8 * 40) * 140 * 1.05


def test_floor_against_a_loaded_model(folder, vlm):
    """Weights and LoRA of the formula are those of the model, its cache is what sampling leaves."""
    text = vlm.core.config.text_config
    N, G = 256, 8
    parts = memory.floor("30m", N, G, width=4)
    weights = sum(p.nbytes for n, p in vlm.core.named_parameters() if "lora" not in n)
    for module in vlm.core.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    assert parts["weights"] == pytest.approx(weights, rel=0.01)
    assert parts["LoRA"] == 16 * sum(p.numel() for n, p in vlm.core.named_parameters() if "lora" in n)
    tokens = N + memory.QUESTION + G * memory.C
    assert parts["KV cache"] == 4 * tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim
    assert parts["floor"] == parts["weights"] + parts["LoRA"] + parts["layer inputs"] + parts["one layer"]


@linux
def test_a_measured_step_needs_more_than_the_floor(vlm):
    seen = {"tokens": 0}
    row = memory.measured(vlm, seen, "30m", 256, 4, 1)
    parts = memory.floor("30m", 256, 4, width=4)
    assert 1 < row["peak"] / (parts["floor"] - parts["weights"]) < 4
    assert row["seconds"] > 0 and row["written_per_second"] == pytest.approx(4 * memory.C / row["seconds"])


def test_under_a_cap_fewer_completions_are_tried(monkeypatch):
    """8, 4, 2, 1 in a forward; the first that fits is kept, and where none does it is said."""
    tried = []

    def measured(vlm, seen, shape, N, G, rounds, cap, size):
        tried.append(size or G)
        return {"size": size} if (size or G) <= fits else None

    monkeypatch.setattr(memory, "measured", measured)
    fits = 2
    assert memory.under_cap(None, {}, "2b", 256, 8, 6) == {"size": 2} and tried == [8, 4, 2]
    fits = 0
    assert memory.under_cap(None, {}, "2b", 256, 8, 6)["peak"] is None and tried[3:] == [8, 4, 2, 1]


def test_tables_of_memory_say_what_was_not_measured():
    cost = {"peak": 3 * 2**30, "seconds": 2.5, "written_per_second": 352.0, "forward_tokens_per_second": 9000.0,
            "completions_per_forward": 0}  # fmt: skip
    card = [{"shape": "2b", "N": 256, "G": 8, "cap": cap, **cost} for cap in (None, *memory.CAPS)]
    card[1]["peak"] = None
    text = memory.tables({"measured": []}, {"measured": card})
    lines = text["short"].splitlines()
    assert len(lines) == 2 + 6 and "3.00" in lines[2] and all("not yet measured" in line for line in lines[3:])
    assert text["caps"].splitlines()[2].split("|")[4:6] == [" no   ", " 8 in a forward, 2.5 s "]
    assert memory.tables({"measured": []}, {"measured": []})["caps"] == "Not yet measured."
    full = memory.tables(
        {"measured": []}, {"measured": [{"shape": "8b", "N": 1024, "G": 16, "cap": None, "peak": None}]}
    )
    assert "does not fit" in full["floor"].splitlines()[-1]


def test_committed_results_are_the_tables_in_the_readmes():
    """What stands in the README comes from the JSON."""
    readme = (step.ROOT / "bench" / "README.md").read_text()
    steps = step.tables(json.loads((step.HERE / "results" / "step.json").read_text()))
    for name, text in steps.items():
        assert f"<!-- step {name} -->\n{text}\n<!-- end step {name} -->" in readme, name
    assert f"<!-- cost -->\n{steps['setting']}\n<!-- end cost -->" in (step.ROOT / "README.md").read_text()
    results = {d: json.loads(p.read_text()) if (p := step.HERE / "results" / f"memory_{d}.json").exists() else
               {"measured": []} for d in ("cpu", "cuda")}  # fmt: skip
    for name, text in memory.tables(results["cpu"], results["cuda"]).items():
        where, label = (
            (step.ROOT / "README.md", "memory") if name == "short" else (step.HERE / "README.md", f"memory {name}")
        )
        assert f"<!-- {label} -->\n{text}\n<!-- end {label} -->" in where.read_text(), name
