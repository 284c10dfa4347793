"""The commands `look` and `probe`."""

import math
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import TINY, load
from PIL import Image
from safetensors.torch import load_file, save_file

import reward
import sayo_mini
from analysis.evaluate import evaluate, trace_attention
from analysis.plots import COLOR_BAR_WIDTH
from commands.probe import (
    best_layer_and_heads,
    head_of_right_answers,
    heads_above_chance,
    most_discriminative_head,
    print_recommendation,
    probe,
)
from config import TINY as PRESET
from config import Config, parse_ints
from data import region_mask
from runtime.parser import parse_command_line, parse_config
from sources.scenes import Scenes

CFG = Config(**PRESET)
SCENES = Scenes("validation", 4)
FAST = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(TINY)]


# --- probe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["query", "predict"])
def test_probe_agrees_with_an_evaluation_of_one_layer_and_head(alignment):
    cfg = Config(**PRESET | {"alignment": alignment})
    auroc, permuted, gap = probe(load(), SCENES, cfg)
    assert auroc.shape == permuted.shape == gap.shape == (5, 5)
    # Text and selected tokens do not depend on which layers and heads are rewarded.
    for layer, head in ((0, 1), (3, 2), (3, 4), (4, 4)):
        layers, heads = (layer,) if layer < 4 else None, (head,) if head < 4 else None
        results = evaluate(load(layers=layers, heads=heads), SCENES, cfg, "one")
        right, wrong = ([r["auroc"] for r in results if r["correct"] == c] for c in (1, 0))
        assert right and wrong
        assert auroc[layer, head] == pytest.approx(fmean(right + wrong), abs=1e-5)
        assert gap[layer, head] == pytest.approx(fmean(right) - fmean(wrong), abs=1e-5)
        expected = fmean(r["permuted_auroc"] for r in results)
        assert permuted[layer, head] == pytest.approx(expected, abs=1e-5)


def test_best_layer_by_all_heads_and_best_heads_in_it():
    auroc = torch.tensor(
        [[0.9, 0.9, 0.9, 0.9, 0.6], [0.7, 0.5, 0.8, 0.9, 0.7], [1.0, 1.0, 1.0, 1.0, 1.0]]
    )
    assert best_layer_and_heads(auroc) == (1, [0, 2, 3])
    assert best_layer_and_heads(auroc[:, [0, 4]]) == (1, [0])


def test_most_discriminative_head_has_the_largest_gap():
    gap = torch.tensor([[0.1, 0.3, 0.9], [0.2, 0.4, 0.9], [0.9, 0.9, 0.9]])
    assert most_discriminative_head(gap) == (1, 1)
    assert most_discriminative_head(gap * torch.nan) is None  # all answers right, or all wrong


def probe_flags(folder, examples=1):
    return [
        *FAST,
        "--eval_examples",
        str(examples),
        "--max_steps",
        "1",
        "--output_dir",
        str(folder),
    ]


def test_probe_prints_the_flags_and_draws_the_table(tmp_path, capsys):
    flags = [*probe_flags(tmp_path, examples=24), "--max_steps", "3"]  # 24 training scenes
    assert sayo_mini.main(["probe", *flags]) == 0
    out = capsys.readouterr().out
    assert "--alignment predict --layers " in out and "with the next example's box" in out
    assert Image.open(tmp_path / "probe.png").width > 200
    layers, _, heads = out.split("--layers ")[1].split()[:3]
    assert parse_config([*FAST, "--layers", layers, "--heads", heads])


def test_probe_does_not_write_to_the_folder_of_the_default_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sayo_mini.main(["probe", *probe_flags("")[:-2]]) == 0
    assert [str(path) for path in Path().rglob("*.png")] == ["runs/probe/probe.png"]
    assert "no recommendation from fewer than 10 questions" in capsys.readouterr().out


