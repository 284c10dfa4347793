"""A new reward needs only a function and an entry in `reward.REWARDS`: flags, logs and TRL use it
automatically. The tests add a "length" reward at run time."""

import pytest
from conftest import FAST, read_log, run_program

import reward

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


def test_trl_logs_and_weights_the_new_reward(tmp_path, length_reward):
    pytest.importorskip("trl")
    from extras import scale_trl

    assert scale_trl.main([*FAST, *FLAGS.split(), "--output_dir", str(tmp_path)]) == 0
    (row,) = [row for row in read_log(tmp_path) if "loss" in row]
    length, form = row["rewards/length/mean"], row["rewards/format/mean"]
    assert 0 < length == pytest.approx(row["completions/mean_length"] / 20, abs=1e-5)
    assert row["reward"] == pytest.approx(form + 0.5 * length, abs=1e-5)
