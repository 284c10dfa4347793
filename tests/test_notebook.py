"""docs/tour.ipynb runs, and its committed outputs are complete, small and free of local paths."""

import re

import nbformat
import pytest

from study.tour import NOTEBOOK, digest, execute

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


def printed(cell):
    return "".join(output.get("text", "") for output in cell.get("outputs", ()))


def test_committed_outputs_are_complete_small_and_without_local_paths():
    cells = code_cells(COMMITTED)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind for cell in cells for kind in output_kinds(cell)]
    assert set(kinds) == {"image/png", "image/svg+xml", "stdout"}
    assert kinds.count("image/png") == 7 and kinds.count("image/svg+xml") == 1
    assert COMMITTED.metadata["source"] == digest(COMMITTED), "run python study/tour.py"
    assert NOTEBOOK.stat().st_size < 700_000
    for cell in COMMITTED.cells:
        assert not LOCAL.search(cell.source + printed(cell)), cell.id
    assert LOCAL.search("a file in /home/me")


@pytest.mark.slow
def test_every_cell_runs_and_the_cells_for_a_gpu_run_their_commands(tmp_path):
    """The last cells only think that there is a GPU: their commands train the tiny model."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    gpu = [cell for cell in notebook.cells if cell.id in ("gpu-train", "gpu-look")]
    for cell in gpu:
        for old, new in (("runs/", f"{tmp_path}/"), ("_steps 40", "_steps 1"), ("les 32", "les 2")):
            cell.source = cell.source.replace(old, new)
    gpu[0].source = "torch.cuda.is_available = lambda: True\n" + gpu[0].source
    execute(notebook)
    rest = [cell for cell in code_cells(notebook) if cell not in gpu]
    shown = {cell.id: output_kinds(cell) for cell in code_cells(COMMITTED)}
    assert all(output_kinds(cell) == shown[cell.id] for cell in rest)
    assert "held-out examples: 2" in printed(gpu[0])
    assert "after training: " in printed(gpu[1]) and "image/png" in output_kinds(gpu[1])