def tables_of(auroc, permuted, spread, count=40):
    """Tables of `measure_heads` with these means (L, H) and a deviation of +-`spread`."""
    signs = torch.tensor([1.0, -1.0]).repeat(count // 2).view(-1, 1, 1, 1)
    means = torch.stack([torch.tensor(auroc), torch.tensor(permuted)])
    return torch.nn.functional.pad(means, (0, 1, 0, 1), value=0.9) + spread * signs


def test_probe_recommends_single_heads_that_are_above_chance():
    permuted = [[0.5, 0.5], [0.8, 0.5]]
    tables = tables_of([[0.45, 0.70], [0.75, 0.80]], permuted, 0.1)
    found = heads_above_chance(tables)
    # Layer 1, head 0 always looks at the same place: it scores no better than with the next box.
    assert [row[:2] for row in found] == [(1, 1), (0, 1)]
    # The standard deviation is 0.1 sqrt(40 / 39); z at 1 - 0.025 / 4 is 2.4977.
    half = 2.4977 * 0.1 * math.sqrt(40 / 39 / 40)
    assert found[0][2:] == pytest.approx((0.8, 0.8 - half, 0.8 + half, 0.5), abs=1e-4)
    tables[0, 0, 1, 1] = math.nan  # a region that covers the image
    assert [row[:2] for row in heads_above_chance(tables)] == [(1, 1), (0, 1)]


def test_probe_recommends_nothing_if_no_head_is_above_chance(capsys):
    correct = torch.arange(40) < 20
    for auroc, spread in ((0.48, 0.01), (0.55, 0.4)):
        tables = tables_of([[auroc] * 2] * 2, [[0.5] * 2] * 2, spread)
        assert heads_above_chance(tables) == []
        print_recommendation(tables, correct, "query")
        out = capsys.readouterr().out
        assert "no head is above chance" in out and "--layers" not in out


def test_probe_names_the_head_that_looks_best_when_the_answer_is_right(capsys):
    correct = torch.arange(40) < 20
    tables = tables_of([[0.7, 0.7], [0.7, 0.7]], [[0.5] * 2] * 2, 0.1)
    tables[correct, 0, 1, 0] += 0.2
    layer, head, gap, half = head_of_right_answers(tables, correct)
    # Each half has a standard deviation of 0.1 sqrt(20 / 19); z is as above.
    assert (layer, head) == (1, 0) and gap == pytest.approx(0.2, abs=1e-6)
    assert half == pytest.approx(2.4977 * 0.1 * math.sqrt(2 / 19), abs=1e-4)
    print_recommendation(tables, correct, "query")
    assert "right minus wrong answers: +0.200 +- " in capsys.readouterr().out
    assert head_of_right_answers(tables, torch.ones(40).bool()) is None  # all answers are right
    tables = tables_of([[0.7, 0.7], [0.7, 0.7]], [[0.5] * 2] * 2, 0.1)
    assert head_of_right_answers(tables, correct) is None  # no gap is significant


def test_old_probe_flag_works_and_prints_the_new_form(tmp_path, capsys):
    assert sayo_mini.main(["--probe", *probe_flags(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if "sayo_mini.py probe" in line]
    assert len(lines) == 1 and "--probe is deprecated" in lines[0]
    assert (tmp_path / "probe.png").exists()


def test_probe_that_cannot_write_prints_one_error_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert sayo_mini.main(["probe", *probe_flags(tmp_path / "file" / "x")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "sayo_mini.py: " in line]
    assert len(errors) == 1 and "--output_dir" in errors[0]


# --- look -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """(flags that ask about a scene saved as a file, its box)"""
    path, example = tmp_path_factory.mktemp("photo") / "photo.png", SCENES[0]
    example.image.save(path)
    flags = ["look", "--image", str(path), "--question", example.question, *FAST]
    return flags, ",".join(map(str, example.boxes[0]))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The adapter folder of a run with rank 4 and nonzero weights."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--max_steps", "0", "--eval_examples", "0", "--lora_r", "4", "--output_dir", folder]
    assert sayo_mini.main([*FAST, *map(str, flags)]) == 0
    path = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, 0.05) for k, v in load_file(path).items()}, path)
    return folder / "adapter"


