"""The layout of the repository: what a run loads, and which module imports which.

`pytest -s tests/test_house.py` prints the modules and lines that a default run loads.
"""

import re

from conftest import ROOT, run_python

TOP = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
FOLDERS = {"extras", "study"}


def loaded_by(code):
    """The names of all modules that this code loads in a new process."""
    process = run_python("-c", f"{code}\nimport sys\nprint(*sys.modules)")
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
    """The subcommands, and the report at the end of `train`, are imported where they are called."""

    def imports(folder, paths):
        pattern = rf"^ *(?:from|import) {folder}\b"
        return [path.stem for path in paths for _ in re.findall(pattern, path.read_text(), re.M)]

    assert imports("extras", TOP.values()) == ["config", "sayo_mini", "sayo_mini"]
    assert not imports("study", [*TOP.values(), *(ROOT / "extras").glob("*.py")])


def test_reward_and_data_can_be_used_alone():
    assert not loaded_by("import reward") & {*TOP, "transformers", "PIL"} - {"reward"}
    names = loaded_by("import data")
    assert names & TOP.keys() == {"data", "config"} and "transformers" not in names
