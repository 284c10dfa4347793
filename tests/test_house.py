"""The layout of the repository: what a run loads, and which module imports which.

`pytest -s tests/test_house.py` prints the modules and lines that a default run loads.
"""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

TOP = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
FOLDERS = {"extras", "study"}


def loaded_by(code):
    """The names of all modules that this code loads in a new process."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split())


def test_a_default_run_loads_the_top_level_and_no_more():
    """Its data are scenes, so it does not load the reader of files."""
    code = "import config, sayo_mini\nsayo_mini.load_datasets(config.build_config({}))"
    names = loaded_by(code)
    lines = {name: len(TOP[name].read_text().splitlines()) for name in TOP if name in names}
    print("", *(f"{name:12}{count:>6}" for name, count in lines.items()), sep="\n")
    print(f"{len(lines)} modules, {sum(lines.values())} lines before the table")
    assert lines.keys() == TOP.keys() - {"json_lines"} and not names & FOLDERS


def test_arrows_point_from_study_to_extras_to_the_top_level():
    for path in (*TOP.values(), *(ROOT / "extras").glob("*.py")):
        assert not re.search(r"^\s*(from|import) study\b", path.read_text(), re.MULTILINE), path


def test_reward_and_data_can_be_used_alone():
    assert not loaded_by("import reward") & {*TOP, "transformers", "PIL"} - {"reward"}
    names = loaded_by("import data")
    assert names & TOP.keys() == {"data", "config"} and "transformers" not in names


@pytest.mark.slow
def test_a_run_loads_extras_only_after_its_table(tmp_path):
    """Records, in a real run, which modules of extras/ are loaded before the table is printed."""
    code = "import sys, sayo_mini\nprint_table = sayo_mini.results_text\n"
    code += "def results_text(*args):\n"
    code += "    print([m for m in sys.modules if m.startswith('extras')], file=sys.stderr)\n"
    code += "    return print_table(*args)\n"
    code += "sayo_mini.results_text = results_text\nsys.exit(sayo_mini.main(sys.argv[1:]))"
    flags = ["--max_steps", "0", "--eval_examples", "2", "--device", "cpu"]
    command = [sys.executable, "-c", code, *flags, "--output_dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr.splitlines()[-1] == "[]", process.stderr


@pytest.mark.parametrize(
    "flags, exit_code",
    [
        ("--help", 0),
        ("fit --help", 0),
        ("--learning_rat 1", 2),
        ("check", 2),
    ],
)
def test_help_and_bad_flags_do_not_load_torch(flags, exit_code):
    command = [sys.executable, "-X", "importtime", "sayo_mini.py", *flags.split()]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().split(".")[0] for line in lines}
    assert process.returncode == exit_code, process.stderr
    assert "argparse" in packages  # the list is not empty
    assert not packages & {"torch", "transformers", "peft", "numpy", "PIL"}
    if exit_code == 0:
        assert process.stdout.startswith("usage: sayo_mini.py ")
    else:
        assert process.stderr.splitlines()[-1].startswith("sayo_mini.py: ")
