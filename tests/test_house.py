"""The layout of the repository: what a run loads, and which module imports which.

`pytest -s tests/test_house.py` prints the modules and lines that a default run loads.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in (".", "extras", "study")
    for path in sorted((ROOT / folder).glob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported_modules(nodes):
    """The modules of this repository and others that these AST nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: this test cannot resolve it"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
    return names


def runs_at_import(tree):
    """The AST nodes of a module outside its functions."""
    nodes = list(tree.body)
    for node in nodes:  # grows while iterating
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return nodes


AT_IMPORT = {name: imported_modules(runs_at_import(tree)) for name, tree in TREES.items()}


def loaded_with(module):
    """The modules that importing this module loads, directly and indirectly. Modules outside this
    repository are listed, but their imports are not followed."""
    found, queue = {module}, [module]
    while queue:
        new = AT_IMPORT.get(queue.pop(), set()) - found
        found |= new
        queue += new
    return found


# scenes.py is loaded when the default run opens its data, in a function of data.py.
RUN = (loaded_with("sayo_mini") | loaded_with("scenes")) & set(MODULES)


def test_a_default_run_loads_the_top_level_and_no_more():
    lines = {name: len(MODULES[name].read_text().splitlines()) for name in sorted(RUN)}
    print("", *(f"{name:12}{count:>6}" for name, count in lines.items()), sep="\n")
    print(f"{len(RUN)} modules, {sum(lines.values())} lines before the table")
    assert RUN == {name for name in MODULES if "." not in name}


def test_arrows_point_from_study_to_extras_to_the_top_level():
    for name in MODULES:
        folders = {each.split(".")[0] for each in loaded_with(name) - {name} if "." in each}
        if "." not in name:
            assert not folders & {"extras", "study"}, name
        elif name.startswith("extras."):
            assert "study" not in folders, name


def test_imports_have_no_cycle():
    for name in MODULES:
        for other in AT_IMPORT[name] & set(MODULES):
            assert name not in loaded_with(other), f"{name} and {other} import each other"


def test_reward_and_data_can_be_used_alone():
    outside = {name.split(".")[0] for name in AT_IMPORT["reward"]} - sys.stdlib_module_names
    assert outside == {"torch"}
    loaded = {name.split(".")[0] for name in loaded_with("data")} - sys.stdlib_module_names
    assert loaded == {"data", "config", "torch", "PIL"}


@pytest.mark.slow
def test_a_run_loads_extras_only_after_its_table(tmp_path):
    """Records, in a real run, which modules of extras/ are loaded before the table is printed."""
    code = "import sys, sayo_mini\nprint_table = sayo_mini.results_table\n"
    code += "def results_table(*args):\n"
    code += "    print([m for m in sys.modules if m.startswith('extras')], file=sys.stderr)\n"
    code += "    return print_table(*args)\n"
    code += "sayo_mini.results_table = results_table\nsys.exit(sayo_mini.main(sys.argv[1:]))"
    flags = ["--max_steps", "0", "--eval_examples", "2", "--device", "cpu"]
    command = [sys.executable, "-c", code, *flags, "--output_dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr.splitlines()[-1] == "[]", process.stderr


@pytest.mark.parametrize(
    "flags, exit_code",
    [
        ("--help", 0),
        ("look --help", 0),
        ("probe --help", 0),
        ("check --help", 0),
        ("fit --help", 0),
        ("--learning_rat 1", 2),
        ("--beta much", 2),
        ("look", 2),
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
