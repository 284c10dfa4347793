"""report.html: mouse and keyboard in a browser, its size, and its charts."""

import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image

import sayo_mini
from analysis import html_report, page_maps
from analysis.html_report import (
    LEVELS,
    attention_by_position,
    line_chart,
    mean_map,
    pack_map,
    pack_maps,
    render_report,
    resample,
    unpack_map,
)
from data import Example

pytestmark = pytest.mark.slow

GRID, TOKENS = (2, 4), ["the", "dot", "r1"]
CONFIG = {"model_name_or_path": "tiny", "dataset": "scenes", "max_steps": 5, "prompts_per_step": 8}
CONFIG |= {"layers": "3", "heads": "1,2"}
METRICS = {"step": 1, "entropy": 0.5, "kl": 0.0, "rewards/attention/mean": 0.2}
BLUE = (40, 120, 200)  # of the whole image
DARK = tuple(round(0.65 * value) for value in BLUE)  # on the page


def map_of(attention, cells=8):
    """A map as a list. Args: attention, {cell: value}."""
    return [attention.get(cell, 0.0) for cell in range(cells)]


def make_result(hot, correct=1.0):
    """A result of an earlier version's `evaluate`: token i of layer n attends only to cell
    `hot[n][i]`."""
    names = ["auroc", "permuted_auroc", "mass_over_area", "pointing", "tas", "image_mass", "area"]
    return dict.fromkeys(names + ["fixed_auroc", "fixed_mass_over_area"], 0.5) | {
        "id": "a",
        "text": "the dot r1",
        "correct": correct,
        "length": 3,
        "to_region": [0.1] * 3,
        "to_image": [0.5] * 3,
        "selected": [False, True, False],
        "grid": GRID,
        "page": {
            "words": TOKENS,
            "entropy": [0.1, 2.0, 0.5],
            "grid": GRID,
            "layers": [0, 3],
            "maps": [[pack_map(map_of({cell: 1.0})) for cell in row] for row in hot],
        },
    }


def add_new_fields(old, rewarded, early, late, question="What is <b>it</b>?"):
    """A result with what this version adds. Args: rewarded, a map {cell: value} per token."""
    heads = {  # 2 layers of 2 heads; the maps per token of heads 3 and 0 are kept
        "grid": GRID,
        "count": [2, 2],
        "auroc": [0.6, 0.5, 0.4, 0.9],
        "mean": pack_maps([map_of({cell: 0.2}) for cell in (0, 1, 2, 3)]),
        "kept": [3, 0],
        "maps": [pack_maps([map_of({i: 0.4}), map_of({4 + i: 0.1})]) for i in range(3)],
    }
    maps = {"grid": GRID, "maps": [pack_map(map_of(attention)) for attention in rewarded]}
    looks = {"early": early, "late": late, "permuted_early": 0.0, "permuted_late": 1.0}
    added = {"question": question, "answer": "</script>", "small_map": pack_map(map_of({7: 0.5}))}
    return old | looks | added | {"page": old["page"] | {"rewarded": maps, "heads": heads}}


def save_report(path, examples):
    for name, text in render_report(path, examples).items():
        (path / name).write_text(text)


def make_run(tmp_path, before, after=None, steps=2, metrics=METRICS):
    """(the folder of a run, its held-out examples)"""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "metrics.jsonl").write_text((json.dumps(metrics) + "\n") * steps)
    for name, results in (("before", before), ("after", after)):
        if results:
            (tmp_path / f"{name}.json").write_text(json.dumps(results))
    example = Example(Image.new("RGB", (80, 40), BLUE), "Old?", "</script>", [(20, 0, 40, 20)], "a")
    return tmp_path, [example] * len(before)


OLD_BEFORE = make_result([[0, 5, 2], [4, 7, 1]])
OLD_AFTER = make_result([[3, 3, 3], [6, 6, 6]], correct=0.0)
BEFORE = add_new_fields(OLD_BEFORE, [{4: 1.0}, {7: 0.5, 2: 2 / 9}, {1: 0.25}], 0.0, 1.0)
AFTER = add_new_fields(OLD_AFTER, [{6: 0.5}] * 3, 1.0, 1.0)
# The second and third question have no maps.
PLAIN = {"page": None, "question": "And this?"}
BEFORES = [BEFORE, BEFORE | PLAIN | {"correct": 0.0}, BEFORE | PLAIN | {"early": 1.0, "late": 0.0}]
AFTERS = [AFTER, AFTER | PLAIN | {"correct": 1.0}, AFTER | PLAIN]


