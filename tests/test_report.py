"""extras/report.py: report.html in a browser, its size and its charts, and the files of a run."""

import json
import re
import xml.etree.ElementTree as ET
from itertools import count

import pytest
from PIL import Image

from checkpoint import RunDirectory
from config import Config
from data import Example
from evaluate import pack_map, results_table, verdict
from extras import report
from extras.model_card import model_card
from extras.pictures import COLORS
from extras.report import line_chart, write_report

pytestmark = pytest.mark.slow
BLUE = (40, 120, 200)  # of the whole image
GRAY = 0.3 * BLUE[0] + 0.59 * BLUE[1] + 0.11 * BLUE[2]
DARK = [0.5 * (0.6 * GRAY + 0.4 * v) for v in BLUE]  # less color, darker, without attention
METRICS = {"step": 1, "entropy": 0.5, "kl": 0.0, "attention/auroc": 0.6}
METRICS |= {"completions/mean_length": 9, "rewards/attention/mean": 0.2}
SCORES = "auroc permuted_auroc mass_over_area pointing tas image_mass area fixed_auroc"
SCORES += " fixed_mass_over_area permuted_early permuted_late"


IMAGES = count()


def make_row(maps, correct, early, late):
    """A result of `evaluate` on a grid of 2 x 4. Args: maps, {cell: attention} of each word."""
    return dict.fromkeys(SCORES.split(), 0.5) | {
        "image": next(IMAGES),
        "question": "What is <b>it</b>?",
        "answer": "</script>",
        "text": "the dot r1",
        "words": ["the", " dot", " r1", ""],
        "selected": [False, True, True, False],
        "grid": (2, 4),
        "maps": [pack_map([attention.get(cell, 0.0) for cell in range(8)]) for attention in maps],
        "length": 4,
        "to_region": [0.1] * 4,
        "to_image": [0.5] * 4,
        "correct": correct,
        "early": early,
        "late": late,
    }


# The mean maps: half of the last two words. The brightest color stands for 0.4, the largest mean.
BEFORE = make_row([{4: 0.2}, {7: 0.8}, {1: 0.4}, {0: 1}], 1.0, 0.0, 1.0)
AFTER = make_row([{6: 0.4, 0: 0.1}, {5: 0.2}, {2: 0.2}, {0: 1}], 0.0, 1.0, 1.0)
BEFORES = [BEFORE, BEFORE | {"correct": 0.0}, BEFORE | {"early": 1.0, "late": 0.0}]
AFTERS = [AFTER, AFTER | {"correct": 1.0}, AFTER]


def make_run(folder, before, after=None, steps=2, **settings):
    """(a RunDirectory after some steps, its held-out examples)"""
    cfg = Config(output_dir=str(folder), model_name_or_path="tiny", max_steps=2, **settings)
    run = RunDirectory(cfg, {}, None, None)
    run.history, run.step = lambda: [METRICS] * steps, steps
    for name, rows in (("before.json", before), ("after.json", after)):
        if rows is not None:
            run.write_json(name, rows)
    example = Example(Image.new("RGB", (80, 40), BLUE), "?", "</script>", [(40, 0, 60, 20)], "a")
    return run, [example] * len(before)


@pytest.fixture
def open_report(browser, tmp_path):
    """A function that opens the report of some results. The test fails if its script does."""
    tab, errors = browser.new_page(viewport={"width": 390, "height": 800}), []
    tab.on("pageerror", lambda error: errors.append(error))

    def open_tab(before, after):
        write_report(*make_run(tmp_path, before, after))
        tab.goto((tmp_path / "report.html").as_uri())
        shown = "document.querySelectorAll('[aria-current]').length"
        tab.wait_for_function(f"{shown} === document.querySelectorAll('canvas').length")
        return tab

    yield open_tab
    tab.close()
    assert errors == []


@pytest.fixture
def page(open_report):
    return open_report(BEFORES, AFTERS)


def words_of(page, answer=0):
    return page.locator(".words").nth(answer).locator(".word")