def test_look_answers_scores_and_draws(tmp_path, capsys, photo):
    flags, box = photo
    output = tmp_path / "out.png"
    assert sayo_mini.main([*flags, "--box", box, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    vlm = load(layers=parse_ints(CFG.layers), heads=parse_ints(CFG.heads))
    for name, p in vlm.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    trace = trace_attention(vlm, vlm.encode(SCENES[0].image, SCENES[0].question), CFG)
    region = region_mask(SCENES[0].boxes, (112, 112), (7, 7))
    r_v = reward.attention_reward(trace.attention[None], region, trace.selected[None]).item()
    auroc = reward.localization(trace.map, region)["auroc"]
    assert f"answer: {trace.completion.texts[0]}" in out
    assert f"r_v {r_v:.3f}, AUROC {auroc:.3f}" in out
    looks = reward.early_and_late(trace.attention, region, trace.selected)
    early, late = ("on" if look else "off" for look in looks)
    assert f"early look: {early} the region; late look: {late}\n" in out
    assert Image.open(output).width == 448 + 2 * 16 + COLOR_BAR_WIDTH


def test_look_with_an_adapter_compares_before_and_after(tmp_path, capsys, photo, adapter):
    flags, box = photo
    flags = flags[:5]  # the model and its settings come from the run
    output = tmp_path / "out.png"
    flags = [*flags, "--adapter", str(adapter), "--box", box, "--output", str(output)]
    assert sayo_mini.main(flags) == 0
    out = capsys.readouterr().out
    before, after = (
        out.split(f"{when} training: ")[1].split("(", 1)[0] for when in ("before", "after")
    )
    assert before.split("r_v")[1] != after.split("r_v")[1]
    assert Image.open(output).width == 2 * 448 + 3 * 16 + COLOR_BAR_WIDTH


def test_look_refuses_an_adapter_with_nan(tmp_path, capsys, photo, adapter):
    shutil.copytree(adapter, tmp_path / "nan")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights[next(iter(weights))].fill_(float("nan"))
    save_file(weights, tmp_path / "nan" / "adapter_model.safetensors")
    output = tmp_path / "out.png"
    flags = [*photo[0][:5], "--adapter", str(tmp_path / "nan"), "--output", str(output)]
    assert sayo_mini.main(flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}/nan is damaged: NaN or infinity in" in lines[-1]
    assert not output.exists()


def test_look_without_a_box_scores_nothing(tmp_path, capsys, photo):
    assert sayo_mini.main([*photo[0], "--output", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "r_v" not in out and "early look" not in out


def test_all_boxes_count_and_may_extend_beyond_the_image(tmp_path, capsys, photo):
    def r_v(*boxes):
        flags = [f"--box={box}" for box in boxes] + ["--output", str(tmp_path / "out.png")]
        assert sayo_mini.main([*photo[0], *flags]) == 0
        return capsys.readouterr().out.split("r_v ")[1].split(",")[0]

    left, right, all = "-10,-10,32,112", "80,0,120,112", "0,0,112,112"
    assert r_v(all) == "0.000" == r_v(left, right, "32,0,80,112")
    assert len({r_v(left), r_v(right), r_v(left, right)}) == 3


@pytest.mark.parametrize(
    "size, question, words",
    [
        ((112, 112), "What color is the dot on the pink card?", []),
        ((64, 48), "What color is the dot on the pink card?", ["64 x 48"]),
        ((112, 112), "What color is the mug?", ["'mug'"]),
    ],
)
def test_the_tiny_model_says_that_it_only_knows_cards(tmp_path, capsys, size, question, words):
    path = tmp_path / "photo.png"
    Image.new("RGB", size, "gray").save(path)
    flags = ["look", "--image", str(path), "--question", question, *FAST]
    assert sayo_mini.main([*flags, "--output", str(tmp_path / "out.png")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiny model only" in line]
    assert len(lines) == bool(words) and all(word in "".join(lines) for word in words)


def make_mistake(photo, adapter, tmp_path, name):
    """(flags, a word of the expected message) for this mistake of a user."""
    flags, box = photo
    (tmp_path / "text.png").write_text("not an image")
    other, empty = tmp_path / "run" / "adapter", tmp_path / "empty"
    other.mkdir(parents=True), empty.mkdir()
    weights = {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}
    save_file(weights, other / "adapter_model.safetensors")
    (empty / "adapter_model.safetensors").write_bytes(b"{}")
    for folder in (other, empty):
        shutil.copy(adapter / "adapter_config.json", folder)
    rank_8 = ["--adapter", str(adapter), "--lora_r", "8"]
    return {
        "no image": (["look", "--image", "none.jpg", *flags[3:]], "none.jpg"),
        "a text file": (["look", "--image", str(tmp_path / "text.png"), *flags[3:]], "text.png"),
        "no question": (flags[:3], "--question"),
        "a box of words": ([*flags, "--box", "left"], "--box left"),
        "a box of three": ([*flags, "--box", "1,2,3"], "--box 1,2,3"),
        "a second box of three": ([*flags, "--box", box, "--box", "1,2,3"], "--box 1,2,3"),
        "a box of NaN": ([*flags, "--box", "nan,1,2,3"], "--box"),
        "a box in shares": ([*flags, "--box", "0.1,0.2,0.3,0.4"], "multiply"),
        "a special token": ([*flags[:4], "a <|image_pad|>", *flags[5:]], "--question"),
        "an empty question": ([*flags[:4], " ", *flags[5:]], "--question"),
        "a box outside": ([*flags, "--box", "500,500,600,600"], "outside"),
        "an unknown flag": ([*flags, "--bocks", "1"], "--bocks"),
        "no adapter": ([*flags, "--adapter", str(tmp_path)], "adapter"),
        "another model's adapter": ([*flags, "--adapter", str(other)], "does not match this model"),
        "a broken adapter": ([*flags, "--adapter", str(empty)], "adapter"),
        "an adapter of another size": ([*flags, *rank_8], "--lora_r"),
        "no such folder": ([*flags, "--output", str(tmp_path / "no" / "x.png")], "x.png"),
        "no image format": ([*flags, "--output", str(tmp_path / "x")], "--output"),
        "text as output": ([*flags, "--output", str(tmp_path / "x.txt")], "--output"),
        "a folder as output": ([*flags, "--output", str(other.parent) + "/"], "--output"),
    }[name]


MISTAKES = [
    "no image",
    "a text file",
    "no question",
    "a box of words",
    "a box of three",
    "a second box of three",
    "a box of NaN",
    "a box in shares",
    "a special token",
    "an empty question",
    "a box outside",
    "an unknown flag",
    "no adapter",
    "another model's adapter",
    "a broken adapter",
    "an adapter of another size",
    "no such folder",
    "no image format",
    "text as output",
    "a folder as output",
]


# Mistakes that are detected only after the model is loaded.
NEEDS_THE_MODEL = ("another model's adapter",)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_prints_one_error_line(tmp_path, capfd, photo, adapter, monkeypatch, name):
    flags, word = make_mistake(photo, adapter, tmp_path, name)
    if "--output" not in flags:
        flags = [*flags, "--output", str(tmp_path / "out.png")]
    capfd.readouterr()
    if name not in NEEDS_THE_MODEL:
        monkeypatch.setattr(sayo_mini, "load_vlm", None)  # the error must come before loading
    assert sayo_mini.main(flags) == 2
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("sayo_mini.py: ")]
    assert len(errors) == 1 and word in errors[0]
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("command", ["look", "probe"])
def test_help_lists_only_the_flags_that_a_command_uses(command, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_command_line([command, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert "--alignment" in out and "--learning_rate" not in out
    assert ("--eval_examples" in out) == (command == "probe")
    assert ("--layers" in out) == (command == "look")  # probe measures all of them


def test_a_flag_that_a_command_does_not_use_is_named():
    _, _, notice = parse_command_line(["probe", "--beta", "0", "--seed", "1"])
    assert notice == "probe does not use --beta"
    assert parse_command_line(["train", "--beta", "0"])[2] is None
    assert parse_command_line(["fit", "--beta", "0"])[2] is None
