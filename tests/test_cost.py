"""The cost benchmarks: all arms do the same work, no step needs less than the memory floor, and the
documents show the committed results."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from conftest import ask, load
from transformers import Qwen3VLForConditionalGeneration

from bench import launches, memory, step
from bench.doc_tables import RESULTS, ROOT, marked
from bench.shapes import CELL, make_model, make_question, model_config
from bench.step_arms import repeat_prompt
from model import load_vlm

linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from /proc"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model("30m", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def vlm(folder):
    return load_vlm(folder, load_in_4bit=True, device="cpu", gradient_checkpointing=True)


@pytest.mark.parametrize("shape, billions", [("2b", 2.13), ("4b", 4.44), ("8b", 8.77)])
def test_shapes_have_the_published_sizes(shape, billions):
    with init_empty_weights():
        model = Qwen3VLForConditionalGeneration(model_config(shape))
    tied = model.lm_head.weight.numel() if model.config.tie_word_embeddings else 0
    count = sum(p.numel() for p in model.parameters()) - tied
    assert count == pytest.approx(1e9 * billions, rel=0.003)


@pytest.mark.parametrize("tokens, image_tokens", [(40, None), (128, None), (300, 256)])
def test_question_has_the_requested_length(vlm, tokens, image_tokens):
    example = make_question(vlm, tokens, image_tokens)
    prompt = vlm.encode(example.image, example.question)
    assert len(prompt.input_ids) == tokens
    rows, cols = example.image.height // CELL, example.image.width // CELL
    assert prompt.grid == (rows, cols)  # not scaled down
    N = len(prompt.image_positions)
    assert N == (image_tokens or N) > tokens / 2


def test_naive_arm_computes_the_same_tokens_and_scores():
    """The naive arm runs the prompt G times."""
    vlm = load()
    prompt, completions = ask(vlm)
    scores = vlm.score(prompt, completions)
    repeat_prompt(vlm, 4)
    prompt, again = ask(vlm)
    assert torch.equal(again.ids, completions.ids)
    other = vlm.score(prompt, again)
    torch.testing.assert_close(other.logps, scores.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.attention, scores.attention, atol=1e-6, rtol=0)


@pytest.mark.slow
@linux
def test_arms_process_the_expected_number_of_tokens(folder):
    """Our step stays within the reference count, 3 (P + G C) forward tokens. The other arms run the
    prompt G times, in the language model and in the vision tower."""
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


def entry(part, point, seconds, **options):
    """A measured point where the naive arm takes twice as long as ours, and TRL three times."""
    costs = {
        "sample": seconds / 2,
        "score": 0.0,
        "update": seconds / 2,
        "capture": seconds / 100,
        "tokens": 300,
        "patches": 4,
    }
    rows = {}
    for k, arm in enumerate(("ours", "naive", "trl"), 1):
        timed = costs | {"seconds": k * seconds}
        rows[arm] = [{"peak": k * 2**20}, timed, timed]
    usual = {"device": "cpu", "load_in_4bit": True, "gradient_checkpointing": True}
    return {"part": part, **dict(zip("PCG", point)), **usual, **options, "rows": rows}


def test_step_tables():
    """Ratios are two and three, points on a line are fitted exactly, and what was not measured has
    neither a row nor a column."""
    measured = [entry("setting", (20, 20, 4), 2.0)]
    measured += [entry("scaling G", (20, 20, G), 1 + G / 4) for G in (4, 8, 16)]
    for n in (1, 2, 5):
        measured.append(entry("scaling layers", (20, 20, 4), 2.0 * n, layers=list(range(n))))
    text = step.tables({"measured": measured})
    assert "| 3.0 (3.0 to 3.0) | 2.0 (2.0 to 2.0) |" in text["setting"]
    # The reference count of this point is 300 tokens.
    assert "| 1.000 " in text["setting"] and "| 1.0 % " in text["setting"]
    assert "1.000 + 0.2500 G" in text["scaling"] and "0.000 + 0.0200 layers" in text["scaling"]
    assert "C" not in text["scaling"] and "grid" not in text
    alone = entry("point", (20, 20, 4), 2.0)
    alone["rows"].pop("trl")
    point = step.tables({"measured": [alone]})["point"]
    assert "| 2.00 = 1.00 + 0.00 + 1.00 | 4.00 = 1.00 + 0.00 + 1.00 |  " in point
    bent = [entry("scaling G", (20, 20, G), G * G) for G in (4, 8, 16)]
    assert "| 0 %" in text["scaling"]
    assert "| 0 %" not in step.tables({"measured": bent})["scaling"]


def test_readme_table_of_steps():
    fp32 = {"load_in_4bit": False, "gradient_checkpointing": False}
    measured = [entry("setting", (20, 20, 4), 2.0), entry("setting", (20, 20, 4), 1.0, **fp32)]
    measured.append(entry("grid", (20, 20, 4), 5.0))
    lines = step.readme_table({"measured": measured}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        ["NF4", "yes", "2.00", "6.00", "3.0 (3.0 to 3.0)", "1", "3"],
        ["fp32", "no", "1.00", "3.00", "3.0 (3.0 to 3.0)", "1", "3"],
    ]


def test_each_kind_of_result_has_its_own_file():
    args = SimpleNamespace(
        points=None, device="cpu", shape="30m", models="runs/bench", results=None
    )
    assert step.results_file(args) == RESULTS / "step.json"
    args.points = ["1,1,1"]
    assert step.results_file(args) == Path("runs/bench/step.json")
    args.points, args.device, args.shape = None, "cuda", "2b"
    assert step.results_file(args) == RESULTS / "step_cuda_2b.json"


def test_capture_memory_grows_with_the_number_of_token_pairs():
    """A pair takes at most four floats, so twice the completions take about twice the memory."""
    few, many = step.capture_bytes(100, 40, 8), step.capture_bytes(100, 40, 16)
    assert many / few == pytest.approx(2, abs=0.05)
    assert few < 4 * 4 * (1 + 8 * 40) * 140 * 1.05


def test_memory_floor_agrees_with_a_loaded_model(folder, vlm):
    """The floor contains the weights and LoRA of the model and the KV cache of a full group."""
    text = vlm.core.config.text_config
    N, G = 256, 8
    parts = memory.memory_floor("30m", N, G, width=4)
    weights = sum(p.nbytes for n, p in vlm.core.named_parameters() if "lora" not in n)
    for module in vlm.core.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            weights += state.absmax.nbytes + state.state2.absmax.nbytes
    assert parts["weights"] == pytest.approx(weights, rel=0.01)
    lora = sum(p.numel() for n, p in vlm.core.named_parameters() if "lora" in n)
    assert parts["LoRA"] == 16 * lora
    tokens = N + memory.QUESTION + G * memory.C
    kv = text.num_key_value_heads * text.head_dim
    assert parts["KV cache"] == 4 * tokens * text.num_hidden_layers * 2 * kv
    training = parts["layer inputs"] + parts["one layer"]
    assert parts["floor"] == parts["weights"] + parts["LoRA"] + training


@pytest.mark.slow
@linux
def test_a_measured_step_needs_more_than_the_floor(vlm):
    counts = {"tokens": 0}
    row = memory.measure_point(vlm, counts, "30m", 256, 4, 1)
    parts = memory.memory_floor("30m", 256, 4, width=4)
    assert 1 < row["peak"] / (parts["floor"] - parts["weights"]) < 4
    per_second = 4 * memory.C / row["seconds"]
    assert row["seconds"] > 0
    assert row["completion_tokens_per_second"] == pytest.approx(per_second)


def test_under_a_cap_completions_per_forward_are_halved_until_they_fit(monkeypatch):
    """The search keeps the first of 8, 4, 2 and 1 that fits; the peak is None if none does."""
    tried = []

    def measure_point(vlm, counts, shape, N, G, rounds, cap, size):
        tried.append(size or G)
        return {"size": size} if (size or G) <= fits else None

    monkeypatch.setattr(memory, "measure_point", measure_point)
    fits = 2
    assert memory.measure_under_cap(None, {}, "2b", 256, 8, 6) == {"size": 2}
    assert tried == [8, 4, 2]
    fits = 0
    assert memory.measure_under_cap(None, {}, "2b", 256, 8, 6)["peak"] is None
    assert tried[3:] == [8, 4, 2, 1]


def test_a_shape_is_freed_before_the_next(monkeypatch):
    """Two models at a time may not fit on a card, and both would count toward the peak."""
    models = []

    class Model:
        core = None

    def load_vlm(*args, **kwargs):
        assert [ref() for ref in models if ref()] == []
        model = Model()
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(memory, "load_vlm", load_vlm)
    monkeypatch.setattr(memory, "make_model", lambda *args: None)
    monkeypatch.setattr(memory, "count_forward_tokens", lambda core: {})
    monkeypatch.setattr(memory, "measure_point", lambda *args: {"peak": 1})
    monkeypatch.setattr(memory, "measure_under_cap", lambda *args: {"peak": 1})
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    args = SimpleNamespace(device="cuda", shapes=memory.SHAPES, models="", rounds=1)
    results = {"loading": {}, "measured": []}
    memory.measure_missing(args, results, lambda: None)
    assert len(models) == 3 and len(results["measured"]) == 3 * 6 * 6


def test_memory_tables_mark_missing_measurements():
    cost = {
        "peak": 3 * 2**30,
        "seconds": 2.5,
        "completion_tokens_per_second": 352.0,
        "forward_tokens_per_second": 9000.0,
        "completions_per_forward": 0,
    }
    caps = (None, *memory.CAPS)
    card = [{"shape": "2b", "N": 256, "G": 8, "cap": cap, **cost} for cap in caps]
    card[1]["peak"] = None
    nothing = {"measured": []}
    plan = {"shape": "2b", "N": 256, "G": 8, "peak": 2 * 2**30, "needed": 2.85}
    predictions = [plan | {"cards": [None, 4, 0, 0, 0]}]
    text = memory.tables(nothing, {"measured": card}, predictions)
    lines = text["short"].splitlines()
    assert len(lines) == 2 + 6 and "| 2.00               | 3.00 " in lines[2]
    assert all("not yet measured" in line for line in lines[3:])
    cells = text["caps"].splitlines()[2].split("|")
    assert cells[4:6] == [" no   ", " 8 per forward, 2.5 s "]
    cells = [cell.strip() for cell in text["cards"].splitlines()[2].split("|")]
    assert cells[1:-1] == ["2B", "256", "8", "2.9", "no", "4 per forward", "all", "all", "all"]
    assert memory.tables(nothing, nothing, [])["caps"] == "Not yet measured."
    too_large = {"shape": "8b", "N": 1024, "G": 16, "cap": None, "peak": None}
    full = memory.tables(nothing, {"measured": [too_large]}, [])
    assert "does not fit" in full["floor"].splitlines()[-1]


def test_documents_show_the_committed_results():
    cost, readme = ((ROOT / name).read_text() for name in ("docs/cost.md", "README.md"))
    results = json.loads((RESULTS / "step.json").read_text())
    for name, text in step.tables(results).items():
        assert marked(f"step {name}", text) in cost, name
    cpu, cuda = (
        json.loads(path.read_text()) if path.exists() else {"measured": []}
        for path in (RESULTS / "memory_cpu.json", RESULTS / "memory_cuda.json")
    )
    predictions = json.loads((RESULTS / "fit.json").read_text())["shapes"]
    assert len(predictions) == len(memory.SHAPES) * len(memory.POINTS)
    for name, text in memory.tables(cpu, cuda, predictions).items():
        assert marked(f"memory {name}", text) in cost, name
    assert marked("cost", step.readme_table(results)) in readme


@pytest.mark.slow
def test_decoded_token_launches_few_operations():
    """Counted on meta tensors; docs/cost.md shows the table of bench/results/launches.json."""
    counts = launches.count_all("2b", 128, (16, 16), 8, 64)
    ours, before = (sum(counts[name].values()) for name in ("ours", "before"))
    assert 800 < ours <= launches.GOAL < before
    committed = json.loads((RESULTS / "launches.json").read_text())["counts"]
    assert counts == committed
    text = f"{launches.table(committed)}\n\n{launches.summary(committed)}"
    assert marked("launches", text) in (ROOT / "docs" / "cost.md").read_text()
