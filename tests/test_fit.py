"""`fit`: the program runs on meta tensors of real shapes, memory is counted correctly, and the
recommended flags are the largest that fit."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median

import bitsandbytes as bnb
import pytest
import torch
from conftest import load
from transformers import AutoConfig

import sayo_mini
from analysis import predict_memory
from analysis.evaluate import trace_attention
from analysis.meta_memory import MetaMemory, meta_as_device
from analysis.predict_memory import (
    build_on_meta,
    image_grid,
    rehearse,
    rehearsed_example,
    rehearsed_vlm,
)
from bench import fit as bench_fit
from bench.doc_tables import RESULTS, ROOT, marked
from bench.shapes import make_model, model_config
from commands import fit
from commands.probe import layer_head_attention
from config import Config, InputError
from data import encode_example

pytestmark = pytest.mark.slow

QWEN2_5_VL_3B = {  # as published: the text settings are not nested
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
SMALL = dict(num_generations=3, prompts_per_step=2, max_completion_length=12, max_pixels=2**14)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder that contains only a config.json}"""
    root = tmp_path_factory.mktemp("configs")
    model_config("2b").save_pretrained(root / "qwen3-vl-2b")
    (root / "qwen2.5-vl-3b").mkdir()
    (root / "qwen2.5-vl-3b" / "config.json").write_text(json.dumps(QWEN2_5_VL_3B))
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def small():
    return model_config("30m")


# --- the program stays on its device ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen2.5-vl-3b"])
def test_training_and_evaluation_stay_on_the_device(folders, name):
    """An operation that mixes devices raises an exception."""
    config = AutoConfig.from_pretrained(folders[name])
    cfg = Config(num_generations=4, prompts_per_step=1, completions_per_forward=2)
    peaks = rehearse(config, cfg, sayo_mini.train_step, 64)
    assert set(peaks) == {"loaded", *fit.PHASES}
    weights = {"qwen3-vl-2b": 2.1, "qwen2.5-vl-3b": 3.4}[name]  # GB; the vision tower has 16 bits
    assert peaks["loaded"] / 2**30 == pytest.approx(weights, abs=0.25)
    assert min(peaks["scoring"], peaks["update"], peaks["evaluation"]) > peaks["loaded"]


@pytest.mark.parametrize("name", ["qwen3-vl-2b", "qwen2.5-vl-3b"])
def test_probe_and_look_stay_on_the_device(folders, name):
    model = build_on_meta(AutoConfig.from_pretrained(folders[name]), torch.bfloat16)
    cfg, memory = Config(max_completion_length=8), MetaMemory()
    with memory, meta_as_device("cuda"):
        vlm = rehearsed_vlm(model, cfg, memory, 64, (4, 6))
        prompt = encode_example(vlm, rehearsed_example(vlm), cfg)
        trace = trace_attention(vlm, prompt, cfg)  # what look draws
        maps = layer_head_attention(vlm, prompt, trace.completion, cfg)
    assert trace.attention.shape == (8, 24) and not trace.attention.is_meta
    text = model.config.text_config
    shape = text.num_hidden_layers + 1, text.num_attention_heads + 1, 8, 24
    assert maps.shape == shape and not maps.is_meta


def test_a_tensor_left_on_the_cpu_is_detected(small, monkeypatch):
    class Region:
        """A region that always stays on the CPU."""

        def to(self, device):
            return torch.ones(16, dtype=torch.bool).float()

    monkeypatch.setattr(sayo_mini, "example_region", lambda *_: Region())
    multiply = sayo_mini.reward.attention_ratio
    wrong = lambda attention, region, *rest: multiply(attention * region, region.bool(), *rest)  # noqa: E731
    monkeypatch.setattr(sayo_mini.reward, "attention_ratio", wrong)
    with pytest.raises(RuntimeError, match="mixes devices|same device"):
        rehearse(small, Config(**SMALL), sayo_mini.train_step, 20)


@pytest.mark.parametrize("operation", [torch.add, torch.mm, torch.minimum])
def test_mixed_devices_raise(operation):
    a, b = torch.ones(3, 3, device="meta"), torch.ones(3, 3)
    with MetaMemory(), pytest.raises(RuntimeError):
        operation(a, b)


