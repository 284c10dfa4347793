"""report.html, as a person uses it: in a browser, with mouse and keyboard; and what its charts are made of."""

import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from data import Example
from evaluate import PAGE
from page import LEVELS, chart, pack_map, pages, response

GRID, WORDS = (2, 4), ["the", "dot", "r1"]
CONFIG = {"model_name_or_path": "tiny", "dataset": "scenes", "max_steps": 5}


def row(hot, correct=1.0, layers=(0, 3), words=WORDS, grid=GRID, tokens=3):
    """A result of `evaluate`: in layer n, word i lights cell `hot[n][i]` and no other."""
    cells = grid[0] * grid[1]
    maps = [[pack_map([float(c == hot[n][i % 3]) for c in range(cells)]) for i in range(tokens)]
            for n in range(len(layers))]  # fmt: skip
    numbers = ("auroc", "permuted_auroc", "mass_over_area", "pointing", "tas", "fixed_auroc", "fixed_mass_over_area",
               "image_mass", "area")  # fmt: skip
    page = {"words": list(words), "entropy": [0.1, 2.0, 0.5] * (tokens // 3), "grid": grid, "layers": list(layers)}
    return dict.fromkeys(numbers, 0.5) | {
        "correct": correct, "length": tokens, "to_region": [0.1] * tokens, "to_image": [0.5] * tokens,
        "selected": [False, True, False] * (tokens // 3), "page": page | {"maps": maps},
    }  # fmt: skip


def write_page(path, examples):
    for name, text in pages(path, examples).items():
        (path / name).write_text(text)


def folder(tmp_path, before, after=None, steps=2):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    metrics = {"step": 1, "entropy": 0.5, "kl": 0.0, "rewards/attention/mean": 0.2}
    (tmp_path / "metrics.jsonl").write_text((json.dumps(metrics) + "\n") * steps)
    for name, results in (("before", before), ("after", after)):
        if results:
            (tmp_path / f"{name}.json").write_text(json.dumps(results))
    image = Image.new("RGB", (80, 40), (40, 120, 200))
    return tmp_path, [Example(image, "What is <b>it</b>?", "</script>", [(20, 0, 40, 20)], "a")] * len(before)


BEFORE, AFTER = row([[0, 5, 2], [4, 7, 1]]), row([[3, 3, 3], [6, 6, 6]], correct=0.0)


@pytest.fixture
def page(tmp_path):
    """report.html of two answers in headless Chromium; at the end the console must be clean."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    path, examples = folder(tmp_path, [BEFORE], [AFTER])
    write_page(path, examples)
    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root has none
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        tab, said = browser.new_page(viewport={"width": 390, "height": 800}), []
        # "readback" is the browser's advice on how `lit` below reads its pixels
        tab.on("console", lambda message: said.append(message.text) if "readback" not in message.text else None)
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        tab.goto((path / "report.html").as_uri())
        tab.wait_for_function("sides.every(side => side.image.complete)")
        tab.get_by_label("box", exact=True).uncheck()  # its outline would hide pixels
        yield tab
        browser.close()
    assert said == []


def lit(tab, side=0):
    """The cells whose centre is not bare image: {cell: (r, g, b)}."""
    canvas = f"document.querySelectorAll('canvas')[{side}]"
    width, height = tab.evaluate(f"[{canvas}.width, {canvas}.height]")
    found = {}
    for cell in range(8):
        x, y = width * (cell % 4 + 0.5) / 4, height * (cell // 4 + 0.5) / 2
        pixel = tuple(tab.evaluate(f"[...{canvas}.getContext('2d').getImageData({x}, {y}, 1, 1).data]")[:3])
        if pixel != (40, 120, 200):
            found[cell] = pixel
    return found


def test_pointing_at_a_word_shows_the_map_of_that_word(page):
    words = page.locator("figure").nth(0).locator(".word")
    assert list(lit(page)) == [7]  # at first: last layer, first word that counts
    for i, cell in enumerate([4, 7, 1]):
        words.nth(i).hover()
        assert list(lit(page)) == [cell] and words.nth(i).get_attribute("aria-pressed") == "true"
    assert lit(page)[1] == pytest.approx(
        (0.25 * 40 + 0.75 * 252, 0.25 * 120 + 0.75 * 255, 0.25 * 200 + 0.75 * 164), abs=2
    )
    assert list(lit(page, 1)) == [6]  # the other side keeps its own
    assert page.locator("[aria-pressed=true]").count() == 2


def test_keys_move_the_layer_and_the_word(page):
    page.get_by_label("layer").focus()
    page.keyboard.press("ArrowLeft")
    assert list(lit(page)) == [5] and list(lit(page, 1)) == [3] and page.locator("#which").inner_text() == "0"
    page.locator("figure").nth(0).locator(".word[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert list(lit(page)) == [2]
    page.keyboard.press("ArrowRight")  # there is no next word
    assert list(lit(page)) == [2]
    page.get_by_label("layer").focus()
    page.keyboard.press("ArrowRight")
    assert list(lit(page)) == [1]


def test_the_box_comes_and_goes_and_a_tap_will_do(page):
    edge = "[...document.querySelector('canvas').getContext('2d').getImageData(112, 60, 1, 1).data].slice(0, 3)"
    bare = page.evaluate(edge)
    page.get_by_label("box", exact=True).check()
    assert page.evaluate(edge) == [255, 255, 255] != bare  # x = 20 of 80 px is 112 of 448
    page.get_by_label("box", exact=True).uncheck()
    page.locator("figure").nth(0).locator(".word").nth(0).click()
    assert list(lit(page)) == [4]


def test_it_fits_a_phone_and_says_what_it_was_told(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    text = page.locator("main").inner_text()
    assert "What is <b>it</b>? (</script>)" in text and "before, right" in text and "after, wrong" in text
    page.locator("figure").nth(0).locator(".word").nth(1).hover()
    assert (
        '"dot": doubt 2.00 nats; at most 100 % of the attention on one cell' in page.locator(".note").all_inner_texts()
    )
    assert "greedy accuracy" in page.locator("pre").inner_text()


def test_a_long_run_of_a_large_model_stays_under_two_megabytes(tmp_path):
    """Eight examples, before and after, as many layers as `for_page` takes, 111 tokens, images of noise."""
    count = PAGE // (12 * 12 * 111)
    big = row([[1, 2, 3]] * count, layers=range(count), words=["word"] * 111, grid=(12, 12), tokens=111)
    path, examples = folder(tmp_path, [big] * 8, [big] * 8, steps=1000)
    examples = [Example(Image.effect_noise((900, 700), 80), "?", "!", [(0, 0, 9, 9)])] * 8
    write_page(path, examples)
    assert (path / "report.html").stat().st_size < 2e6


@pytest.mark.parametrize("results", [[], [BEFORE]])
def test_a_run_cut_short_has_its_page(tmp_path, results):
    path, examples = folder(tmp_path, results)
    write_page(path, examples)
    assert "2 of 5 steps: not finished" in (path / "report.html").read_text()
    ET.parse(path / "response.svg")


def test_one_character_a_cell():
    assert pack_map([0.0, 0.25, 1.0, 0.5]) == [1.0, "0" + LEVELS[32] + "_" + LEVELS[45]]  # roots: 0, 1/2, 1, 0.707
    assert pack_map([0.0, 0.0]) == [0.0, "00"]
    assert len(set(LEVELS)) == 64


def test_charts_are_well_formed_and_scaled():
    svg = ET.fromstring(chart("a < b", {"one": [0.0, 2.0, 1.0], "two": [None, 1.0]}))
    first, second = (line.get("points").split() for line in svg.iter("polyline"))
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, p.split(","))) for p in first)
    assert x1 - x0 == pytest.approx(x2 - x1) and y2 == pytest.approx((y0 + y1) / 2) and y1 < y0
    assert len(second) == 1 and second[0] == f"{x1},{y2}"
    dashes = {line.get("stroke-dasharray") for line in svg.iter("polyline")}
    assert len(dashes) == 2  # told apart without colour
    assert chart("nothing", {"one": []}) == ""


def test_attention_along_the_response_by_hand():
    def result(correct, to_region, to_image):
        return {"correct": correct, "length": len(to_image), "to_region": to_region, "to_image": to_image}

    found = response([result(1.0, [0.2, 0.4], [0.5, 0.6]), result(1.0, [0.4], [0.7]), result(0.0, [0.1], [0.9])])
    right = found["right answers (2)"]
    assert right["the region"] == pytest.approx([0.3, 0.4])
    assert right["the rest of the image"] == pytest.approx([0.3, 0.2])
    assert right["text"] == pytest.approx([0.4, 0.4])
    assert found["wrong answers (1)"]["text"] == pytest.approx([0.1])
    many = [result(1.0, [0.1], [0.2])] * 3 + [result(1.0, [0.1, 0.9], [0.2, 0.9])]  # one of four goes on
    assert len(response(many)["right answers (4)"]["text"]) == 1
