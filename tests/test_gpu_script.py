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
    assert len(found["decode"]) == 5 and "s" in found["decode"]["graph and dequantized, 4 rows"]
    assert found["step"]["graph, P 384"][0]["update"] > 0
    assert 0 < found["tiny"]["auroc after"] < 1
    assert found["trl"]["trl, P, C, G = (60, 4, 2)"]["s"][0] > 0


def test_a_part_that_fails_stops_no_other_and_keeps_what_it_found(tmp_path, monkeypatch):
    (tmp_path / "pytest.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, found = gpu(tmp_path / "out", "tests", "card")
    assert code == 1 and found["card"]["exit"] == 0 and found["tests"]["exit"] == 1
    assert found["tests"]["failed tests"] == [] and "broken" in found["tests"]["failed"]