@pytest.fixture
def open_report(browser, tmp_path):
    """A function that opens the report of some results. The test fails if the page writes to the
    console or uses the network."""
    tabs, messages = [], []

    def log_message(message):
        if "readback" not in message.text:  # a performance hint about how `lit` reads pixels
            messages.append(message.text)

    def log_request(request):
        if request.url.startswith("http"):
            messages.append(request.url)

    def open_tab(before, after, **settings):
        path, examples = make_run(tmp_path, before, after)
        save_report(path, examples)
        tab = browser.new_page(**{"viewport": {"width": 390, "height": 800}} | settings)
        tabs.append(tab)
        tab.on("console", log_message)
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", log_request)
        tab.goto((path / "report.html").as_uri())
        tab.wait_for_function("answers.every(answer => answer.image.complete)")
        tab.get_by_label("box", exact=True).uncheck()  # its outline would hide pixels
        return tab

    yield open_tab
    for tab in tabs:
        tab.close()
    assert messages == []


@pytest.fixture
def page(open_report):
    """The report of three questions, the first of them with maps."""
    return open_report(BEFORES, AFTERS)


def tokens_of(page, answer=0):
    return page.locator("figure").nth(answer).locator(".token")


def pixel(tab, canvas, x, y):
    data = f"{canvas}.getContext('2d').getImageData({x}, {y}, 1, 1).data"
    return tuple(tab.evaluate(f"[...{data}]")[:3])


