"""The command `compare`: several runs on one page, without loading torch."""

import json
import re
import subprocess
import sys

import pytest
from test_house import ROOT, loaded_packages
from test_html_report import AFTERS, BEFORES, OLD_BEFORE, lines_of

import sayo_mini
from analysis.results_table import table_rows
from config import Config
from runtime.settings import stored_settings


def make_run(folder, values, before=None, after=None, **settings):
    """A folder with the files that `compare` reads. Args: values of `kl`, one per step."""
    folder.mkdir(parents=True)
    settings = stored_settings(Config(output_dir=str(folder), **settings))
    (folder / "config.json").write_text(json.dumps(settings))
    rows = [{"step": i + 1, "kl": kl, "ratio": 1.0} for i, kl in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, results in (("before", before), ("after", after)):
        if results:
            (folder / f"{name}.json").write_text(json.dumps(results))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """A finished run, and one of an earlier version that is not finished."""
    return [
        make_run(tmp_path / "a", [0.0, 0.5, 1.0], BEFORES, AFTERS),
        make_run(tmp_path / "b <i>", [0.0, None], [OLD_BEFORE], seed=1, adapter="x"),
    ]


@pytest.fixture
def text(runs, tmp_path):
    assert sayo_mini.main(["compare", *runs, "--output", str(tmp_path / "c.html")]) == 0
    return (tmp_path / "c.html").read_text()


def cells(text, title):
    """The rows of the first table after a heading, as lists of text."""
    table = re.search("<table>(.*?)</table>", text[text.index(title) :])[1]
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_every_metric_is_a_chart_with_a_line_per_run(text):
    charts = re.findall("<svg.*?</svg>", text)
    assert len(charts) == 1 and "Constant in all runs: ratio 1." in text
    styles = lines_of(charts[0])
    assert list(styles) == ["a", "b <i>"]
    assert len({dash for _, dash in styles.values()}) == 2  # differ without color
    lines = re.findall('<polyline [^>]*points="([^"]*)"', charts[0])
    assert [len(line.split()) for line in lines] == [3, 1]


def test_the_settings_that_differ_are_listed(text):
    assert cells(text, "Settings that differ") == [
        ["setting", "a", "b &lt;i&gt;"],
        ["--adapter", "none", "x"],
        ["--seed", "0", "1"],
    ]


def test_equal_settings_and_a_missing_one(tmp_path, runs):
    same = make_run(tmp_path / "same", [1.0])
    page = tmp_path / "c.html"
    assert sayo_mini.main(["compare", runs[0], same, "--output", str(page)]) == 0
    assert "All settings are the same." in page.read_text()
    path = tmp_path / "same" / "config.json"  # of a version without --cuda_graph
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "cuda_graph"}))
    assert sayo_mini.main(["compare", runs[0], same, "--output", str(page)]) == 0
    assert ["--cuda_graph", "False", "-"] in cells(page.read_text(), "Settings that differ")


def test_results_are_side_by_side(text):
    header, *rows = cells(text, "<h2>Results")
    assert header[1:] == ["a: before", "a: after", "b &lt;i&gt;: before", "b &lt;i&gt;: after"]
    assert rows[0] == ["number of questions", "3", "3", "1", "-"]
    a, b = table_rows(BEFORES, AFTERS), table_rows([OLD_BEFORE], [OLD_BEFORE])
    assert rows[1] == ["greedy accuracy", *a["correct"][1:3], b["correct"][1], "-"]
    looks = [row for row in rows if row[0] == "early look on the region"]
    assert looks == [["early look on the region", *a["early"][1:3], "-", "-"]]  # an older run
    assert len(rows) == 1 + len(a)
    states = [row[2] for row in cells(text, "<h1>")[1:]]
    assert states == ["3 of 200 steps, finished", "2 of 200 steps, not finished"]


def test_folders_with_the_same_name_keep_their_paths(tmp_path):
    folders = [make_run(tmp_path / x / "run", [0.0, 1.0]) for x in "ab"]
    assert sayo_mini.main(["compare", *folders, "--output", str(tmp_path / "c.html")]) == 0
    (chart,) = re.findall("<svg.*?</svg>", (tmp_path / "c.html").read_text())
    assert list(lines_of(chart)) == folders


def damage(folder, name, content):
    (folder / name).write_text(content)


NONE = r"no run found \(there is no such folder\)"


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda a: [str(a), str(a / "nowhere")], f"nowhere: {NONE}"),
        (lambda a: [str(a), str(a.parent)], r"no run found \(config.json is missing\)"),
        (lambda a: [str(a)], "at least two different runs"),
        (lambda a: [str(a), f"{a}/../a"], "at least two different runs"),
        (lambda a: damage(a, "metrics.jsonl", '{"step": 1}\n{"st'), "metrics.jsonl is damaged"),
        (lambda a: damage(a, "metrics.jsonl", "[1]\n"), "metrics.jsonl is damaged"),
        (lambda a: damage(a, "after.json", '[{"correct": 1}]'), "after.json is damaged"),
        (lambda a: damage(a, "config.json", "{"), "config.json is damaged"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, monkeypatch, break_it, message):
    monkeypatch.chdir(tmp_path)
    given = break_it(tmp_path / "a") or runs
    assert sayo_mini.main(["compare", *given]) == 2
    out, err = capsys.readouterr()
    assert re.search(message, err) and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "compare.html").exists()


def test_a_bad_output_is_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output, message in (("x.png", "must end in .html"), ("no/x.html", "No such file")):
        assert sayo_mini.main(["compare", *runs, "--output", output]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sayo_mini.py: --output {output}: {message}")
        assert error.count("\n") == 1


def test_torch_is_not_loaded(runs, tmp_path):
    process, packages = loaded_packages("compare", *runs, "--output", str(tmp_path / "c.html"))
    assert process.returncode == 0 and process.stdout.startswith("wrote ")
    assert "argparse" in packages and not packages & {"torch", "transformers", "numpy", "PIL"}
    assert (tmp_path / "c.html").exists()
    process = subprocess.run(
        [sys.executable, "sayo_mini.py", "compare", *runs[:1], "nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and process.stderr.count("\n") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen_and_its_lines_have_colors(browser, text, tmp_path, width, scheme):
    tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto((tmp_path / "c.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    strokes = "x => x.map(line => getComputedStyle(line).stroke)"
    colors = tab.locator("polyline").evaluate_all(strokes)
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert len({*colors, background}) == 3
    tab.close()
    assert messages == []