# --- counting ---


def test_bytes_are_counted_while_tensors_live():
    memory = MetaMemory()
    with memory:
        memory.enter("one")
        a = torch.empty(1024, device="meta")  # 4096 bytes
        b = (a + 1).view(32, 32).t()  # views are free
        del a
        assert memory.current == 4096
        memory.enter("two")
        c = b.to(torch.bfloat16) * 2
        assert memory.current == 4096 + 2048
        d = torch.mm(c, c)[0]  # a view keeps the whole product alive
        assert d.untyped_storage().nbytes() == 2048
    assert memory.peaks == {"one": 8192, "two": 4096 + 2 * 2048}
    del b, c
    assert memory.current == 2048


def test_integers_and_masks_are_exact():
    with MetaMemory():
        ids = torch.tensor([3, 7, 3, 5]).to("meta")
        where = (ids == 3).nonzero()[:, 0]
        assert where.is_meta and where.tolist() == [0, 2]
        x = torch.empty(4, 6, device="meta")
        assert (
            x[ids == 3].shape == (2, 6) and x[:, torch.arange(6, device="meta") > 3].shape[1] == 2
        )
        assert ids.max().item() == 7 and (ids > 9).any().item() is False
        ids += 1
        assert ids.tolist() == [4, 8, 4, 6]
        token = x.softmax(-1).argmax(-1)
        assert token.tolist() == [0] * 4
        assert x.sum().item() == 1.0 and x.cpu().shape == (4, 6)


def test_rehearsing_only_the_last_tokens_takes_the_same_memory(small, monkeypatch):
    """The peaks match those of decoding every token."""
    cfg = Config(**SMALL | {"max_completion_length": 40}, eval_examples=0)
    short = rehearse(small, cfg, sayo_mini.train_step, 20)
    monkeypatch.setattr(predict_memory, "DECODED", 10**6)
    whole = rehearse(small, cfg, sayo_mini.train_step, 20)
    for peaks in (short, whole):
        peaks["sampling"] -= peaks["loaded"]
    assert short["sampling"] == pytest.approx(whole["sampling"], rel=0.02)
    assert short["update"] == pytest.approx(whole["update"], rel=1e-3)
    cfg = replace(cfg, max_completion_length=4)  # 36 tokens fewer in the KV cache
    text = small.text_config
    per_token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    completions = cfg.num_generations * cfg.prompts_per_step
    shorter = rehearse(small, cfg, sayo_mini.train_step, 20)
    grown = short["sampling"] - (shorter["sampling"] - shorter["loaded"])
    assert grown == pytest.approx(36 * completions * per_token, rel=0.05)


@pytest.mark.slow
def test_memory_grows_with_every_setting(small):
    @cache
    def peaks(**changes):
        cfg = Config(**SMALL | {"eval_examples": 0} | changes)
        return rehearse(small, cfg, sayo_mini.train_step, 20)

    def peak(phase, **changes):
        return peaks(**changes)[phase]

    assert peak("update", num_generations=6) > peak("update")
    assert peak("update", completions_per_forward=1) < peak("update")
    assert peak("update", gradient_checkpointing=False) > peak("update")
    assert peak("sampling", max_pixels=2**17) > peak("sampling")
    assert peak("sampling", prompts_per_step=4) > peak("sampling")
    assert peak("loaded", load_in_4bit=False) > 1.5 * peak("loaded")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_prediction_agrees_with_a_measurement(tmp_path):
    point = dict(zip(bench_fit.KEYS, (256, 4, 12, True, True, 0)))
    measured = bench_fit.measure_in_process(make_model("30m", tmp_path), point)
    assert bench_fit.predict(point) == pytest.approx(measured, rel=0.15)


# --- which flags fit ---


class FakePlan(fit.Plan):
    """A plan whose memory grows with every flag."""

    def peaks(self, **changes):
        cfg = vars(self.cfg) | changes
        batch = cfg["completions_per_forward"] or cfg["num_generations"]
        size = 4 + batch / 4 + cfg["prompts_per_step"] / 2 + cfg["max_pixels"] / 2**18
        self.asked.append(changes)
        return {"loading": 4 * fit.GB, "update": size * fit.GB}


