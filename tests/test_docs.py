"""README and docs: their code runs, and the lines, links and flags in them exist."""

import csv
import doctest
import re
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

from config import Config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]
README = PAGES[0].read_text()


def code_blocks(text, language="python"):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def test_the_worked_example_runs():
    (example,) = [block for block in code_blocks(README) if ">>>" in block]
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 10 and result.failed == 0


def test_quoted_lines_are_lines_of_the_program():
    names = ("model", "attention", "reward", "data", "sayo_mini")
    text = "".join((ROOT / f"{name}.py").read_text() for name in names)
    source = {line.strip() for line in text.splitlines()}
    blocks = [block for block in code_blocks(README) if ">>>" not in block]
    quoted = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(quoted) >= 8 and set(quoted) <= source, set(quoted) - source


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    """All linked files and headings exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Check every flag in our command lines and in backticks."""
    known = {field.name for field in fields(Config)} | {
        "help",
        "image",
        "question",
        "box",
        "output",
    }
    text = page.read_text()
    commands = re.findall(r"(?:python sayo_mini\.py|scale_trl\.py)([^`\n]*)", text)
    named = re.findall(r"`(--\w[^`\n]*)`", text)
    launcher = {"gpu_ids", "num_processes", "multi_gpu", "use_deepspeed", "zero_stage"}
    bench = {"results", "report", "quick", "points", "shapes", "shape", "kills", "rounds"}
    bench |= {"only", "steps_only"}
    tiny = {"careless_steps", "start_from", "see_steps"}
    old = {"probe", "check_dataset", "prompt_tokens", "small", "deterministic"}
    for text in commands + named:
        for flag in re.findall(r"--(?:no-)?(\w+)", text):
            assert flag in known | launcher | bench | tiny | old, flag


def test_files_of_the_reading_table_exist():
    table = README.split("## Which file to read")[1].split("\n## ")[0]
    names = re.findall(r"`([\w/]+(?:\.py|/))`", table)
    assert len(names) >= 12
    for name in names:
        assert (ROOT / name).exists(), name


def test_the_reader_in_extending_works(tmp_path):
    blocks = code_blocks((ROOT / "docs" / "extending.md").read_text())
    (reader,) = [block for block in blocks if block.startswith("# sources/csv_file.py")]
    namespace = {}
    exec(reader, namespace)
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    rows = [["image", "question", "answer", "boxes"], ["a.png", "What?", "red", "[[0, 0, 5, 5]]"]]
    with open(tmp_path / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = namespace["Csv"](tmp_path / "set.csv")
    assert len(data) == 1 and data[0].answer == "red" and data[0].boxes == [[0, 0, 5, 5]]