def lit(tab, answer=0):
    """{cell: (r, g, b)} of the cells of the image whose center differs from the darkened image."""
    canvas = f"document.querySelectorAll('canvas.image')[{answer}]"
    width, height = tab.evaluate(f"[{canvas}.width, {canvas}.height]")
    centers = {cell: (cell % 4 + 0.5, cell // 4 + 0.5) for cell in range(8)}
    colors = {c: pixel(tab, canvas, width * x / 4, height * y / 2) for c, (x, y) in centers.items()}
    return {cell: color for cell, color in colors.items() if color != pytest.approx(DARK, abs=1)}


def blend(color, level):
    """A color of the color map over the image. Args: level, from 0 to 1."""
    alpha = 0.85 * level
    mixed = [(1 - alpha) * a + alpha * b for a, b in zip(DARK, color)]
    return pytest.approx(mixed, abs=2)


# --- words and maps ---


def test_hovering_over_a_word_shows_its_map(page):
    tokens = tokens_of(page)
    assert list(lit(page)) == [2, 7]  # at first, the map of the brightest underlined word
    for i, cells in enumerate(([4], [2, 7], [1])):
        tokens.nth(i).hover()
        assert list(lit(page)) == cells
        assert tokens.nth(i).get_attribute("aria-current") == "true"
    assert lit(page)[1] == blend((252, 255, 164), 1)
    assert list(lit(page, 1)) == [6]  # the other answer keeps its word
    assert page.locator("[aria-current=true]").count() == 2


def test_keys_change_the_layer_and_the_word(page):
    source = page.get_by_role("combobox", name="map", exact=True)
    assert source.locator("option").all_inner_texts() == [
        "layer 0, mean over heads",
        "layer 3, mean over heads",
        "the reward's layer 3, heads 1,2",
    ]
    source.focus()
    page.keyboard.press("ArrowUp")
    assert list(lit(page)) == [7] and list(lit(page, 1)) == [6]
    page.keyboard.press("ArrowUp")
    assert list(lit(page)) == [5] and list(lit(page, 1)) == [3]
    page.locator("figure").nth(0).locator(".token[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert list(lit(page)) == [2]
    page.keyboard.press("ArrowRight")  # there is no next word
    assert list(lit(page)) == [2]


def test_a_pinned_word_stays_until_it_is_released(page):
    tokens = tokens_of(page)
    for release in ("Escape", "click"):
        tokens.nth(0).click()
        assert tokens.nth(0).get_attribute("aria-pressed") == "true"
        tokens.nth(2).hover()
        assert list(lit(page)) == [4]
        tokens.nth(0).click() if release == "click" else page.keyboard.press("Escape")
        assert page.locator("figure [aria-pressed=true]").count() == 0
        tokens.nth(2).hover()
        assert list(lit(page)) == [1]
    tokens.nth(0).focus()
    page.keyboard.press("Enter")
    tokens.nth(2).hover()
    assert list(lit(page)) == [4]


def test_the_box_can_be_hidden(page):
    canvas = "document.querySelector('canvas.image')"
    bare = pixel(page, canvas, 112, 60)
    page.get_by_label("box", exact=True).check()
    assert pixel(page, canvas, 112, 60) == (255, 255, 255) != bare  # x = 20 of 80 px is 112 of 448


def shades(page):
    """The (red, opacity) of the background of every word of the first answer."""
    script = "x => x.map(word => getComputedStyle(word).backgroundColor)"
    colors = tokens_of(page).evaluate_all(script)
    numbers = [[float(x) for x in re.findall(r"[\d.]+", color)] for color in colors]
    return [(n[0], n[3]) for n in numbers]


def test_a_chosen_cell_shows_which_words_look_there(page):
    canvas, note = page.locator("canvas.image").first, page.locator("figure .note").first
    assert shades(page) == [(0, 0.05), (0, 0.6), (0, 0.25)]  # entropy 0.1, 2 and 0.5
    size = canvas.bounding_box()
    place = {"x": size["width"] * 0.6, "y": size["height"] * 0.2}  # row 1, column 3: cell 2
    canvas.click(position=place)
    assert shades(page) == [(230, 0), (230, 0.8), (230, 0)]
    assert 'row 1, column 3: "dot" looked there most, 22\xa0%' in note.inner_text()
    page.keyboard.press("ArrowLeft")
    assert shades(page) == [(230, 0), (230, 0), (230, 0.8)]  # cell 1
    page.keyboard.press("ArrowUp")  # there is no row above
    assert 'row 1, column 2: "r1" looked there most, 25\xa0%' in note.inner_text()
    page.keyboard.press("Escape")
    assert shades(page)[1] == (0, 0.6) and "row" not in note.inner_text()


def test_playing_shows_word_after_word(page):
    page.clock.install()
    tokens_of(page).nth(2).click()  # a pinned word is released
    button = page.locator(".play")
    button.click()
    assert list(lit(page)) == [4] and button.inner_text() == "pause"
    page.clock.run_for(800)
    assert list(lit(page)) == [2, 7] and button.inner_text() == "pause"
    page.clock.run_for(800)
    assert list(lit(page)) == [1] and button.inner_text() == "play"  # the end
    page.clock.run_for(8000)
    assert list(lit(page)) == [1]
    button.click()
    button.click()  # pauses
    page.clock.run_for(8000)
    assert list(lit(page)) == [4]


def test_with_reduced_motion_every_click_shows_one_word(open_report):
    page = open_report([BEFORE], [AFTER], reduced_motion="reduce")
    page.clock.install()
    button = page.locator(".play")
    for cells in ([4], [2, 7], [1], [4]):
        assert button.inner_text() == "next word"
        button.click()
        page.clock.run_for(8000)
        assert list(lit(page)) == cells


def test_the_range_sets_the_value_of_the_brightest_color(page):
    tokens_of(page).nth(2).click()  # 0.25 in cell 1
    assert page.locator("#range-text").inner_text() == "the maximum of each map"
    page.locator("#range").fill("100")
    assert page.locator("#range-text").inner_text() == "100\xa0%"
    assert lit(page)[1] == blend((188, 55, 84), 0.5)  # the square root of 0.25
    page.locator("#range").fill("50")
    assert page.locator("#range-text").inner_text() == "25\xa0%"
    assert lit(page)[1] == blend((252, 255, 164), 1)


def test_a_smooth_map_blends_neighboring_cells(page):
    tokens_of(page).nth(2).click()  # all of it in cell 1
    canvas = "document.querySelector('canvas.image')"
    width, height = page.evaluate(f"[{canvas}.width, {canvas}.height]")
    edge = canvas, width * 2.1 / 4, height / 4  # just inside cell 2
    assert pixel(page, *edge) == pytest.approx(DARK, abs=1)
    page.get_by_label("smooth").check()
    assert lit(page)[1] == blend((252, 255, 164), 1)
    assert all(a > b + 10 for a, b in zip(pixel(page, *edge), DARK))
    page.get_by_label("smooth").uncheck()
    assert pixel(page, *edge) == pytest.approx(DARK, abs=1)


def test_subtracting_the_mean_map_leaves_what_is_above_it(page):
    tokens_of(page).nth(1).click()
    page.get_by_label("subtract the mean map").check()
    assert list(lit(page)) == [2]  # the mean map is 0.5 in cell 7
    assert "all 3 held-out questions" in page.inner_text("#sinks-text")
    note = page.locator("figure .note").first
    assert "22\xa0% of attention above the mean map" in note.inner_text()
    page.get_by_role("combobox", name="map", exact=True).select_option("3")
    assert page.get_by_label("subtract the mean map").is_disabled()
    assert list(lit(page)) == [7]


# --- heads ---

HEADS = "document.querySelector('canvas.heads')"


def bright_heads(page, head_at):
    """The brightest cell of the head at a place in the grid of heads."""
    layout = page.evaluate(
        f"(({{place, width, height}}) => [...place({head_at}), width, height])"
        "(headLayout(answers[0]))"
    )
    x, y, width, height = layout
    sums = [
        sum(
            pixel(
                page, HEADS, x + 1 + width * (c % 4 + 0.5) / 4, y + 1 + height * (c // 4 + 0.5) / 2
            )
        )
        for c in range(8)
    ]
    return sums.index(max(sums)), max(sums)


def test_all_heads_show_the_word_and_one_can_be_shown_large(page):
    summary = page.get_by_text("all layers and heads").first
    summary.click()
    page.wait_for_function("answers[0].headNote.textContent")
    status = page.locator("details p").nth(1)
    assert status.inner_text().startswith("layer 1, head 1: AUROC 0.90. Only the 2 of 4 heads")
    tokens_of(page).nth(1).hover()
    # Head 0 has cell 4 + i and head 3 cell i; heads 1 and 2 show their mean map, fainter.
    found = [bright_heads(page, n) for n in range(4)]
    assert [cell for cell, _ in found] == [5, 1, 2, 1]
    assert found[0][1] == found[3][1] > found[1][1] == found[2][1]
    tokens_of(page).nth(2).click()
    assert [bright_heads(page, n)[0] for n in range(4)] == [6, 1, 2, 2]

    page.get_by_role("combobox", name="order").first.select_option("auroc")  # heads 3, 0, 1, 2
    assert [bright_heads(page, n)[0] for n in range(4)] == [2, 6, 1, 2]
    canvas, note = page.locator("canvas.heads"), page.locator("figure .note").first
    size = canvas.first.bounding_box()
    canvas.first.click(position={"x": size["width"] * 0.25, "y": size["height"] * 0.25})
    assert list(lit(page)) == [2] and "layer 1, head 1" in note.inner_text()
    assert "AUROC 0.90, shown large" in status.inner_text()
    canvas.first.hover(position={"x": size["width"] * 0.75, "y": size["height"] * 0.25})
    assert status.inner_text().startswith("layer 0, head 0: AUROC 0.60.")
    page.keyboard.press("ArrowDown")
    assert list(lit(page)) == [1] and "mean over the underlined words" in note.inner_text()
    page.keyboard.press("Escape")
    tokens_of(page).nth(0).hover()
    assert list(lit(page)) == [4]


# --- early and late looks, the list of questions ---


def questions(page):
    """The indices of the listed questions. Their numbers start from 1."""
    return page.locator("#questions li:visible").evaluate_all("x => x.map(item => item.value - 1)")


def test_the_looks_are_counted_and_filter_the_questions(page):
    looks = page.locator(".look")
    assert looks.all_inner_texts() == [
        *("0 answers", "1 answer, 100% right", "2 answers, 50% right", "0 answers"),
        *("3 answers, 33% right", "0 answers", "0 answers", "0 answers"),
    ]
    tables = page.locator(".looks table").all_inner_texts()
    assert "before training" in tables[0] and "corrected: 2 of 2" in tables[0]
    assert "after training" in tables[1] and "corrected: 0 of 0" in tables[1]
    assert questions(page) == [0, 1, 2]
    looks.nth(2).click()
    assert questions(page) == [0, 1] and looks.nth(2).get_attribute("aria-pressed") == "true"
    assert page.inner_text("#count") == "2 of 3 questions, 1 with maps"
    assert page.locator("#count").evaluate("e => Math.round(e.getBoundingClientRect().top)") < 200
    looks.nth(3).click()
    assert questions(page) == []
    looks.nth(1).click()
    assert questions(page) == [2] and page.locator(".example").is_hidden()
    looks.nth(1).click()  # a second click shows all
    assert questions(page) == [0, 1, 2] and page.locator(".example").is_visible()


def test_right_and_wrong_answers_can_be_filtered(page):
    verdict = page.get_by_role("combobox", name="answers", exact=True)
    expected = {
        "wrong before, right after": [1],
        "right before, wrong after": [0, 2],
        "all": [0, 1, 2],
    }
    for option, found in expected.items():
        verdict.select_option(option)
        assert questions(page) == found
    verdict.select_option("wrong before, wrong after")
    assert questions(page) == [] and page.inner_text("#count").startswith("0 of 3 questions")
    page.locator(".look").nth(2).click()
    page.get_by_role("button", name="show all").click()
    assert questions(page) == [0, 1, 2]


def test_the_page_shows_its_data_and_fits_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    text = page.locator("main").inner_text()
    assert "Old? (</script>)" in text
    assert "before, ✓ right, looked elsewhere early, but corrected itself late" in text
    assert "after, ✗ wrong, looked at the region early and late" in text
    tokens_of(page).nth(2).hover()
    note = '"r1": entropy 0.50 nats; brightest cell: 25\xa0% of attention; '
    notes = page.locator("figure .note").all_inner_texts()
    assert note + "the reward's layer 3, heads 1,2" in notes
    assert "greedy accuracy" in page.locator("pre").inner_text()
    listed = page.locator("#questions li").all_inner_texts()
    assert "What is <b>it</b>? (</script>) maps" in listed[0] and "maps" not in listed[1]
    assert (
        "before: ✓ right, looked elsewhere early, but corrected itself late: the dot r1"
        in listed[0]
    )
    assert (
        page.locator("#questions a").evaluate("a => document.querySelector(a.hash).className")
        == "example"
    )


def test_the_first_map_is_that_of_the_underlined_word_with_the_brightest_cell(page):
    result = "{selected: [true, false, true], rewarded: {maps: [[0.1], [0.9], [0.3]]}}"
    assert page.evaluate(f"initialWord({result})") == 2


def test_image_and_words_are_side_by_side_on_a_wide_screen(open_report):
    page = open_report([BEFORE], [AFTER], viewport={"width": 1280, "height": 800})
    for figure in page.locator("figure").all():
        image, word = (figure.locator(x).first.bounding_box() for x in ("canvas.image", ".token"))
        assert word["x"] >= image["x"] + image["width"] and word["y"] < image["y"] + 40
    first, second = (page.locator("figure").nth(n).bounding_box() for n in (0, 1))
    assert first["y"] == second["y"] and second["x"] > first["x"] + first["width"]


def test_a_report_of_an_earlier_version_of_the_results_works(open_report):
    page = open_report([OLD_BEFORE], [OLD_AFTER])
    tokens_of(page).nth(0).hover()
    assert list(lit(page)) == [4]
    assert page.get_by_role("combobox", name="map", exact=True).locator("option").count() == 2
    assert page.get_by_label("subtract the mean map").is_disabled()
    assert page.locator("#looks").is_hidden() and page.locator("canvas.heads").count() == 0
    assert page.inner_text("#questions").startswith("a maps")  # the question was not stored
    assert page.inner_text("#count") == "1 of 1 questions, 1 with maps"


def test_a_report_before_the_end_of_training_works(open_report):
    page = open_report(BEFORES, None)
    assert page.locator(".look").count() == 4
    page.get_by_role("combobox", name="answers", exact=True).select_option("wrong before")
    assert questions(page) == [1]


# --- data and size ---


def large_page(with_heads):
    """The `page` of an answer of 111 tokens by a model with 28 layers of 16 heads, on an image of
    16 x 16 tokens."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(28, 16, 111, 256, generator=generator)
    selected, region = torch.arange(111) < 33, torch.arange(256) < 20
    page = {"words": ["attention"] * 111, "entropy": [0.1234] * 111}
    page["rewarded"] = page_maps.reward_fields(attention.mean((0, 1)), (16, 16))
    page |= page_maps.layer_fields(attention.mean(1), (16, 16))
    if with_heads:
        page["heads"] = page_maps.head_fields(attention, selected, region, (16, 16))
    return page


def test_a_long_run_of_a_large_model_stays_under_two_megabytes(tmp_path):
    """Noise images, four with heads, and a thousand questions with long answers."""
    with_heads, without = large_page(True), large_page(False)
    assert len(with_heads["heads"]["kept"]) >= 10 and len(with_heads["layers"]) == 4
    results = [
        BEFORE
        | {
            "page": page,
            "length": 111,
            "selected": [True] * 111,
            "text": "word " * 100,
            "to_region": [0.1] * 111,
            "to_image": [0.5] * 111,
        }
        for page in [with_heads] * 4 + [without] * 4 + [None] * 992
    ]
    path, _ = make_run(tmp_path, results, results, steps=1000)
    examples = [Example(Image.effect_noise((900, 700), 80), "?", "!", [(0, 0, 9, 9)])] * 8
    save_report(path, examples)
    assert (path / "report.html").stat().st_size < 2e6
    data = page_data(path)
    assert data["total"] == 1000 and len(data["questions"]) == html_report.LISTED
    assert all(len(result[0]) <= 150 for _, _, results in data["questions"] for result in results)


def page_data(folder):
    text = (folder / "report.html").read_text()
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("results", [[], [BEFORE]])
def test_an_unfinished_run_has_a_report(tmp_path, results):
    path, examples = make_run(tmp_path, results)
    save_report(path, examples)
    assert "2 of 5 steps: not finished" in (path / "report.html").read_text()
    ET.parse(path / "response.svg")


def test_an_interrupted_run_has_a_report(tmp_path, monkeypatch):
    """After Ctrl-C in the first step, the report shows the first evaluation."""
    train_step = sayo_mini.train_step

    def interrupted_step(*args):
        signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(sayo_mini, "train_step", interrupted_step)
    flags = ["--device", "cpu", "--no-load_in_4bit", "--model_name_or_path", TINY]
    flags += ["--prompts_per_step", 1, "--eval_examples", 2, "--max_steps", 3]
    assert sayo_mini.main([*map(str, flags), "--output_dir", str(tmp_path)]) == 130
    assert "of 3 steps: not finished" in (tmp_path / "report.html").read_text()
    data = page_data(tmp_path)
    assert len(data["examples"]) == len(data["questions"]) == 2


def test_a_map_is_one_character_per_cell():
    # square roots: 0, 1/2, 1, 0.707
    assert pack_map([0.0, 0.25, 1.0, 0.5]) == [1.0, "0" + LEVELS[32] + "_" + LEVELS[45]]
    assert pack_map([0.0, 0.0]) == [0.0, "00"]
    assert len(set(LEVELS)) == 64


def test_several_maps_share_one_scale():
    maps = [[0.0, 0.5], [0.02, 0.005]]
    largest, text = pack_maps(maps)
    assert largest == 0.5 and len(text) == 6
    assert unpack_map([0.5, text[0]]) == [0.5] and unpack_map([0.5, text[1:3]]) == [0.0, 0.5]
    (scale,) = unpack_map([0.5, text[3]])
    assert scale == pytest.approx(0.02, rel=0.1)
    assert unpack_map([scale, text[4:]]) == pytest.approx([0.02, 0.005], rel=0.1)


def test_the_mean_map_covers_all_questions():
    rows = [{"grid": (1, 2), "small_map": pack_map(m)} for m in ([1.0, 0.0], [0.5, 0.5])]
    assert unpack_map(mean_map(rows, (1, 2))) == pytest.approx([0.75, 0.25], abs=0.02)
    # A map of another image has other cells.
    rows.append({"grid": (2, 1), "small_map": pack_map([0.0, 1.0])})
    assert resample([0.0, 1.0], (2, 1), (1, 2)) == [1.0, 1.0]
    assert resample([0.0, 1.0], (2, 1), (4, 2)) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert unpack_map(mean_map(rows, (1, 2))) == pytest.approx([2.5 / 3, 0.5], abs=0.02)
    assert mean_map([*rows, {"grid": (1, 2)}], (1, 2)) is None


def test_charts_are_well_formed_and_scaled():
    svg = ET.fromstring(line_chart("a < b", {"one": [0.0, 2.0, 1.0], "two": [None, 1.0]}))
    first, second = (line.get("points").split() for line in svg.iter("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in first)
    assert x1 - x0 == pytest.approx(x2 - x1) and y2 == pytest.approx((y0 + y1) / 2) and y1 < y0
    assert len(second) == 1 and second[0] == f"{x1},{y2}"
    dashes = {line.get("stroke-dasharray") for line in svg.iter("polyline")}
    assert len(dashes) == 2  # distinguishable without color
    assert line_chart("nothing", {"one": []}) == ""


def lines_of(chart):
    """{name in the legend: (class, dash pattern)} of a chart, an SVG string."""
    svg = ET.fromstring(chart)
    styles = [(x.get("class"), x.get("stroke-dasharray")) for x in svg.iter("polyline")]
    legend = [(x.get("class"), x.get("stroke-dasharray")) for x in svg.iter("path")][
        1:
    ]  # [0]: axis
    assert styles == legend
    return dict(zip([x.text for x in svg.iter("text")][-len(styles) :], styles))


def test_ten_lines_have_ten_styles():
    """Each line has its own dash pattern, recognizable without color, and the legend is long enough
    to show it."""
    chart = line_chart("many", {f"line {n}": [0.0, n] for n in range(10)})
    dashes = [dash for _, dash in lines_of(chart).values()]
    assert len(set(dashes)) == 10 and dashes[0] == "none"
    longest = max(sum(map(int, dash.split())) for dash in dashes[1:])
    assert int(re.search(r' h(\d+)"', chart)[1]) > longest


def test_every_line_has_a_color_in_light_and_dark_mode(browser, tmp_path):
    """Colors repeat, but neighbors differ, and no line has the color of the background."""
    metrics = METRICS | {f"rewards/r{n}/mean": n / 10 for n in range(10)}
    path, examples = make_run(tmp_path, [], metrics=metrics)
    save_report(path, examples)
    script = "x => x.map(line => getComputedStyle(line).stroke)"
    colors = {}
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto((path / "report.html").as_uri())
        chart = tab.locator(".chart").nth(0)
        colors[scheme] = chart.locator("polyline").evaluate_all(script)
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert len(colors[scheme]) == 11
        assert not {"none", background} & set(colors[scheme])
        assert all(a != b for a, b in zip(colors[scheme], colors[scheme][1:]))
        tab.close()
    assert not set(colors["light"]) & set(colors["dark"])


def test_a_reward_unknown_to_the_code_has_its_own_line(tmp_path):
    new = {f"rewards/{name}/{kind}": 0.5 for kind in ("mean", "std") for name in ("format", "new")}
    path, examples = make_run(tmp_path, [BEFORE], metrics=METRICS | new)
    save_report(path, examples)
    charts = re.findall("<svg.*?</svg>", (path / "report.html").read_text())
    means, deviations = lines_of(charts[0]), lines_of(charts[1])
    assert list(means) == [f"rewards/{name}/mean" for name in ("attention", "format", "new")]
    assert list(deviations) == ["rewards/format/std", "rewards/new/std"]
    for lines in (means, deviations):
        assert len(set(lines.values())) == len(lines)


def test_report_does_not_load_torch():
    """The other modules that only draw and print do not load it either."""
    code = "import sys; from analysis import html_report, plots, results_table\n"
    code += "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(html_report.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_attention_by_position_by_hand():
    def result(correct, to_region, to_image):
        lists = {"to_region": to_region, "to_image": to_image}
        return {"correct": correct, "length": len(to_image), **lists}

    results = [result(1.0, [0.2, 0.4], [0.5, 0.6]), result(1.0, [0.4], [0.7])]
    charts = attention_by_position([*results, result(0.0, [0.1], [0.9])])
    right = charts["right answers (2)"]
    assert right["the region"] == pytest.approx([0.3, 0.4])
    assert right["the rest of the image"] == pytest.approx([0.3, 0.2])
    assert right["text"] == pytest.approx([0.4, 0.4])
    assert charts["wrong answers (1)"]["text"] == pytest.approx([0.1])
    # Only one of four answers is longer than one token, which is too few for a mean.
    results = [result(1.0, [0.1], [0.2])] * 3 + [result(1.0, [0.1, 0.9], [0.2, 0.9])]
    assert len(attention_by_position(results)["right answers (4)"]["text"]) == 1
