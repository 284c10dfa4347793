"""docs/tour.ipynb runs, and its committed outputs are complete, small and free of local paths."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from bench.tour import NOTEBOOK, digest, execute

ROOT = Path(__file__).parent.parent
MAX_BYTES = 700_000
COMMITTED = nbformat.read(NOTEBOOK, as_version=4)
LOCAL = re.compile(r"/(home|root|tmp|work|Users|mnt|opt|usr|var|content)/|[A-Z]:\\")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_kinds(cell):
    """The kinds of a cell's outputs, e.g. ["stdout", "image/png"]."""
    kinds = []
    for output in cell.outputs:
        data = [kind for kind in output.get("data", {}) if kind != "text/plain"]
        kinds += data or [output.get("name", output.output_type)]
    return kinds


# --- as committed ---


def test_committed_outputs_are_complete_and_in_order():
    cells = code_cells(COMMITTED)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for kind in output_kinds(cell)]
    assert kinds.count("image/png") == 5 and kinds.count("image/svg+xml") == 2
    assert set(kinds) == {"image/png", "image/svg+xml", "stdout"}  # no errors, no warnings


def test_committed_outputs_belong_to_the_committed_cells():
    assert COMMITTED.metadata["source"] == digest(COMMITTED), "run python bench/tour.py"


def test_notebook_is_small():
    assert NOTEBOOK.stat().st_size < MAX_BYTES


def test_notebook_contains_no_local_path():
    for text in texts(COMMITTED):
        assert not LOCAL.search(text), text
    assert len(list(texts(COMMITTED))) > 30 and LOCAL.search("a file in /home/me")


def texts(notebook):
    """All text of a notebook, without its pictures."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if "png" not in kind)


# --- executed ---


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_was_committed(tmp_path):
    """By the script that saves it. Numbers may differ on another machine, kinds of output may
    not."""
    output = tmp_path / "tour.ipynb"
    command = [sys.executable, "bench/tour.py", "--output", str(output)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "tour.ipynb: executed in" in process.stdout
    executed = nbformat.read(output, as_version=4)
    shown, committed = ([output_kinds(c) for c in code_cells(n)] for n in (executed, COMMITTED))
    assert shown == committed
    assert executed.metadata == COMMITTED.metadata
    assert output.stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_cells_for_a_gpu_run_their_commands(tmp_path):
    """On the CPU, where the program trains the tiny model: the cells only think that there is a
    GPU."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    chosen = [c for c in code_cells(notebook) if c.id in ("setup", "question")]
    gpu = [c for c in code_cells(notebook) if c.id in ("gpu-train", "gpu-look")]
    assert len(chosen) == len(gpu) == 2
    for cell in gpu:
        for old, new in (("runs/", f"{tmp_path}/"), ("_steps 40", "_steps 1"), ("les 32", "les 2")):
            cell.source = cell.source.replace(old, new)
    pretend = nbformat.v4.new_code_cell("torch.cuda.is_available = lambda: True")
    notebook.cells = [*chosen, pretend, *gpu]
    execute(notebook)
    trained, looked = (texts(nbformat.v4.new_notebook(cells=[cell])) for cell in gpu)
    assert "held-out examples: 2" in "".join(trained)
    assert "after training: " in "".join(looked) and "image/png" in output_kinds(gpu[1])
