"""The wheel in a new environment, beside a user's own modules with the same names as ours, and the
scripts in example/."""

import os
import re
import shutil
import subprocess
import sys
import venv

import pytest
from conftest import ROOT, TINY, read_log

pytestmark = pytest.mark.slow
SAME_NAMES = "config data model reward extras scenes".split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A function that runs a program of the new environment in a folder of the user.
    Returns: its stdout and stderr."""
    folder = tmp_path_factory.mktemp("installed")
    new, user, pip = folder / "venv", folder / "user", [sys.executable, "-m", "pip", "-q"]
    # A copy, because setuptools writes its build folders into the source.
    left_out = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "docs", "tests", "study")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    build = "wheel --no-deps --no-build-isolation -w".split()
    subprocess.run([*pip, *build, folder, folder / "source"], check=True)
    venv.create(new)
    install = ["--python", new / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *install, *folder.glob("*.whl")], check=True)
    (site,) = new.glob("lib/*/site-packages")
    for path in (site / "sayo_mini").rglob("*.py"):
        assert not re.search(r"^ *(from|import) (extras|study)\b", path.read_text(), re.MULTILINE)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages))  # torch and the others
    user.mkdir()
    for name in SAME_NAMES:
        (user / f"{name}.py").write_text("MINE = True")

    def run(program, *args, expect=0):
        command = [new / "bin" / program, *args]
        env = os.environ | {"PYTHONPATH": str(user)}
        process = subprocess.run(command, cwd=user, env=env, capture_output=True, text=True)
        assert process.returncode == expect, process.stderr
        return process.stdout, process.stderr

    run.folder = user
    return run


def test_the_command_runs_and_names_itself(installed):
    assert installed("sayo-mini", "--version") == ("sayo-mini 0.1.0\n", "")
    _, error = installed("sayo-mini", "--lora_r", "0", expect=2)
    assert error == "sayo-mini: --lora_r 0: must be at least 1 and at most 1024\n"
    (installed.folder / "mine.py").write_text("def f(x):\n    return x.lengths")
    flags = "--device cpu --max_steps 1 --eval_examples 2 --prompts_per_step 1"
    flags += " --reward mine.py:f --reward_weights attention=1,f=0.1"
    out, err = installed("sayo-mini", *flags.split())  # in 4 bits
    for words in ("using the tiny model", "greedy accuracy", "open runs/sayo/report.html"):
        assert words in out
    lines = err.replace("\r", "\n").splitlines()  # only progress bars: no library warns
    assert not [line for line in lines if line.strip() and "/s" not in line and "s/it" not in line]
    assert read_log(installed.folder / "runs" / "sayo")[0]["rewards/f/mean"] > 1
    assert "example: sayo-mini look --image" in installed("sayo-mini", "look", "--help")[0]


def test_both_sets_of_modules_can_be_imported(installed):
    names = ", ".join(SAME_NAMES)
    code = f"import {names}\nimport sys, sayo_mini.reward, sayo_mini.data\n"
    code += "print('sayo_mini.model' in sys.modules, 'transformers' in sys.modules)\n"
    code += "import sayo_mini.model, sayo_mini.extras.convert\n"
    code += f"print(all(m.MINE for m in ({names})))\n"
    assert installed("python", "-c", code)[0].split() == ["False", "False", "True"]


def test_the_scripts_of_the_example(installed):
    """Both give the same r_v: from transformers' own attention, and from `Vlm.score`."""

    def script(name, changes):
        code = (ROOT / "example" / name).read_text(encoding="utf-8")
        changes |= {'"Qwen/Qwen3-VL-2B-Instruct"': repr(str(TINY))}
        changes |= {'"example/': f'"{ROOT}/example/'}
        for old, new in changes.items():
            assert old in code, old
            code = code.replace(old, new)
        return code

    code = script("score_answer.py", {})
    found = float(re.search(r"r_v (-?0\.\d+)", installed("python", "-c", code)[0])[1])

    config = "bf16=False, use_cpu=True, max_steps=1, learning_rate=0, max_completion_length=20"
    code = script("trl_reward.py", {"max_completion_length=110": config})
    answer = '"top left, a blue dot <answer> blue </answer><|im_end|>"'
    code += f"row, ids = rows[0], vlm.tokenizer.encode({answer})\n"
    code += 'print("r_v", *attention([ids], [row["image"]], [row["question"]], [row["boxes"]]))\n'
    out, _ = installed("python", "-c", code)
    assert float(out.split("r_v ")[1]) == pytest.approx(found, abs=2e-4)
    mean = re.search(r"'rewards/attention/mean': '?(-?[\d.]+)", out)[1]
    assert -1 < float(mean) < 1 and float(mean) != 0
