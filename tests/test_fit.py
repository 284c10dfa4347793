"""`fit`: the program runs on meta tensors, memory is counted correctly, and the recommended flags
are the largest that fit."""

import json
from functools import partial

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForImageTextToText

import sayo_mini
from config import Config
from extras import fit
from extras.meta_memory import META, MetaMemory
from model import load_vlm
from study.random_model import model_config

SMALL = dict(num_generations=3, prompts_per_step=2, max_completion_length=12, max_pixels=2**14)


def test_bytes_are_counted_until_a_tensor_is_freed():
    """CUDA's allocator rounds up to 512 bytes; views and in-place operations cost nothing."""
    memory = MetaMemory()
    with memory:
        memory.enter("one")
        a = torch.empty(100, 100, device=META)  # 40,000 bytes -> 79 blocks
        assert memory.current == 79 * 512
        b, c = a.view(10_000)[5:], a.add_(1)
        assert memory.current == 79 * 512
        d = torch.empty(1, device=META, dtype=torch.float16) + 1  # two blocks, then one
        assert memory.current == 80 * 512 and memory.peaks["one"] == 81 * 512
        memory.enter("two")
        del a, b, c
        assert memory.current == 512 and memory.peaks["two"] == 80 * 512
        del d
        memory.enter("three")
    assert memory.current == 0
    assert dict(memory.peaks) == {"one": 81 * 512, "two": 80 * 512, "three": 0}


@pytest.fixture(scope="module")
def small():
    return model_config("30m")


def rehearse(config, **changes):
    return fit.rehearse(config, Config(**SMALL | changes), 20)


@pytest.mark.slow
def test_memory_grows_with_every_setting_and_parts_save_it(small):
    whole = rehearse(small)
    assert set(whole) == set(fit.PHASES) and all(size > 0 for size in whole.values())
    rehearse_steps = partial(rehearse, small, eval_examples=0)
    base = rehearse_steps()
    assert base == {phase: size for phase, size in whole.items() if phase != "evaluation"}
    for changes in ({"num_generations": 9}, {"max_completion_length": 36}, {"max_pixels": 2**16}):
        more = rehearse_steps(**changes)
        assert more["sampling"] > base["sampling"] and more["scoring"] > base["scoring"], changes
    assert rehearse_steps(load_in_4bit=False)["loading"] > base["loading"]
    parts = rehearse_steps(completions_per_forward=1, num_generations=9)
    assert parts["update"] < rehearse_steps(num_generations=9)["update"]
    kept = rehearse_steps(gradient_checkpointing=False)
    assert kept["update"] > base["update"]


@pytest.mark.slow
def test_internvl_is_rehearsed_with_its_tile(internvl):
    config = fit.read_config(str(internvl))
    assert fit.image_grid(config, 2**18) == (4, 4)
    assert set(rehearse(config)) == set(fit.PHASES)


@pytest.mark.slow
def test_a_rehearsal_does_not_break_loading_in_the_same_process(small, monkeypatch):
    losses, begin = [], fit.RehearsedVlm.begin_update
    record = lambda vlm, loss: begin(vlm, losses.append(loss) or loss)  # noqa: E731
    monkeypatch.setattr(fit.RehearsedVlm, "begin_update", record)
    rehearse(small, eval_examples=0)
    assert losses[0].is_meta  # on the device of the gradients, as a GradScaler needs
    vlm = load_vlm(TINY, load_in_4bit=True, device="cpu")
    weight = vlm.core.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == torch.uint8 and not weight.is_meta
    assert torch.tensor([1, 2]).tolist() == [1, 2]


@pytest.fixture
def folder(tmp_path, small):
    small.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.slow
def test_the_command_prints_phases_and_cards(capsys, folder, tmp_path):
    mine = tmp_path / "mine.py"  # a reward that needs values, which fit does not have
    mine.write_text("def f(x):\n    return x.attention.sum((1, 2)).tolist()")
    reward = ["--reward", f"{mine}:f", "--reward_weights", "f=1"]
    flags = ["--num_generations", "2", "--max_completion_length", "8", "--max_pixels", "16384"]
    assert sayo_mini.main(["fit", "--model_name_or_path", folder, *flags, *reward]) == 0
    out = capsys.readouterr().out
    assert all(f"{phase:>12} " in out for phase in [*fit.PHASES, "needed"])
    assert "this takes about a minute" in out
    assert "Predicted, not measured" in out and out.count("GB card: fits\n") == len(fit.CARDS)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Qwen/Qwen3-VL-2B-Instruct", 2127532032),
        ("Qwen/Qwen3-VL-8B-Instruct", 8767123696),
        ("OpenGVLab/InternVL3_5-8B-HF", 8528318464),
    ],
)
def test_published_models_are_known_without_a_hub(name, parameters):
    """The number of parameters is that of the published weights."""
    with META:
        config = fit.read_config(name)
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_a_model_of_another_kind_is_one_line(tmp_path, capsys, kind):
    config = {"model_type": "internvl", "text_config": {"model_type": "qwen3_moe"}}
    config = {"model_type": "gpt2"} if kind == "gpt2" else config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert sayo_mini.main(["fit", "--model_name_or_path", str(tmp_path)]) == 2
    assert f"has type {kind}; supported: qwen2" in capsys.readouterr().err


def test_the_verdict_names_the_largest_values_that_fit():
    def needed(completions_per_forward=8, num_generations=8):
        return 4 + min(completions_per_forward, num_generations) / 2 + num_generations / 8

    cfg = Config(num_generations=8)
    assert fit.verdict(9, cfg, needed) == "fits"  # 4 + 4 + 1
    expected = "fits with --completions_per_forward 4 or --num_generations 4"
    assert fit.verdict(7, cfg, needed) == expected  # 4 + 2 + 1, 4 + 2 + 0.5
    assert fit.verdict(5.5, cfg, needed) == (
        "fits with --completions_per_forward 1 or --num_generations 2"
    )
    assert fit.verdict(5, cfg, needed).startswith("does not fit")
