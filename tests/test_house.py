"""The layout of the repository: lengths of files and functions, and imports between modules.

`pytest -s tests/test_house.py` prints the table of files and lines.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = {
    "sayo_mini.py": 260,
    "config.py": 150,
    "model.py": 300,
    "attention.py": 130,
    "reward.py": 190,
    "data.py": 120,
    "checkpoint.py": 280,
    "scale_trl.py": 150,
}
FOLDERS = "sources", "analysis", "commands", "runtime"
MAX_FUNCTION_LINES = 60
MAX_README_LINES = 220
MAX_README_CHARACTERS = 15_000


def find_modules():
    """{name: path} of every module at the top level and in FOLDERS; packages are listed by name."""
    paths = sorted(ROOT.glob("*.py"))
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).glob("*.py"))
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths)}


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


# --- lines ---


def test_files_are_no_longer_than_planned():
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in MAX_LINES}
    for name, count in counts.items():
        print(f"{name:14}{count:>5} of {MAX_LINES[name]} lines")
    print(f"{'total':14}{sum(counts.values()):>5}")
    assert {n: c for n, c in counts.items() if c > MAX_LINES[n]} == {}


def test_top_level_has_no_other_modules():
    assert {path.name for path in ROOT.glob("*.py")} == set(MAX_LINES)


def test_top_level_does_not_disable_ruff_format():
    for name in MAX_LINES:
        text = (ROOT / name).read_text()
        assert "fmt: skip" not in text and "fmt: off" not in text, name


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    lines, characters = len(text.splitlines()), len(text)
    print(f"README.md {lines} of {MAX_README_LINES} lines", end=", ")
    print(f"{characters} of {MAX_README_CHARACTERS} characters")
    assert lines <= MAX_README_LINES and characters <= MAX_README_CHARACTERS


def test_functions_are_short():
    too_long = {
        f"{module}.{node.name}": length
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert too_long == {}


# --- imports ---


def imported_modules(nodes):
    """The modules that these AST nodes import. `from sources import trl` counts as `sources` and
    `sources.trl`, because importing a module also runs its package."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: these tests cannot resolve it"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
    return names | {name.rpartition(".")[0] for name in names if name in MODULES} - {""}


def runs_at_import(tree):
    """The AST nodes of a module outside its functions."""
    nodes = list(tree.body)
    for node in nodes:  # grows while iterating
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return nodes


TOP_LEVEL_IMPORTS = {name: imported_modules(runs_at_import(tree)) for name, tree in TREES.items()}
ALL_IMPORTS = {name: imported_modules(ast.walk(tree)) for name, tree in TREES.items()}


def outside_the_standard_library(modules):
    return {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names}


def loaded_with(module):
    """The modules that importing this module loads, directly and indirectly. Modules outside this
    repository are listed, but their imports are not followed."""
    found, queue = set(), [module]
    while queue:
        new = TOP_LEVEL_IMPORTS.get(queue.pop(), set()) - found
        found |= new
        queue += new
    return found


def test_reward_imports_only_torch():
    assert outside_the_standard_library(TOP_LEVEL_IMPORTS["reward"]) == {"torch"}


def test_config_and_parser_need_only_the_standard_library():
    assert outside_the_standard_library(loaded_with("config")) == set()
    assert outside_the_standard_library(TOP_LEVEL_IMPORTS["runtime"]) == set()
    assert outside_the_standard_library(loaded_with("runtime.parser")) <= set(MODULES)


def test_data_imports_neither_model_nor_transformers():
    loaded = loaded_with("data")
    assert "model" not in loaded
    assert not {name for name in loaded if name.split(".")[0] == "transformers"}


def test_only_scale_trl_imports_the_loop():
    """All other functions that need the loop receive it as an argument."""
    importers = {name for name, imports in ALL_IMPORTS.items() if "sayo_mini" in imports}
    assert importers == {"scale_trl"}


def test_top_level_imports_have_no_cycle():
    cycles = {name for name in MODULES if name in loaded_with(name)}
    assert cycles == set()


# --- what the command line loads ---


def loaded_packages(*flags):
    """Run the command. Returns: (the process, the packages that Python loaded for it)."""
    command = [sys.executable, "-X", "importtime", "sayo_mini.py", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in process.stderr.splitlines() if line.startswith("import time:")]
    return process, {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


@pytest.mark.parametrize(
    "flags, exit_code",
    [
        ("--help", 0),
        ("train --help", 0),
        ("look --help", 0),
        ("probe --help", 0),
        ("check --help", 0),
        ("fit --help", 0),
        ("compare --help", 0),
        ("--learning_rat 1", 2),
        ("--beta much", 2),
        ("look", 2),
        ("check", 2),
        ("compare", 2),
        ("compare nowhere nothing", 2),
    ],
)
def test_help_and_bad_flags_do_not_load_torch(flags, exit_code):
    process, packages = loaded_packages(*flags.split())
    assert process.returncode == exit_code, process.stderr
    assert "argparse" in packages  # the list is not empty
    assert not packages & {"torch", "transformers", "peft", "numpy", "PIL"}
    if exit_code == 0:
        command = flags.removesuffix("--help").removeprefix("train ")
        assert process.stdout.startswith(f"usage: python sayo_mini.py {command}[--flag ")
    else:
        assert process.stderr.splitlines()[-1].startswith("sayo_mini.py: ")
