"""Execute docs/tour.ipynb on the CPU and save it with its outputs, which are committed.

    python study/tour.py

Run it after a change to the notebook. `tests/test_notebook.py` executes the notebook as well, and
checks that the committed outputs belong to the committed cells.
"""

import hashlib
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(notebook):
    """Execute a notebook in place, in the folder docs/. Raises: CellExecutionError if a cell
    fails."""
    client = NotebookClient(
        notebook,
        timeout=600,  # seconds per cell
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        record_timing=False,  # times would differ in every commit
        coalesce_streams=True,
    )
    # With a GPU, the last cells would download a large model. One thread is enough for the tiny
    # model; two wait for each other on a busy machine.
    client.execute(env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    # The kernel adds its versions, which would also differ.
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    notebook.metadata = metadata | {"source": digest(notebook)}


def digest(notebook):
    """A checksum of the code cells."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:16]


if __name__ == "__main__":
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook)
    nbformat.write(notebook, NOTEBOOK)
