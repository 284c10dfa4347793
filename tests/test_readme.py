"""The README's own code: its worked example runs, and the lines it quotes are the program's."""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^ *```python\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)


def test_the_worked_example_runs():
    (example,) = [block for block in BLOCKS if ">>>" in block]
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 10 and result.failed == 0


def test_lines_quoted_are_lines_of_the_program():
    source = {line.strip() for name in ("model", "attention", "reward", "data", "sayo_mini") for line in
              (ROOT / f"{name}.py").read_text().splitlines()}  # fmt: skip
    quoted = [line.strip() for block in BLOCKS if ">>>" not in block for line in block.splitlines()]
    assert len(quoted) >= 8 and set(quoted) <= source


def test_every_metric_and_file_of_the_tables_exists():
    """Names in "What is where" are files; names that the README calls flags are flags."""
    listed = README.split("## What is where")[1].split("```")[1]
    for line in listed.strip().splitlines():
        for name in line[:22].replace(",", " ").split():
            assert (ROOT / name).exists(), name
    program = "".join((ROOT / name).read_text() for name in ("config.py", "evaluate.py", "sayo_mini.py"))
    for flag in set(re.findall(r"python sayo_mini\.py[^`\n]*", README)):
        for name in re.findall(r"--(?:no-)?(\w+)", flag):
            assert name == "help" or f" {name}: " in program or f'"--{name}"' in program, name