def lit(page, answer=0):
    """{cell: color} of the cells whose lower left differs from the darkened image."""
    script = """canvas => [...Array(8).keys()].map(cell => {
        const x = canvas.width * (cell % 4 + 0.1) / 4;
        const y = canvas.height * (Math.floor(cell / 4) + 0.9) / 2;
        return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data].slice(0, 3); })"""
    colors = page.locator("canvas").nth(answer).evaluate(script)
    return {i: color for i, color in enumerate(colors) if sum(color) > sum(DARK) + 20}


def test_mouse_and_keyboard_choose_the_word_whose_map_is_shown(page):
    words = words_of(page)
    assert words.all_inner_texts() == ["mean", "the", "dot", "r1"]  # no button without text
    assert list(lit(page)) == [1, 7]  # at first, the mean map
    for i, cells in enumerate(([1, 7], [4], [7], [1])):
        words.nth(i).hover()
        assert list(lit(page)) == cells
        assert words.nth(i).get_attribute("aria-current") == "true"
    words.last.focus()
    for key, cells in (("ArrowLeft", [7]), ("ArrowLeft", [4]), ("ArrowRight", [7])):
        page.keyboard.press(key)
        assert list(lit(page)) == cells
    assert list(lit(page, 1)) == [2, 5]  # the other answer keeps its mean map
    underlined = words.evaluate_all("x => x.map(w => getComputedStyle(w).textDecorationLine)")
    assert underlined == ["none", "none", "underline", "underline"]
    # The left edge of the box is at x = 40 of 80, so at 280 of 560 pixels.
    script = "canvas => [...canvas.getContext('2d').getImageData(280, 70, 1, 1).data]"
    assert page.locator("canvas").first.evaluate(script)[:3] == [0, 0xD5, 0xFF]


def test_the_colors_are_linear_and_the_same_before_and_after(page):
    cases = (0, 1, 4, 128), (0, 2, 7, 255), (0, 3, 1, 255), (1, 1, 6, 255), (1, 1, 0, 64)
    for answer, word, cell, level in cases:
        words_of(page, answer).nth(word).hover()
        light = zip(DARK, COLORS[3 * level :][:3])
        expected = [255 - (255 - dark) * (255 - v) / 255 for dark, v in light]
        assert lit(page, answer)[cell] == pytest.approx(expected, abs=4)
    assert "40 % or more per cell" in page.locator(".question").first.inner_text()


def test_the_questions_can_be_filtered(page):
    select, items = page.get_by_label("show"), page.locator("#questions li:visible")
    expected = {
        "wrong before, right after (1)": [2],
        "right before, wrong after (2)": [1, 3],
        "wrong before, wrong after (0)": [],
        "before: first look on the region, last look off (1)": [3],
        "before: first look off, last look on the region (2)": [1, 2],
        "before: first look off, last look off (0)": [],
        "after: first look on the region, last look on the region (3)": [1, 2, 3],
        "all questions (3)": [1, 2, 3],
    }
    for option, found in expected.items():
        select.select_option(option)
        assert items.evaluate_all("x => x.map(item => item.value)") == found


def test_text_from_the_data_is_no_code_and_the_page_fits_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    first = page.locator("#questions li").first.inner_text()
    assert "What is <b>it</b>? (</script>) maps" in first
    assert re.search(r"before: ✓ right: the dot r1\s+after: ✗ wrong: the dot r1", first)
    assert page.locator("#questions a").first.get_attribute("href") == "#maps-0"
    assert page.locator("pre").first.inner_text().strip() == results_table(BEFORES, AFTERS).strip()
    assert page.locator("#verdict").inner_text() == verdict(BEFORES, AFTERS)
    assert page.locator("#maps .question").first.get_attribute("id") == "maps-1"  # corrected
    assert "http" not in page.content()  # it works offline


@pytest.mark.parametrize("before, visible", [(BEFORES, True), ([], False)])
def test_an_unfinished_run_has_a_page(open_report, before, visible):
    page = open_report(before, None)
    assert page.locator("h1").inner_text() == "sayo-mini: tiny on scenes: 2 of 2 steps"
    assert page.locator("#questions").is_visible() == visible
    if visible:
        page.get_by_label("show").select_option("wrong before (1)")
        assert page.locator("#questions li:visible").count() == 1
        assert "not finished" in page.locator("#verdict").inner_text()


# --- files, size and charts ---