@pytest.fixture
def plan():
    plan = FakePlan(None, Config(), None, 64)
    plan.asked = []
    return plan


def test_the_largest_value_that_fits_is_found(plan):
    """The defaults take 9 GB, or 10.2 GB with the safety margin. The card has room for 8 GB plus
    margin, so one flag must save 1 GB."""
    assert fit.verdict(plan, 12) == "fits"
    card = 8 * 1.05 + 0.75
    expected = {"completions_per_forward": 4, "num_generations": 4, "prompts_per_step": 2}
    for flag, values in fit.remedies(plan).items():
        largest = plan.largest(flag, values, card + 1e-9)
        fitting = [v for v in values if plan.needed(**{flag: v}) <= card + 1e-9]
        assert largest == max(fitting, default=None)
        assert flag == "max_pixels" or largest == expected[flag]
    assert "--completions_per_forward 4 or --num_generations 4" in fit.verdict(plan, card + 1e-9)
    assert fit.verdict(plan, 6.5) == "fits only with several lower settings"
    assert fit.verdict(plan, 4) == "does not fit, even with the smallest settings"


def test_search_needs_few_rehearsals(plan):
    plan.asked.clear()
    plan.largest("num_generations", range(2, 1000), 9.2)
    assert len(plan.asked) < 15


def test_image_tokens_of_max_pixels(small):
    assert image_grid(small, 2**18) == (16, 16)  # cells of 32 pixels
    assert image_grid(small, 1) == (1, 1)


# --- the command ---


def test_command_needs_only_a_config(tmp_path, capfd, small):
    small.save_pretrained(tmp_path)
    flags = ["--prompt_tokens", "20", "--num_generations", "2", "--max_completion_length", "8"]
    flags += ["--max_pixels", "16384", "--prompts_per_step", "1"]
    assert sayo_mini.main(["fit", "--model_name_or_path", str(tmp_path), *flags]) == 0
    out, err = capfd.readouterr()
    assert "prompts of 16 image tokens" in out and "and 20 others" in out
    assert all(f"{phase:>12} " in out for phase in fit.PHASES)
    assert out.count("GB card: fits") == len(fit.CARDS)
    assert "Predicted, not measured" in out


@pytest.mark.parametrize(
    "name, message",
    [
        ("no-such-user/no-such-model", "no config.json"),
        ("missing/folder/of/mine", "no config.json"),
        ("gpt2-config", "has type gpt2; supported:"),
    ],
)
def test_an_unreadable_model_prints_one_error_line(tmp_path, monkeypatch, capfd, name, message):
    monkeypatch.chdir(tmp_path)
    Path("gpt2-config").mkdir()
    Path("gpt2-config", "config.json").write_text('{"model_type": "gpt2"}')
    assert sayo_mini.main(["fit", "--model_name_or_path", name]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and name in err and message in err


def test_impossible_prompt_tokens():
    with pytest.raises(InputError, match="prompt_tokens"):
        fit.run_fit({"prompt_tokens": 1}, None)


# --- documents ---


def test_page_shows_the_committed_results():
    results = json.loads((RESULTS / "fit.json").read_text())
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert len(results["points"]) >= 12
    text = f"{bench_fit.table(results)}\n\n{bench_fit.summary(results)}"
    assert marked("fit errors", text) in page
    errors = [abs(100 * bench_fit.error(row)) for row in results["points"]]
    quoted = f"its median error is {median(errors):.1f} % and its largest error {max(errors):.1f} %"
    assert quoted in (ROOT / "docs" / "cost.md").read_text()


def test_a_rehearsal_does_not_break_4_bit_loading_in_the_same_process(small, monkeypatch):
    monkeypatch.setattr(bnb.functional, "name2qmap", {})  # as in a new process
    rehearse(small, Config(**SMALL, eval_examples=0), sayo_mini.train_step, 8)
    assert bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4")
    load(load_in_4bit=True)
