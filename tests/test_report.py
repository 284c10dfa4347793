"""extras/report.py: report.html in a browser, its size and its charts, and the files of a run."""

import io
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
from extras.report import line_chart, write_report

pytestmark = pytest.mark.slow
BLUE = (40, 120, 200)  # of the whole image
GRAY = 0.213 * BLUE[0] + 0.715 * BLUE[1] + 0.072 * BLUE[2]
DARK = [0.5 * (0.6 * GRAY + 0.4 * v) for v in BLUE]  # less color, darker, without attention
METRICS = {"step": 1, "entropy": 0.5, "kl": 0.0, "attention/auroc": 0.6}
METRICS |= {"completions/mean_length": 9, "rewards/attention/mean": 0.2}
SCORES = "auroc permuted_auroc mass_over_area pointing tas image_mass area fixed_auroc length"
SCORES += " fixed_mass_over_area permuted_early permuted_late"
IMAGES = count()


def make_row(maps, correct, early, late):
    """A result of `evaluate` on a grid of 2 x 4. Args: maps, {cell: attention} of each word."""
    maps = [pack_map([attention.get(cell, 0.0) for cell in range(8)]) for attention in maps]
    row = dict.fromkeys(SCORES.split(), 0.5) | dict(correct=correct, early=early, late=late)
    row |= dict(image=next(IMAGES), question="What is <b>it</b>?", answer="</script>")
    row |= dict(text="the dot r1", words=["the", " dot", " r1", ""], grid=(2, 4), maps=maps)
    row |= dict(look_maps=maps[:2], selected=[False, True, True, False])
    row |= dict(to_region=[0.1] * 4, to_image=[0.5] * 4)
    return row


# The mean maps: half of the last two words. The brightest color stands for 0.4, the largest mean.
BEFORE = make_row([{4: 0.2}, {7: 0.8}, {1: 0.4}, {0: 1}], 1.0, 0.0, 1.0)
AFTER = make_row([{6: 0.4, 0: 0.1}, {5: 0.2}, {2: 0.2}, {0: 1}], 0.0, 1.0, 1.0)
BEFORES = [BEFORE, BEFORE | {"correct": 0.0}, BEFORE | {"early": 1.0, "late": 0.0}]
AFTERS = [AFTER, AFTER | {"correct": 1.0}, AFTER]


def make_run(folder, before, after=None, steps=2, **settings):
    """(a RunDirectory after some steps, its held-out examples)"""
    cfg = Config(output_dir=str(folder), model_name_or_path="tiny", max_steps=2, **settings)
    run = RunDirectory(cfg, {}, None, None, None)
    run.history, run.step = lambda: [METRICS] * steps, steps
    for name, rows in (("before.json", before), ("after.json", after)):
        if rows is not None:
            run.write_json(name, rows)
    example = Example(Image.new("RGB", (80, 80), BLUE), "?", "</script>", [(40, 0, 60, 40)], "a")
    return run, [example] * len(before)


