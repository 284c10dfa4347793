"""study/gpu.sh: the small form runs on a CPU, and a part that fails does not stop the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def gpu(folder, *flags, **settings):
    """Returns: the finished process, and the lines of parts.txt."""
    env = os.environ | {"OUTPUT": str(folder), "HF_HUB_OFFLINE": "1"} | settings
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = ["bash", "study/gpu.sh", *flags]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return process, (folder / "parts.txt").read_text().splitlines()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    """Without a card, all tests are skipped, and pytest reports success."""
    process, parts = gpu(tmp_path, PARTS="train tests", MODEL=str(tmp_path / "nowhere"))
    assert process.returncode == 1 and "failed: train; see" in process.stdout
    assert [line.split(",")[0] for line in parts] == ["tests: exit code 0", "train: exit code 2"]
    assert "nowhere" in (tmp_path / "train.log").read_text()
    assert "Python 3" in (tmp_path / "machine.txt").read_text()


def test_the_small_form_runs_every_part_on_a_cpu(tmp_path):
    process, parts = gpu(tmp_path, "--small")
    assert process.returncode == 0, process.stdout + process.stderr
    print(*parts, sep="\n")
    names = [line.split(":")[0] for line in parts]
    assert names == ["tests", "step", "kill", "train"]
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "step.json").exists() and (tmp_path / "kill.json").exists()
