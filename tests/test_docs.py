"""README and docs: their code runs; the lines, links, flags, files and metrics in them exist."""

import doctest
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT, load, trained
from PIL import Image

from config import FIELDS, build_config, parse_command_line
from data import load_datasets, step_examples
from json_lines import JsonLines
from reward import accuracy_reward
from sayo_mini import train_step

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "study" / "README.md"]
TEXT = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT[ROOT / "README.md"]
FOLDERS = {"extras/", "study/", "tests/", "docs/"}
LAUNCHERS = "gpu_ids num_processes multi_gpu use_deepspeed zero_stage nproc_per_node".split()
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_worked_example_runs():
    (example,) = [block for block in code_blocks(README) if ">>>" in block]
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 9 and result.failed == 0


def test_the_page_on_data_converts_vstar_bench(tmp_path, monkeypatch):
    """Run its code on two questions in the layout of V*Bench."""
    monkeypatch.chdir(tmp_path)
    options = ["The glove is red.", "The glove is blue."]  # the first one is right
    layout = {"direct_attributes": [[3, 5, 8, 9]], "relative_position": [[0, 0, 9, 9]] * 2}
    for folder, boxes in layout.items():
        path = tmp_path / "vstar_bench" / folder / "sa_1.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (60, 40), len(boxes)).save(path)
        old = {"target_object": ["glove"], "question": "Which color?", "options": options}
        path.with_suffix(".json").write_text(json.dumps(old | {"bbox": boxes}))
    blocks = code_blocks(TEXT[ROOT / "docs" / "data.md"])
    (code,) = [block for block in blocks if "vstar.jsonl" in block and "import" in block]
    assert len(code.splitlines()) <= 15
    exec(code, {})
    one, two = JsonLines("vstar_bench/vstar.jsonl")
    assert one.question == "Which color?\nA. The glove is blue.\nB. The glove is red."
    assert one.boxes == [[3, 5, 11, 14]] and len(two.boxes) == 2
    for text in ("B", "the glove is red", "B. The glove is red."):
        assert accuracy_reward(f"<answer>{text}</answer>", one.answer)
    assert not accuracy_reward("<answer>A</answer>", one.answer)


def test_the_page_on_extending_reads_attention(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = code_blocks(TEXT[ROOT / "docs" / "extending.md"])
    (code,) = [block for block in blocks if "trace_attention" in block]
    exec(code.replace("sayo_mini.", ""), {})
    assert "<answer>" in (out := capsys.readouterr().out) and out.endswith(", 49]) (7, 7)\n")


def test_quoted_lines_are_lines_of_the_program():
    files = [path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")]
    lines = {line.strip() for file in files for line in file.splitlines()}
    steps = README.split("## The algorithm in eight steps")[1].split("```")[0]
    code = [span for span in re.findall(r"`([^`]+)`", steps) if " = " in span or "return" in span]
    assert len(code) == 7 and set(code) <= lines, set(code) - lines


@every_page
def test_links_and_names_of_files_resolve(page):
    """All linked files and headings exist, and all files of this repository that a page names."""
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", TEXT[page]):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", TEXT[file], re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, target
    names = re.findall(r"`(\w+\.py|(?:extras|study|tests|tiny|example|docs)/[\w./]*)`", TEXT[page])
    for name in names:
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@every_page
def test_commands_parse_and_flags_exist(page):
    """The command line accepts every command of sayo_mini.py in a code block."""
    for block in code_blocks(TEXT[page]):
        for words in re.findall(r"python sayo_mini\.py(.*)", block.replace("\\\n", " ")):
            parse_command_line(shlex.split(words.split("&&")[0], comments=True))
    scripts = [*ROOT.glob("extras/*.py"), *ROOT.glob("study/*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in scripts)
    added = re.findall(r'"--(\w+)', code)
    named = re.findall(r"`(--\w[^`\n]*)`", TEXT[page])
    commands = re.findall(r"(?:sayo_mini|\w+/\w+)\.py([^`\n]*)", TEXT[page])
    for flag in re.findall(r"--(?:no-)?(\w+)", " ".join(named + commands)):
        assert flag in {*FIELDS, *added, *LAUNCHERS, "help"}, flag


def test_the_reading_table_has_every_file_of_the_top_level():
    table = README.split("## Which file to read")[1].split("## ")[0]
    names = re.findall(r"^\| `(.+?)` ", table, re.MULTILINE)
    assert set(names) == {path.name for path in ROOT.glob("*.py")} | FOLDERS


def test_logging_explains_every_metric_of_a_step():
    flags = {"model_name_or_path": str(ROOT / "tiny"), "prompts_per_step": 1, "num_generations": 2}
    cfg, vlm = build_config(flags), load()
    optimizer = torch.optim.AdamW(trained(vlm).values())
    examples = step_examples(load_datasets(cfg)[0], 0, cfg)
    row, _ = train_step(vlm, examples, cfg, optimizer, torch.Generator().manual_seed(0))
    page = TEXT[ROOT / "docs" / "logging.md"].split("**Rewards.**")[1].split("**Time**")[0]
    names = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)  # one or several
    explained = re.findall(r"`(.+?)`", " ".join(names))
    assert sorted(explained) == sorted([*row, "step", "learning_rate"])
