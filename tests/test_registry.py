"""A new reward needs only a function, in a file of its own or in `reward.REWARDS`: flags, logs and
TRL use it automatically."""

import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import FAST, ROOT, error_line, read_log, run_program

import reward
from config import InputError, build_config, load_rewards

EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL)
(COMMAND,) = re.findall(r"sayo_mini.py (--reward .*)", EXTENDING)
FLAGS = "--eval_examples 0 --max_steps 1 --reward_weights format=1,length=0.5"


@pytest.fixture
def length_reward(monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "length", lambda x: [n / 20 for n in x.lengths])


def test_a_new_reward_is_logged_and_can_have_a_weight(tmp_path, length_reward):
    run_program(tmp_path, f"{FLAGS} --temperature 2 --format_lengths 13,13")
    (row,), samples = read_log(tmp_path), read_log(tmp_path, "samples.jsonl")
    lengths = [round(20 * sample["length"], 4) for sample in samples]  # tokens
    assert len(set(lengths)) > 1 and set(lengths) <= set(range(1, 21))
    assert sum(lengths) / len(lengths) == pytest.approx(row["completions/mean_length"])
    assert row["rewards/length/mean"] == pytest.approx(row["completions/mean_length"] / 20)
    totals = [sample["format"] + 0.5 * sample["length"] for sample in samples]
    assert row["reward"] == pytest.approx(sum(totals) / len(totals))
    best = max(range(4), key=lambda i: totals[i])  # of the first question
    assert samples[best]["advantage"] == max(sample["advantage"] for sample in samples[:4])


def test_an_unknown_reward_is_refused_and_the_known_ones_are_listed(tmp_path, capfd, length_reward):
    run_program(tmp_path / "run", "--reward_weights format=1,beauty=1", expect=2)
    known = "known: attention, format, accuracy, length"
    assert capfd.readouterr().err.endswith(f"--reward_weights: no reward 'beauty'; {known}\n")
    assert not (tmp_path / "run").exists()


def test_the_rewards_of_the_docs(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("import neighbor_of_rewards\n" + CODE)
    (tmp_path / "neighbor_of_rewards.py").touch()  # can be imported
    monkeypatch.chdir(tmp_path)
    run_program("run", f"{COMMAND} --layers 2 --max_steps 1 --eval_examples 0 --output_dir run")
    (row,), samples = read_log(tmp_path / "run"), read_log(tmp_path / "run", "samples.jsonl")
    weights = dict(format=1, length=0.1, iou=1, image_mass=0.5)
    totals = [sum(w * sample[name] for name, w in weights.items()) for sample in samples]
    assert row["reward"] == pytest.approx(sum(totals) / len(totals), abs=1e-5)
    assert row["rewards/iou/mean"] == 0 and 0 < row["rewards/image_mass/mean"] < 1
    functions = load_rewards(shlex.split(COMMAND)[1])
    attention = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.1], [9, torch.nan]]])
    x = SimpleNamespace(
        texts=["at [0, 0, 10, 5].", "[10, 5, 0, 0]"],
        lengths=[9, 3],
        format_lengths=(2, 6),
        attention=attention,
        example=SimpleNamespace(boxes=[(0, 0, 10, 10)]),
        completions=SimpleNamespace(mask=torch.tensor([[True, True], [True, False]])),
    )
    assert functions["length"](x) == [1, 0.5] and functions["iou"](x) == [0.5, 0]
    assert functions["image_mass"](x) == pytest.approx([0.5, 0.6])


MISTAKES = {  # a file -> what a run says about it
    "import nothing": "ModuleNotFoundError: No module named 'nothing'; traceback: ",
    "f = 1": "mine.py has no function f",
    "def f(x):\n    return x.text": "AttributeError: 'RewardInputs' object has no attribute 'text'",
    "def f(x): pass": "f must return 4 finite numbers, one per completion, not None",
    "def f(x): return x.attention": "not tensor([[[",
    "def f(x): return [1, 2]": "not [1, 2]",
    "def f(x): return [float('nan')] * 4": "not [nan, nan, nan, nan]",
}


@pytest.mark.parametrize("code", MISTAKES)
def test_a_mistake_is_one_line_before_the_run_begins(tmp_path, capfd, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    run_program("run", "--reward mine.py:f --reward_weights f=1", expect=2)
    assert MISTAKES[code] in error_line(capfd) and not (tmp_path / "run").exists()


def test_a_reward_needs_a_name_of_its_own_and_a_weight():
    with pytest.raises(InputError, match="format is a reward already: rename the function"):
        build_config({"model_name_or_path": "tiny", "reward": "mine.py:format"})
    advice = "f has no weight: pass --reward_weights attention=1,format=1,accuracy=0,f=1"
    with pytest.raises(InputError, match=advice):
        build_config({"model_name_or_path": "tiny", "reward": "mine.py:f"})
    # `look` reads the settings of a run, also without its file.
    build_config({}, {"model_name_or_path": "tiny", "reward": "gone.py:f", "reward_weights": "f=1"})


def test_trl_logs_and_weights_the_new_reward(tmp_path):
    pytest.importorskip("trl")
    from extras import scale_trl

    (tmp_path / "mine.py").write_text("def length(x):\n    return [n / 20 for n in x.lengths]")
    own = ["--reward", f"{tmp_path}/mine.py:length", "--output_dir", str(tmp_path / "run")]
    assert scale_trl.main([*FAST, *FLAGS.split(), *own]) == 0
    (row,) = [row for row in read_log(tmp_path / "run") if "loss" in row]
    length, form = row["rewards/length/mean"], row["rewards/format/mean"]
    assert 0 < length == pytest.approx(row["completions/mean_length"] / 20, abs=1e-5)
    assert row["reward"] == pytest.approx(form + 0.5 * length, abs=1e-5)