def test_a_finished_run_has_pictures_and_a_card_with_results(tmp_path):
    settings = dict(dataset=str(tmp_path / "<b>|.jsonl"), instruction="\"a\" 'b' {c}\n")
    run, examples = make_run(tmp_path / "run", BEFORES, AFTERS, **settings)
    (run.folder / "adapter").mkdir()
    names, contents = ("look.png", "look.gif", "before_after.png", "adapter/README.md"), []
    for _ in range(2):
        write_report(run, examples)
        contents.append([(run.folder / name).read_bytes() for name in names])
    assert contents[0] == contents[1]  # a resumed run writes the same files
    card = contents[0][-1].decode()
    assert results_table(BEFORES, AFTERS) in card and "| data | &lt;b&gt;\\|.jsonl |" in card
    assert str(tmp_path) not in card and "base_model" not in card
    compile(card.split("```python\n")[1].split("```")[0], "the code in the card", "exec")
    hub = model_card(run.settings | {"model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct"})
    assert hub.startswith("---\nbase_model: Qwen/Qwen3-VL-2B-Instruct\nlibrary_name: peft\n")
    other = model_card(run.settings | {"eval_dataset": "/other/vstar.jsonl"})
    assert ".jsonl; evaluated on vstar.jsonl |" in other
    # The second corrects a wrong first look; without it, the first corrected answer is shown.
    wrong, right = BEFORE | {"correct": 0.0}, AFTER | {"correct": 1.0}
    looks_again = right | {"early": 0.0, "late": 1.0}
    assert report.most_telling([wrong, wrong], [right, looks_again]) == 1
    assert report.most_telling([BEFORE, wrong], [BEFORE, right]) == 1
    assert report.most_telling([BEFORE], [BEFORE]) == 0
    rows, row = (Image.open(run.folder / name) for name in ("look.png", "before_after.png"))
    assert rows.height == 3 * row.height


def test_results_of_an_earlier_end_are_not_shown(tmp_path):
    run, examples = make_run(tmp_path, BEFORES, AFTERS, steps=1)  # extended to two steps
    write_report(run, examples)
    assert "not finished" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "look.png").exists() and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("dataset, told", [("scenes", True), ("mine.jsonl", False)])
def test_only_the_page_of_the_tiny_world_tells_its_story(tmp_path, dataset, told):
    run, _ = make_run(tmp_path, [], dataset=dataset)
    assert ("the white card catches its eye" in report.render_page(run, None, None, [])) == told


def test_the_page_of_a_long_run_stays_under_two_megabytes(tmp_path):
    """Noise images, long answers in Chinese, a thousand questions and ten thousand steps."""
    maps = [pack_map([(i * cell % 97) / 97 for cell in range(625)]) for i in range(110)]
    row = AFTER | {"text": "\u8fd9" * 900, "maps": maps, "grid": (25, 25)}
    row |= {"words": ["\u8fd9"] * 110, "selected": [True] * 110}
    run, _ = make_run(tmp_path, [])
    run.history = lambda: (METRICS | {"kl": i % 7} for i in range(10_000))
    noise = Example(Image.effect_noise((900, 700), 80), "?", "!", [(0, 0, 9, 9)])
    page = report.render_page(run, [row] * 1000, [row] * 1000, [noise] * 8)
    assert len(page.encode()) < 2e6
    assert all(name in page for name in ("1000 wrong answers", "KL from the base model"))
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["total"] == 1000 and len(data["questions"]) == report.LISTED
    assert data["questions"][0]["answers"][1]["text"] == "\u8fd9" * 240 + "..."


def test_charts_are_well_formed_and_scaled():
    svg = ET.fromstring(line_chart("a < b", {"one": [0.0, 2.0, 1.0], "two": [None, 1.0]}, "step"))
    first, second = (line.get("points").split() for line in svg.iter("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in first)
    assert x1 - x0 == pytest.approx(x2 - x1) and y2 == pytest.approx((y0 + y1) / 2) and y1 < y0
    assert second == [f"{x1},{y2}"]
    texts = [text.text for text in svg.iter("text")]
    assert texts[0] == "a < b" and texts[-2:] == ["one", "two"] and "step 3" in texts
    assert line_chart("nothing", {"one": [None]}, "step") == ""
