"""report.html: mouse and keyboard in a browser, its size, and its charts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image

import sayo_mini
from analysis import html_report
from analysis.evaluate import MAX_MAP_CHARACTERS
from analysis.html_report import (
    LEVELS,
    attention_by_position,
    line_chart,
    pack_map,
    render_report,
)
from data import Example

GRID, TOKENS = (2, 4), ["the", "dot", "r1"]
CONFIG = {"model_name_or_path": "tiny", "dataset": "scenes", "max_steps": 5}
METRICS = {"step": 1, "entropy": 0.5, "kl": 0.0, "rewards/attention/mean": 0.2}


def make_result(hot, correct=1.0, layers=(0, 3), words=TOKENS, grid=GRID, tokens=3):
    """A result of `evaluate` in which token i of layer n attends only to cell `hot[n][i]`."""
    cells = grid[0] * grid[1]

    def one_cell(cell):
        return pack_map([float(c == cell) for c in range(cells)])

    names = ["auroc", "permuted_auroc", "mass_over_area", "pointing", "tas", "image_mass", "area"]
    return dict.fromkeys(names + ["fixed_auroc", "fixed_mass_over_area"], 0.5) | {
        "correct": correct,
        "length": tokens,
        "to_region": [0.1] * tokens,
        "to_image": [0.5] * tokens,
        "selected": [False, True, False] * (tokens // 3),
        "page": {
            "words": list(words),
            "entropy": [0.1, 2.0, 0.5] * (tokens // 3),
            "grid": grid,
            "layers": list(layers),
            "maps": [[one_cell(row[i % 3]) for i in range(tokens)] for row in hot],
        },
    }


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
    image = Image.new("RGB", (80, 40), (40, 120, 200))
    example = Example(image, "What is <b>it</b>?", "</script>", [(20, 0, 40, 20)], "a")
    return tmp_path, [example] * len(before)


BEFORE = make_result([[0, 5, 2], [4, 7, 1]])
AFTER = make_result([[3, 3, 3], [6, 6, 6]], correct=0.0)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # root cannot use the sandbox
        browser = playwright.chromium.launch(executable_path=chromium, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(tmp_path, browser):
    """report.html with two answers. Fails if the page writes to the console or uses the network."""
    path, examples = make_run(tmp_path, [BEFORE], [AFTER])
    save_report(path, examples)
    tab, messages = browser.new_page(viewport={"width": 390, "height": 800}), []

    def log_message(message):
        if "readback" not in message.text:  # a performance hint about how `lit` reads pixels
            messages.append(message.text)

    def log_request(request):
        if request.url.startswith("http"):
            messages.append(request.url)

    tab.on("console", log_message)
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", log_request)
    tab.goto((path / "report.html").as_uri())
    tab.wait_for_function("answers.every(answer => answer.image.complete)")
    tab.get_by_label("box", exact=True).uncheck()  # its outline would hide pixels
    yield tab
    tab.close()
    assert messages == []


def tokens_of(page, answer=0):
    return page.locator("figure").nth(answer).locator(".token")


def lit(tab, answer=0):
    """{cell: (r, g, b)} of the cells whose center differs from the image."""
    canvas = f"document.querySelectorAll('canvas')[{answer}]"
    width, height = tab.evaluate(f"[{canvas}.width, {canvas}.height]")
    cells = {}
    for cell in range(8):
        x, y = width * (cell % 4 + 0.5) / 4, height * (cell // 4 + 0.5) / 2
        pixel = f"[...{canvas}.getContext('2d').getImageData({x}, {y}, 1, 1).data]"
        color = tuple(tab.evaluate(pixel)[:3])
        if color != (40, 120, 200):
            cells[cell] = color
    return cells


def test_hovering_over_a_token_shows_its_map(page):
    tokens = tokens_of(page)
    assert list(lit(page)) == [7]  # the initial map: last layer, first selected token
    for i, cell in enumerate([4, 7, 1]):
        tokens.nth(i).hover()
        assert list(lit(page)) == [cell]
        assert tokens.nth(i).get_attribute("aria-pressed") == "true"
    blend = [0.25 * a + 0.75 * b for a, b in zip((40, 120, 200), (252, 255, 164))]
    assert lit(page)[1] == pytest.approx(blend, abs=2)
    assert list(lit(page, 1)) == [6]  # the other answer keeps its token
    assert page.locator("[aria-pressed=true]").count() == 2


def test_keys_change_the_layer_and_the_token(page):
    page.get_by_label("layer").focus()
    page.keyboard.press("ArrowLeft")
    assert list(lit(page)) == [5] and list(lit(page, 1)) == [3]
    assert page.locator("#layer-number").inner_text() == "0"
    page.locator("figure").nth(0).locator(".token[tabindex='0']").focus()
    page.keyboard.press("ArrowRight")
    assert list(lit(page)) == [2]
    page.keyboard.press("ArrowRight")  # there is no next token
    assert list(lit(page)) == [2]
    page.get_by_label("layer").focus()
    page.keyboard.press("ArrowRight")
    assert list(lit(page)) == [1]


def test_the_box_can_be_hidden_and_a_tap_selects_a_token(page):
    context = "document.querySelector('canvas').getContext('2d')"
    edge = f"[...{context}.getImageData(112, 60, 1, 1).data].slice(0, 3)"
    bare = page.evaluate(edge)
    page.get_by_label("box", exact=True).check()
    assert page.evaluate(edge) == [255, 255, 255] != bare  # x = 20 of 80 px is at 112 of 448
    page.get_by_label("box", exact=True).uncheck()
    tokens_of(page).nth(0).click()
    assert list(lit(page)) == [4]


def test_the_page_fits_a_phone_and_shows_its_data(page):
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    text = page.locator("main").inner_text()
    assert "What is <b>it</b>? (</script>)" in text
    assert "before, right" in text and "after, wrong" in text
    tokens_of(page).nth(1).hover()
    note = '"dot": entropy 2.00 nats; brightest cell: 100 % of attention'
    assert note in page.locator(".note").all_inner_texts()
    assert "greedy accuracy" in page.locator("pre").inner_text()


def test_a_long_run_of_a_large_model_stays_under_two_megabytes(tmp_path):
    """Eight noise images before and after training, 111 tokens, and as many layers as `report_maps`
    takes."""
    count = MAX_MAP_CHARACTERS // (12 * 12 * 111)
    shape = dict(layers=range(count), words=["word"] * 111, grid=(12, 12), tokens=111)
    big = make_result([[1, 2, 3]] * count, **shape)
    path, examples = make_run(tmp_path, [big] * 8, [big] * 8, steps=1000)
    examples = [Example(Image.effect_noise((900, 700), 80), "?", "!", [(0, 0, 9, 9)])] * 8
    save_report(path, examples)
    assert (path / "report.html").stat().st_size < 2e6


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
    text = (tmp_path / "report.html").read_text()
    assert "of 3 steps: not finished" in text
    assert len(json.loads(text.split('id="data">')[1].split("</script>")[0])) == 2


def test_a_map_is_one_character_per_cell():
    # square roots: 0, 1/2, 1, 0.707
    assert pack_map([0.0, 0.25, 1.0, 0.5]) == [1.0, "0" + LEVELS[32] + "_" + LEVELS[45]]
    assert pack_map([0.0, 0.0]) == [0.0, "00"]
    assert len(set(LEVELS)) == 64


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
