"""analysis/animation.py: look.gif of a run and of the command `look`."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, load
from PIL import Image, ImageChops

import sayo_mini
from analysis import evaluate as evaluation
from analysis.animation import (
    ATTEMPTS,
    END,
    MARGIN,
    MAX_BYTES,
    MAX_HEIGHT,
    PANEL_WIDTH,
    START,
    choose_question,
    color_scale,
    draw_frames,
    list_moments,
    mean_map,
    plan,
    plot_animation,
)
from analysis.evaluate import are_results, evaluate, trace_attention, word_maps, written_words
from analysis.html_report import unpack_map
from analysis.plots import RIGHT, WRONG, overlay, show_boxes
from config import TINY as PRESET
from config import Config, parse_ints
from data import Example
from model import Completions
from sources.scenes import Scenes

CFG = Config(**PRESET)
FAST = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", str(TINY)]
WORDS = ["the", " dot", " is", " blue", " .", ""]
PICTURES = Scenes("validation", 4)


def make_answer(shift, correct=None, words=WORDS, grid=(7, 7), caption="before training"):
    """An answer whose token i attends to cell 3 * i + shift, and a little to all."""
    cells = grid[0] * grid[1]
    maps = [
        [0.5 if c == (3 * i + shift) % cells else 0.01 for c in range(cells)]
        for i in range(len(words))
    ]
    selected = [i % 3 == 0 for i in range(len(words))]
    answer = dict(caption=caption, words=words, maps=maps, grid=grid, selected=selected)
    return answer if correct is None else answer | {"correct": correct}


def read_gif(path):
    """Its frames as RGB images, and their durations in milliseconds."""
    frames, durations = [], []
    with Image.open(path) as gif:
        assert gif.format == "GIF" and gif.info["loop"] == 0
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(gif.convert("RGB"))
            durations.append(gif.info["duration"])
    return frames, durations


def crop_picture(frame, layout, number):
    x, y = PANEL_WIDTH * number + MARGIN, layout.top
    return frame.crop((x, y, x + layout.picture[0], y + layout.picture[1]))


def largest_difference(one, other):
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


# --- the choice ---


@pytest.mark.parametrize(
    "before, after, chosen",
    [
        ([1, 0, 1, 0, 0], [1, 0, 0, 1, 1], 3),  # the first from wrong to right
        ([1, 1, 0, 1], [1, 0, 0, 0], 1),  # else the first that changed
        ([0, 1, 0], [0, 1, 0], 0),  # else the first
    ],
)
def test_the_question_that_is_shown(before, after, chosen):
    results = [[{"correct": float(c)} for c in each] for each in (before, after)]
    assert choose_question(*results) == chosen


# --- the frames ---


def test_the_mean_map_uses_only_the_selected_words():
    maps = [[1.0, 0.0], [9.0, 9.0], [0.5, 0.5]]
    assert mean_map(maps, [True, False, True]) == [0.75, 0.25]
    answers = [dict(maps=maps, selected=chosen) for chosen in ([1, 0, 1], [0, 0, 1])]
    assert color_scale(answers) == 0.75  # one scale for all answers


def test_a_frame_per_word_and_what_it_shows(tmp_path):
    """Compare the pictures in the file with the maps of the words."""
    example, path = PICTURES[0], tmp_path / "x.gif"
    answers = [make_answer(0, 0.0), make_answer(20, 1.0, caption="after training")]
    plot_animation(example, answers, path)
    frames, durations = read_gif(path)
    visible = [i for i, word in enumerate(WORDS) if word]
    assert len(frames) == len(visible) + 2 == 7
    assert durations[0] > durations[1] and durations[-1] > durations[1]
    layout = plan(example, answers)
    for number, answer in enumerate(answers):
        plain = show_boxes(example.image, example.boxes, layout.picture)
        assert largest_difference(crop_picture(frames[0], layout, number), plain) < 48
        shown = [answer["maps"][i] for i in visible] + [
            mean_map(answer["maps"], answer["selected"])
        ]
        settings = answer["grid"], example.boxes, layout.picture, color_scale(answers)
        expected = [overlay(example.image, attention, *settings) for attention in shown]
        for i, frame in enumerate(frames[1:]):
            picture = crop_picture(frame, layout, number)
            differences = [largest_difference(picture, each) for each in expected]
            # The palette changes colors slightly, another map changes a cell completely.
            assert differences[i] < 48 and min(differences) == differences[i], differences
            assert all(d > 80 for k, d in enumerate(differences) if k != i)


def test_the_last_frame_says_right_and_wrong_in_color():
    answers = [make_answer(0, 0.0), make_answer(20, 1.0)]
    *_, word, end = draw_frames(PICTURES[0], answers, [START, [4, 4], END])
    left, right = (end.crop((x, 0, x + PANEL_WIDTH, end.height)) for x in (0, PANEL_WIDTH))

    def has(picture, color):
        solid = Image.new("RGB", picture.size, color)
        gray = ImageChops.difference(picture, solid).convert("L")
        return gray.histogram()[0] > 1000

    assert has(left, WRONG) and not has(left, RIGHT)
    assert has(right, RIGHT) and not has(right, WRONG)
    assert not has(word, RIGHT) and not has(word, WRONG)  # not before the end


def test_without_ground_truth_there_is_no_verdict():
    judged, open_end = ([make_answer(0, correct)] for correct in (0.0, None))
    heights = [draw_frames(PICTURES[0], x, [END])[0].height for x in (judged, open_end)]
    colors = draw_frames(PICTURES[0], open_end, [END])[0].getcolors(2**20)
    assert max(heights) <= MAX_HEIGHT
    assert not {(0, 0x76, 0x5A), (0xB3, 0x47, 0)} & {color for _, color in colors}


@pytest.mark.parametrize(
    "count, most, frames", [(10, 48, 10), (110, 48, 37), (110, 6, 6), (7, 6, 4)]
)
def test_a_long_answer_adds_several_words_per_frame(count, most, frames):
    words = [[f" w{i}" for i in range(count)], [" a", "", " b"]]
    start, *moments, end = list_moments(words, most)
    assert (start, end) == (START, END) and len(moments) == frames <= most
    tokens, others = zip(*moments)
    assert list(tokens) == sorted(set(tokens)) and tokens[-1] == count - 1
    assert set(others) <= {0, 2} and others[-1] == 2  # stays at its last word


def test_an_answer_without_text_is_no_error(tmp_path):
    answers = [make_answer(0, 0.0, words=[""]), make_answer(1, 1.0, words=["", " "])]
    plot_animation(PICTURES[0], answers, tmp_path / "x.gif")
    assert len(read_gif(tmp_path / "x.gif")[0]) >= 2


NOISE = Image.frombytes(
    "RGB",
    (640, 480),
    torch.randint(256, (480, 640, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    .numpy()
    .tobytes(),
)


@pytest.mark.parametrize(
    "image",
    [
        PICTURES[1].image,
        NOISE,
        NOISE.resize((300, 900)),
        NOISE.resize((900, 90)),
        NOISE.resize((3, 2)),
    ],
    ids=["scene", "noise", "tall", "wide", "tiny"],
)
@pytest.mark.parametrize("panels", [1, 2])
def test_size_and_dimensions_stay_below_the_limits(tmp_path, image, panels):
    """Noise is the image that compresses worst. The answer is as long as the default permits."""
    words, grid = [f" word{i}" for i in range(110)], (15, 20)
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(110, 300, generator=generator).tolist()
    answers = [make_answer(i, 1.0, words, grid) | {"maps": maps} for i in range(panels)]
    example = Example(image, "What is " + "very " * 40 + "long?", "it", [(0, 0, 2, 2)])
    plot_animation(example, answers, tmp_path / "x.gif")
    frames, _ = read_gif(tmp_path / "x.gif")
    width, height = frames[0].size
    assert width == PANEL_WIDTH * panels <= 1000 and height <= MAX_HEIGHT
    assert (tmp_path / "x.gif").stat().st_size <= MAX_BYTES == 1_000_000
    assert len(frames) >= ATTEMPTS[-1][0] + 2


# --- the data ---


@pytest.mark.parametrize("alignment", ["query", "predict"])
def test_results_hold_the_maps_that_the_reward_uses(alignment):
    cfg = replace(CFG, alignment=alignment)
    vlm, scenes = load(layers=parse_ints(CFG.layers), heads=parse_ints(CFG.heads)), PICTURES
    for i, row in enumerate(evaluate(vlm, scenes, cfg, "x")):
        trace = trace_attention(vlm, vlm.encode(scenes[i].image, scenes[i].question), cfg)
        by_word = row["by_word"]
        assert "".join(by_word["words"]) == row["text"] and len(by_word["words"]) == row["length"]
        maps = torch.tensor([unpack_map(packed) for packed in by_word["maps"]])
        largest = trace.attention.max(1, keepdim=True).values  # the levels are 1/63 apart
        assert ((maps - trace.attention).abs() <= largest / 63 + 2e-5).all()


def test_maps_of_a_long_answer_are_pooled(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_MAP_CHARACTERS", 13 * 10)
    vlm, example = load(), PICTURES[0]
    prompt = vlm.encode(example.image, example.question)
    trace = trace_attention(vlm, prompt, CFG)
    by_word = word_maps(vlm, prompt, trace)
    side = int((130 / len(trace.entropy)) ** 0.5)
    assert by_word["grid"] == (side, side) and side < 7
    assert all(len(levels) == side * side for _, levels in by_word["maps"])


def test_words_of_a_tokenizer_that_splits_words_and_characters():
    pieces = {
        1: b"The d",
        2: b"ot is",
        3: " bl\u00e9".encode()[:-1],
        4: "\u00e9".encode()[1:],
        5: b"",
    }

    def decode(ids, skip_special_tokens):
        assert skip_special_tokens
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    vlm = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode))
    completion = Completions(torch.tensor([[1, 2, 3, 4, 5]]), None, ["The dot is bl\u00e9"])
    words = written_words(vlm, completion)
    assert words == ["The d", "ot is", " bl\u00e9", "", ""]


def test_damaged_maps_are_recognized():
    results = evaluate(load(), Scenes("validation", 1), CFG, "x")
    assert are_results(results, 1)
    (row,) = json.loads(json.dumps(results))
    by_word = row["by_word"]
    words, (first, *maps) = by_word["words"], by_word["maps"]
    for change in (
        {"grid": [7, 0]},
        {"grid": [-7, -7]},
        {"grid": [7]},
        {"words": words[1:]},
        {"words": [None, *words[1:]]},
        {"maps": maps},
        {"maps": [[first[0], first[1][1:]], *maps]},
        {"maps": [[first[0], "!" + first[1][1:]], *maps]},
        {"maps": [["", first[1]], *maps]},
        {"maps": [[float("nan"), first[1]], *maps]},
        {"maps": [3, *maps]},
    ):
        assert not are_results([row | {"by_word": by_word | change}], 1), change
    assert not are_results([row | {"by_word": None}], 1)
    del row["by_word"]
    assert are_results([row], 1)  # of an earlier version


# --- a run ---


def run(folder, *flags, expect=0):
    flags = [*FAST, "--num_generations", 4, "--output_dir", folder, *flags]
    assert sayo_mini.main([str(flag) for flag in flags]) == expect


SHORT = "--max_steps", 1, "--eval_examples", 3


def test_a_run_writes_the_animation_and_the_still(tmp_path):
    run(tmp_path, *SHORT)
    frames, _ = read_gif(tmp_path / "look.gif")
    before, after = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("before", "after"))
    chosen = choose_question(before, after)
    words = [[w for w in x[chosen]["by_word"]["words"] if w.strip()] for x in (before, after)]
    assert len(frames) == max(map(len, words)) + 2
    still = Image.open(tmp_path / "before_after.png")
    assert still.width > 2.2 * still.height


def test_a_resumed_run_writes_the_same_files(tmp_path):
    run(tmp_path, *SHORT)
    names = "look.gif", "before_after.png", "look.png"
    files = {name: (tmp_path / name).read_bytes() for name in names}
    for name in (*names, "after.json"):
        (tmp_path / name).unlink()
    run(tmp_path, "--resume")
    assert {name: (tmp_path / name).read_bytes() for name in names} == files


def test_a_run_of_an_earlier_version_resumes_without_animation(tmp_path, capsys):
    run(tmp_path, *SHORT)
    before = json.loads((tmp_path / "before.json").read_text())
    for row in before:
        del row["by_word"]
    (tmp_path / "before.json").write_text(json.dumps(before))
    for name in ("look.gif", "before_after.png", "look.png", "report.html"):
        (tmp_path / name).unlink()
    capsys.readouterr()
    run(tmp_path, "--resume")
    assert "no look.gif" in capsys.readouterr().out
    found = {path.name for path in tmp_path.iterdir()}
    assert {"look.png", "report.html"} <= found and "look.gif" not in found


def test_without_evaluation_there_is_no_animation(tmp_path):
    run(tmp_path, "--max_steps", 1, "--eval_examples", 0)
    assert not list(tmp_path.glob("*.gif")) and (tmp_path / "report.html").exists()


# --- look ---


def look(folder, *flags, expect=0):
    example = PICTURES[0]
    example.image.save(folder / "scene.png")
    flags = ["look", "--image", folder / "scene.png", "--question", example.question, *flags]
    assert sayo_mini.main([*map(str, flags), *FAST]) == expect


def test_look_writes_an_animation(tmp_path, capsys):
    box = ",".join(map(str, PICTURES[0].boxes[0]))
    look(tmp_path, "--box", box, "--output", tmp_path / "one.GIF")
    text = capsys.readouterr().out.split("answer: ")[1].splitlines()[0]
    frames, _ = read_gif(tmp_path / "one.GIF")
    assert frames[0].width == PANEL_WIDTH and len(frames) == len(text.split()) + 2
    run(tmp_path / "run", "--max_steps", 0, "--eval_examples", 0)
    adapter = tmp_path / "run" / "adapter"
    look(tmp_path, "--adapter", adapter, "--output", tmp_path / "two.gif")
    frames, _ = read_gif(tmp_path / "two.gif")
    assert frames[0].width == 2 * PANEL_WIDTH


def test_look_draws_the_map_of_the_answer(tmp_path):
    look(tmp_path, "--output", tmp_path / "one.gif")
    frames, _ = read_gif(tmp_path / "one.gif")
    vlm = load(layers=parse_ints(CFG.layers), heads=parse_ints(CFG.heads))
    prompt = vlm.encode(PICTURES[0].image, PICTURES[0].question)
    with vlm.model.disable_adapter():
        trace = trace_attention(vlm, prompt, CFG)
    answer = make_answer(0, words=written_words(vlm, trace.completion))
    answer |= {"maps": trace.attention.tolist(), "selected": trace.selected.tolist()}
    layout = plan(PICTURES[0], [answer])
    settings = (7, 7), (), layout.picture, color_scale([answer])
    expected = [overlay(PICTURES[0].image, row, *settings) for row in answer["maps"]]
    for i in range(len(frames) - 2):
        picture = crop_picture(frames[1 + i], layout, 0)
        differences = [largest_difference(picture, each) for each in expected]
        assert differences[i] < 48 and min(differences) == differences[i], differences


def test_a_wrong_suffix_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sayo_mini, "load_vlm", None)  # the error must come before loading
    look(tmp_path, "--output", tmp_path / "x.gift", expect=2)
    errors = [line for line in capsys.readouterr().err.splitlines() if "sayo_mini.py: " in line]
    assert len(errors) == 1 and "must end in .png, .gif" in errors[0]
