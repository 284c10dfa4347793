"""The commands `look`, `probe` and `check`."""

import json
import math
import re
import shutil
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from conftest import TINY, error_line, load
from PIL import Image, ImageStat

import json_lines
import reward
import sayo_mini
from config import ROOT, Config, parse_ints
from config import TINY as PRESET
from data import region_mask
from evaluate import evaluate, trace_attention
from extras import pictures
from extras.probe import heads_above_chance, measure_heads, print_recommendation
from scenes import Scenes

CFG = Config(**PRESET)
SCENES = Scenes("validation", 4)
FAST = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(TINY)]


def fails(capfd, flags):
    """Run a command that fails. Returns: its one line on stderr."""
    capfd.readouterr()
    assert sayo_mini.main(list(map(str, flags))) == 2
    return error_line(capfd)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """(flags that ask about a scene saved as a file, the flag with its box)"""
    path, example = tmp_path_factory.mktemp("photo") / "photo.png", SCENES[0]
    example.image.save(path)
    flags = ["look", "--image", str(path), "--question", example.question]
    return flags, "--box=" + ",".join(map(str, example.boxes[0]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: settings, and an adapter of rank 4 with nonzero weights."""
    folder = tmp_path_factory.mktemp("run")
    cfg = Config(**PRESET | {"device": "cpu", "load_in_4bit": False, "lora_r": 4})
    (folder / "config.json").write_text(json.dumps(asdict(cfg)))
    load(lora_r=4).model.save_pretrained(folder / "adapter")
    Image.new("RGB", (112, 112)).save(folder / "x.png")
    return folder


def test_look_answers_scores_and_draws(tmp_path, capsys, photo):
    flags, box = photo
    output = tmp_path / "out.png"
    assert sayo_mini.main([*flags, *FAST, box, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    vlm = load(layers=parse_ints(CFG.layers), heads=parse_ints(CFG.heads))
    with vlm.model.disable_adapter():
        prompt = vlm.encode(SCENES[0].image, SCENES[0].question)
        trace = trace_attention(vlm, prompt, CFG)
    region = region_mask(SCENES[0].boxes, (112, 112), (7, 7))
    r_v = reward.attention_reward(trace.attention[None], region, trace.selected[None]).item()
    auroc = reward.localization(trace.map, region)["auroc"]
    assert f"answer: {trace.completion.texts[0]}" in out
    assert f"r_v {r_v:.3f}, AUROC {auroc:.3f}" in out
    answer = trace.completion.texts[0].split().index("<answer>")  # a word is a token here
    before_answer = torch.arange(len(trace.attention)) < answer
    looks = reward.early_and_late(trace.attention, region, before_answer)
    first, last = ("on" if look else "off" for look in looks)
    assert f"first look: {first} the region; last look: {last}\n" in out
    assert Image.open(output).width > 300 and "the tiny model only knows" not in out


def test_look_with_an_adapter_compares_before_and_after(tmp_path, capsys, photo, run):
    """The model and its settings come from the run. A .gif is an animation."""
    flags, box = photo
    output = tmp_path / "out.gif"
    flags = [*flags, box, "--adapter", str(run / "adapter"), "--output", str(output)]
    assert sayo_mini.main(flags) == 0
    out = capsys.readouterr().out
    before, after = re.findall(r"training: .*\n  r_v (\S+),", out)
    assert before != after and "before training: " in out and "after training: " in out
    assert Image.open(output).is_animated


def test_look_without_a_box_scores_nothing_and_the_tiny_model_only_knows_cards(tmp_path, capsys):
    path = tmp_path / "photo.png"
    Image.new("RGB", (64, 48), "gray").save(path)
    flags = ["look", "--image", str(path), "--question", "What color is the mug?", *FAST]
    assert sayo_mini.main([*flags, "--output", str(tmp_path / "out.png")]) == 0
    out = capsys.readouterr().out
    assert "answer: " in out and "r_v" not in out and "first look" not in out
    assert "the tiny model only knows" in out


MISTAKES = {  # what is wrong -> (flags after those of `photo`, a part of the message)
    "not an image": (["--image", __file__], "cannot identify image file"),
    "a box of words": (["--box", "left"], "--box left"),
    "a box in shares": (["--box", "0.1,0.2,0.3,0.4"], "looks like fractions of the image"),
    "a box outside": (["--box", "500,500,600,600"], "outside"),
    "an image tag": (["--question", "a <image>"], "--question: question contains <image>"),
    "a run as adapter": (["--adapter", "{run}"], "did you mean --adapter {run}/adapter?"),
    "an adapter of another rank": (["--adapter", "{run}/adapter", "--lora_r", "8"], "--lora_r"),
    "not an image name": (["--output", "x.txt"], "--output x.txt"),
    "the image as output": (["--image", "{run}/x.png", "--output", "{run}/x.png"], "would replace"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_the_model_loads(capfd, photo, run, monkeypatch, mistake):
    flags, words = MISTAKES[mistake]
    monkeypatch.setattr("model.load_vlm", None)
    flags = [flag.replace("{run}", str(run)) for flag in flags]
    assert words.replace("{run}", str(run)) in fails(capfd, [*photo[0], *FAST, *flags])


@pytest.mark.parametrize("alignment", ["query", "predict"])
def test_probe_agrees_with_an_evaluation_of_one_layer_and_head(alignment):
    cfg = Config(**PRESET | {"alignment": alignment})
    examples = [SCENES[i] for i in range(4)]
    tables = measure_heads(load(), examples, examples[1:] + examples[:1], cfg)
    assert tables.shape == (4, 2, 5, 5)
    # Text and selected tokens do not depend on which layers and heads are rewarded.
    for layer, head in [(0, 1), (4, 2)] if alignment == "query" else [(3, 4), (4, 4)]:
        layers, heads = (layer,) if layer < 4 else None, (head,) if head < 4 else None
        rows = evaluate(load(layers=layers, heads=heads), SCENES, cfg, "one")
        expected = [[row["auroc"], row["permuted_auroc"]] for row in rows]
        assert tables[:, :, layer, head].tolist() == [pytest.approx(x, abs=1e-5) for x in expected]


def test_probe_prints_the_flags_and_draws_the_table(tmp_path, capsys):
    flags = [*FAST, "--output_dir", str(tmp_path / "new"), "--eval_examples"]
    assert sayo_mini.main(["probe", *flags, "64"]) == 0
    out = capsys.readouterr().out
    recommended = r"^  (\d.\d+) \[.* --alignment query --layers (\d) --heads (\d)"
    found = re.findall(recommended, out, re.M)
    assert len(found) == 3 and found == sorted(found, reverse=True)
    for mean, layer, head in found:
        row = re.search(rf"^ layer {layer} (.*)", out, re.M)[1].split()
        assert row[int(head)] == f"{float(mean):.2f}"
    assert "control with the next example's box: 0." in out
    assert Image.open(tmp_path / "new" / "probe.png").width > 200
    assert sayo_mini.main(["probe", *flags, "2"]) == 0
    assert "no recommendation from fewer than 30 questions" in capsys.readouterr().out


def tables_of(auroc, control, spread, count=40):
    """Tables of `measure_heads` with these means (L, H) and a deviation of +-`spread`."""
    signs = torch.tensor([1.0, -1.0]).repeat(count // 2).view(-1, 1, 1, 1)
    means = torch.stack([torch.tensor(auroc), torch.tensor(control)])
    return torch.nn.functional.pad(means, (0, 1, 0, 1), value=0.9) + spread * signs


def test_probe_recommends_single_heads_that_are_above_chance_and_above_the_control():
    tables = tables_of([[0.45, 0.70], [0.75, 0.80]], [[0.5, 0.5], [0.8, 0.5]], 0.1)
    found = heads_above_chance(tables)
    # Layer 1, head 0 always looks at the same place: it scores no better than with the next box.
    assert [row[:2] for row in found] == [(1, 1), (0, 1)]
    # The standard deviation is 0.1 sqrt(40 / 39); z at 1 - 0.025 / 4 is 2.4977.
    half = 2.4977 * 0.1 * math.sqrt(40 / 39 / 40)
    assert found[0][2:] == pytest.approx((0.8, 0.8 - half, 0.8 + half, 0.5), abs=1e-4)
    tables[0, 0, 1, 1] = math.nan  # a region that covers the image
    assert [row[:2] for row in heads_above_chance(tables)] == [(1, 1), (0, 1)]


def test_probe_recommends_nothing_if_no_head_is_above_chance(capsys):
    print_recommendation(tables_of([[0.55] * 2] * 2, [[0.5] * 2] * 2, spread=0.4), "query")
    out = capsys.readouterr().out
    assert "no head is above chance" in out and "--layers" not in out


def write_set(folder, *changes):
    """A data set with a row per dict in `changes`. Returns: its path."""
    Image.effect_noise((64, 48), 90).save(folder / "photo.png")
    good = {"image": "photo.png", "question": "What?", "answer": "cat", "boxes": [[1, 2, 30, 20]]}
    (folder / "set.jsonl").write_text("\n".join(json.dumps(good | change) for change in changes))
    return folder / "set.jsonl"


def test_the_shipped_example_is_valid_and_in_the_docs(capsys, tmp_path):
    for path in (ROOT / "example").iterdir():
        shutil.copy(path, tmp_path)
    assert sayo_mini.main(["check", str(tmp_path / "example.jsonl")]) == 0
    out, docs = capsys.readouterr().out, (ROOT / "docs" / "data.md").read_text()
    assert "3 valid examples; 3 images, 4 boxes" in out and "no problems" in out
    assert Image.open(tmp_path / "example.check.png").size == (704, 312)
    shown = docs.split("check example/example.jsonl\n")[1].split("\n```")[0]
    assert shown == out.replace(str(tmp_path), "example").strip()
    assert (ROOT / "example" / "example.jsonl").read_text() in docs


def test_check_names_every_problem_and_summarizes_the_valid_examples(tmp_path, capsys):
    write_set(tmp_path)
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    rows = [
        {"question": "", "boxes": [[3, 2, 1, 4]]},
        {"image": "half.png"},  # its header is intact
        {"boxes": [[0, 0, 65, 48]], "question": "one two three four five six"},
        {"boxes": [[0, 0, 8, 6], [4, 0, 16, 6]]},  # the union is 96 of 3072 pixels, 3.1 %
    ]
    path = write_set(tmp_path, *rows)
    assert sayo_mini.main(["check", str(path)]) == 2
    out = capsys.readouterr().out
    for start in (":1: question", ":1: box ", ":2: cannot read the image 'half.png'"):
        assert out.count(f"{path}{start}") == 1
    assert "2 valid examples;" in out and "\n3 problems\nwrote the first 2 examples" in out
    assert "area of the boxes, %: 3.12 to 100, median 51.6\n" in out
    assert "words of the question: 1 to 6, median 3.5\n" in out
    assert "note: 1 of 4 boxes extend beyond their image and are clipped\n" in out
    first = Image.open(path.with_suffix(".check.png")).convert("L").crop((8, 8, 232, 176))
    assert ImageStat.Stat(first).stddev[0] > 30  # a photo


def test_check_decodes_an_image_once_and_replaces_only_its_own_picture(tmp_path, capsys):
    path = write_set(tmp_path, *[{"question": f"What is {i}?"} for i in range(30)])
    picture, other = path.with_suffix(".check.png"), tmp_path / "other.png"
    decoder = json_lines.apply_exif_orientation
    with patch("json_lines.apply_exif_orientation", wraps=decoder) as decode:
        assert sayo_mini.main(["check", str(path)]) == 0
    assert decode.call_count == 9 and "30 valid examples" in capsys.readouterr().out  # drawn
    assert sayo_mini.main(["check", str(path)]) == 0
    assert "wrote the first 9 examples" in capsys.readouterr().out
    Image.new("RGB", (9, 9)).save(other)
    before = other.read_bytes()
    for make in (shutil.copy, lambda source, target: target.symlink_to(source)):
        picture.unlink()
        make(other, picture)
        assert sayo_mini.main(["check", str(path)]) == 0
        assert f"note: cannot write {picture}: it is another file" in capsys.readouterr().out
        assert other.read_bytes() == picture.read_bytes() == before


def test_boxes_in_another_unit_are_refused_unless_it_is_named(tmp_path, capfd):
    path = write_set(tmp_path, *[{"boxes": [[0.1, 0.2, 0.5, i]]} for i in (0.6, 0.7)])
    message = f"{path}: the boxes look like fractions of the image: use --boxes 0-1, or --boxes"
    for flags in (["check", path], ["--dataset", path, "--output_dir", tmp_path / "run"]):
        assert message in fails(capfd, flags)
    assert sayo_mini.main(["check", str(path), "--boxes", "0-1"]) == 0


def test_captions_in_any_letters_are_drawn_or_replaced_by_the_id(tmp_path, capsys, monkeypatch):
    texts = "Où est l'été?", "Где кошка?", "猫在哪里？" * 9
    path = write_set(tmp_path, *[{"question": text, "answer": "da"} for text in texts])
    monkeypatch.setattr("extras.pictures.SYSTEM_FONTS", [])
    pictures.find_font.cache_clear()
    assert sayo_mini.main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    for line in (1, 2, 3):
        assert out.count(f"note: no font has all letters of {path}:{line}: its picture") == 1
    with Image.open(path.with_suffix(".check.png")) as sheet:
        one, two = (sheet.crop((x, 170, x + 220, 250)).tobytes() for x in (8, 240))
    assert one != two  # set.jsonl:1 and set.jsonl:2
    monkeypatch.undo()
    pictures.find_font.cache_clear()
