"""study/gpu.py: the small form runs every part on a CPU, and a part that fails stops no other."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def gpu(folder, *flags):
    """Returns: the exit code and gpu.json."""
    command = [sys.executable, "study/gpu.py", str(folder), "1500", "--small", *flags]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return process.returncode, json.loads((folder / "gpu.json").read_text())


def test_the_small_form_runs_every_part_on_a_cpu(tmp_path):
    code, found = gpu(tmp_path)
    assert list(found) == ["card", "tests", "decode", "step", "tiny", "trl"]
    assert code == 0, found
    assert found["card"]["torch"] and "passed" in found["tests"]["last"][0]
    for row in (*found["decode"].values(), found["step"]["graph, P 384"]):
        assert not isinstance(row, dict) or "error" not in row
    assert 0 < found["tiny"]["after"]["auroc"] < 1 and found["trl"]["P 60, C 4, G 2"]["ours"]["s"]


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")  # `card` imports it first
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, found = gpu(tmp_path / "out", "card", "trl")
    assert code == 1 and list(found) == ["card", "trl"]
    assert "broken" in found["card"]["failed"]
