"""bench/gpu.sh: the small form runs on a CPU, and a part that fails is recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def record(folder, *command):
    script = [sys.executable, "bench/record.py", str(folder), "part", *command]
    process = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    return process, json.loads((folder / "part.json").read_text())


def test_a_part_is_recorded_with_machine_and_versions(tmp_path):
    process, found = record(tmp_path, sys.executable, "-c", "print('some output')")
    assert process.returncode == found["exit_code"] == 0
    assert found["output"] == (tmp_path / "part.log").read_text() == "some output\n"
    assert "some output" in process.stdout and "part: done in" in process.stdout
    assert {"processor", "cores", "torch", "transformers", "card"} <= found["machine"].keys()


@pytest.mark.parametrize("command, code", [(["false"], 1), (["/no/such/program"], 127)])
def test_a_part_that_fails_is_recorded(tmp_path, command, code):
    process, found = record(tmp_path, *command)
    assert process.returncode == found["exit_code"] == code
    assert f"part: FAILED ({code})" in process.stdout and found["machine"]["torch"]


def gpu(folder, *flags, **settings):
    env = os.environ | {"OUTPUT": str(folder), "HF_HUB_OFFLINE": "1"} | settings
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = ["bash", "bench/gpu.sh", *flags]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return process, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    """Without a card, all tests are skipped, and pytest reports success."""
    process, found = gpu(tmp_path, PARTS="train tests", MODEL=str(tmp_path / "nowhere"))
    assert process.returncode == 1 and "failed: train; see" in process.stdout
    assert found["train"]["exit_code"] == 2 and "nowhere" in found["train"]["output"]
    assert found["tests"]["exit_code"] == 0


@pytest.mark.slow
def test_the_small_form_runs_every_part_on_a_cpu(tmp_path):
    process, found = gpu(tmp_path, "--small")
    assert process.returncode == 0, process.stdout + process.stderr
    assert found.keys() == {"tests", "fit", "step", "kill", "train"}
    assert (tmp_path / "run" / "report.html").exists()
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"fit.json", "step.json", "kill.json"}
    for part in found.values():
        print(part["part"], part["seconds"], "s")