@pytest.fixture
def open_report(browser, tmp_path):
    """A function that opens a report on a phone. The test fails if its script does."""
    tab, errors = browser.new_page(viewport={"width": 390, "height": 844}), []
    tab.on("pageerror", lambda error: errors.append(error))

    def open_tab(before, after):
        write_report(*make_run(tmp_path, before, after))
        tab.goto((tmp_path / "report.html").as_uri())
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
    photo = page.locator(".photo:has(canvas)").nth(answer).screenshot()
    picture = Image.open(io.BytesIO(photo)).convert("RGB")
    corners = [((i % 4 + 0.2) / 4, (i // 4 + 0.8) / 2) for i in range(8)]
    colors = [picture.getpixel((x * picture.width, y * picture.height)) for x, y in corners]
    return {i: color for i, color in enumerate(colors) if sum(color) > sum(DARK) + 20}


def test_mouse_and_keyboard_choose_the_word_whose_map_is_shown(page):
    words = words_of(page)
    whole = ["mean", "first look", "last look"]
    assert words.all_inner_texts() == [*whole, "the", "dot", "r1"]  # no button without text
    assert list(lit(page)) == [1, 7]  # at first, the mean map
    for i, cells in enumerate(([1, 7], [4], [7], [4], [7], [1])):
        words.nth(i).hover()
        assert list(lit(page)) == cells
    words.last.focus()
    for key, cells in (("ArrowLeft", [7]), ("ArrowLeft", [4]), ("ArrowRight", [7])):
        page.keyboard.press(key)
        assert list(lit(page)) == cells
    assert list(lit(page, 1)) == [2, 5]  # the other answer keeps its mean map
    underlined = words.evaluate_all("x => x.map(w => getComputedStyle(w).textDecorationLine)")
    assert underlined == ["none"] * 4 + ["underline"] * 2


def test_a_phone_shows_two_maps_on_its_first_screen(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    before, after = (page.locator("#first canvas").nth(i).bounding_box() for i in (0, 1))
    assert before["y"] + before["height"] < after["y"] < 844 - after["height"]
    box = page.locator("#first figure:has(canvas) .box").first.bounding_box()
    left, top = (box[v] - before[v] for v in ("x", "y"))
    place = [v / before["width"] for v in (left, top, box["width"], box["height"])]
    assert place == pytest.approx([0.5, 0, 0.25, 0.5], abs=0.02)


def test_the_texts_of_the_page(page):
    """Text from the data is no code."""
    assert page.locator("pre").first.inner_text().strip() == results_table(BEFORES, AFTERS).strip()
    assert page.locator("#verdict").inner_text() == verdict(BEFORES, AFTERS)
    page.locator("section details").first.click()
    text = page.inner_text("body")
    assert "the white card catches its eye" in text and "(last layer, all heads)" in text
    assert "Right answers: 2 of 3 before, 1 after training." in text
    assert "Wrong first looks corrected: 2 of 2 before, 0 of 0 after." in text
    assert "right before, wrong after (2)" in text and "wrong before, right after (1)" in text
    assert "What is <b>it</b>? (answer: </script>)" in text
    assert "before (first look on the region, last look off): the dot r1" in text
    assert "http" not in page.content()  # it works offline


@pytest.mark.parametrize("before, visible", [(BEFORES[1:2], True), ([], False)])
def test_an_unfinished_run_has_a_page(open_report, before, visible):
    page = open_report(before, None)
    assert "tiny on scenes, 2 of 2 training steps" in page.inner_text("body")
    assert page.get_by_text("The run is not finished.").is_visible() == visible
    assert page.get_by_text("wrong before (1)").is_visible() == visible
    assert not page.get_by_text("More questions").is_visible()


def test_a_finished_run_has_pictures_and_a_card_with_results(tmp_path):
    settings = dict(dataset=str(tmp_path / "<b>|.jsonl"), instruction="\"a\" 'b' {c}\n")
    run, examples = make_run(tmp_path / "run", BEFORES, AFTERS, **settings)
    (run.folder / "adapter").mkdir()
    write_report(run, examples)
    rows, row = (Image.open(run.folder / name) for name in ("look.png", "before_after.png"))
    assert rows.height == 3 * row.height and (run.folder / "look.gif").exists()
    assert "the white card" not in (run.folder / "report.html").read_text()
    card = (run.folder / "adapter" / "README.md").read_text()
    assert results_table(BEFORES, AFTERS) in card and "| data | &lt;b&gt;\\|.jsonl |" in card
    assert str(tmp_path) not in card and "base_model" not in card
    compile(card.split("```python\n")[1].split("```")[0], "the code in the card", "exec")
    hub = model_card(run.settings | {"model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct"})
    assert hub.startswith("---\nbase_model: Qwen/Qwen3-VL-2B-Instruct\nlibrary_name: peft\n")
    placebo = model_card(run.settings | {"region": "rolled", "max_pixels": 6400})
    assert "| images | at most 6,400 pixels |" in placebo and "--keep_best" not in placebo
    assert "the best steps (--keep_best)" in model_card(run.settings | {"keep_best": True})
    assert "| region | a placebo: the boxes, rolled by half the image |" in placebo


def test_the_question_to_show_corrects_a_wrong_first_look():
    wrong, right = BEFORE | {"correct": 0.0}, AFTER | {"correct": 1.0}
    looks_again = right | {"early": 0.0, "late": 1.0}
    assert report.most_telling([wrong, wrong], [right, looks_again]) == 1
    assert report.most_telling([BEFORE, wrong], [BEFORE, right]) == 1
    assert report.most_telling([BEFORE] * 2, [BEFORE] * 2) == 0


def test_results_of_an_earlier_end_are_not_shown(tmp_path):
    run, examples = make_run(tmp_path, BEFORES, AFTERS, steps=1)  # extended to two steps
    (tmp_path / "adapter").mkdir()  # of the earlier end, and its card
    write_report(run, examples)
    assert not any((tmp_path / "adapter").iterdir())
    assert "not finished" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "look.png").exists()


@pytest.mark.parametrize(
    "rows, text, listed", [(256, "long answer " * 40, 256), (1000, "\u8fd9" * 900, 153)]
)
def test_the_page_of_a_long_run_stays_below_one_megabyte(tmp_path, rows, text, listed):
    """Images of noise, maps of 24 x 24 cells for 110 tokens, and 30,000 steps."""
    maps = [pack_map([(i * cell % 97) / 97 for cell in range(576)]) for i in range(110)]
    row = AFTER | {"text": text, "maps": maps, "look_maps": maps[:2], "grid": (24, 24)}
    row |= {"words": [text[:6]] * 110, "selected": [True] * 110, "to_image": [0.5] * 110}
    run, _ = make_run(tmp_path, [])
    run.history = lambda: (METRICS | {"kl": i % 7} for i in range(30_000))
    noise = Example(Image.effect_noise((900, 700), 80), "?", "!", [(0, 0, 9, 9)])
    page = report.render_page(run, [row] * rows, [row] * rows, [noise] * rows)
    assert len(page.encode()) < 1e6 and "KL from the base model" in page
    assert page.count('"mean":') == 2 * 3 and f"{listed} of {rows} questions" in page


def test_charts_are_well_formed_and_scaled():
    svg = ET.fromstring(line_chart("a < b", {"one": [0.0, 2.0, 1.0], "two": [None, 1.0]}, "step"))
    first, second = (line.get("points").split() for line in svg.iter("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in first)
    assert x1 - x0 == pytest.approx(x2 - x1) and y2 == pytest.approx((y0 + y1) / 2) and y1 < y0
    assert second == [f"{x1},{y2}"]
    texts = [text.text for text in svg.iter("text")]
    assert texts[0] == "a < b" and texts[-2:] == ["one", "two"] and "step 3" in texts
    assert line_chart("nothing", {"one": [None]}, "step") == ""
