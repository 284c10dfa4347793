"""Tests that a new reward needs only a function and an entry in `reward.REWARDS`: flags, logs and
TRL use it automatically.

The tests add a "length" reward at run time. Sampling is replaced, so that the expected values can
be computed by hand: all completions have the same answer and fixed numbers of tokens.
"""

import json
import math
import shlex

import pytest
import torch
from conftest import TINY
from torch.nn.utils.rnn import pad_sequence

import reward
import sayo_mini
from model import Completions, Vlm

FAST = "--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split()
FAST += "--eval_examples 0 --model_name_or_path".split() + [str(TINY)]

LENGTHS = [8, 12, 16, 20], [6, 6, 14, 14]  # tokens of the completions of two questions
LENGTH_REWARDS = [0.4, 0.6, 0.8, 1.0], [0.3, 0.3, 0.7, 0.7]  # tokens / 20
LENGTH_MEAN = 0.6  # (0.7 + 0.5) / 2
LENGTH_STD = (math.sqrt(0.2 / 3) + math.sqrt(0.16 / 3)) / 2  # within a question, divisor G - 1
# With --format_lengths 10,18: 0.6 * tokens / 10 below 10, 0.6 * 18 / tokens above 18.
FORMAT_REWARDS = [0.48, 1.0, 1.0, 0.54], [0.36, 0.36, 1.0, 1.0]
FORMAT_MEAN = 0.7175  # 5.74 / 8


@pytest.fixture
def length_reward(monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "length", lambda x: [n / 20 for n in x.lengths])


def completion_of(tokenizer, length):
    """Token ids of a well-formed answer, preceded by words so that there are `length` tokens."""
    answer = tokenizer("<answer> red </answer><|im_end|>", add_special_tokens=False).input_ids
    words = ["red"] * (length - len(answer))
    ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids + answer
    assert len(ids) == length
    return ids


@pytest.fixture
def fixed_samples(monkeypatch):
    """Replace sampling: the completions of a step's two questions have the lengths in LENGTHS."""

    def sample_groups(vlm, prompts, G, *args):
        groups = []
        for lengths in LENGTHS:
            rows = [torch.tensor(completion_of(vlm.tokenizer, length)) for length in lengths]
            mask = pad_sequence([torch.ones_like(row).bool() for row in rows], batch_first=True)
            texts = [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
            ids = pad_sequence(rows, batch_first=True)
            groups.append(Completions(ids, mask, texts, finished=torch.ones(G).bool()))
        return groups

    monkeypatch.setattr(Vlm, "sample_groups", sample_groups)


def run(folder, flags="", expect=0):
    argv = [*FAST, "--output_dir", str(folder), *shlex.split(flags)]
    assert sayo_mini.main(argv) == expect


def read_log(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_new_reward_is_logged(tmp_path, length_reward, fixed_samples):
    run(tmp_path, "--max_steps 1")
    (row,) = read_log(tmp_path)
    assert row["rewards/length/mean"] == pytest.approx(LENGTH_MEAN)
    assert row["rewards/length/std"] == pytest.approx(LENGTH_STD)
    samples = read_log(tmp_path, "samples.jsonl")
    assert [s["length"] for s in samples] == pytest.approx(sum(LENGTH_REWARDS, []))
    assert [s["format"] for s in samples] == pytest.approx(sum(FORMAT_REWARDS, []))


def test_new_reward_can_have_a_weight(tmp_path, length_reward, fixed_samples):
    weights = {"format=1": FORMAT_MEAN, "format=1,length=0.5": FORMAT_MEAN + 0.5 * LENGTH_MEAN}
    for i, (flag, expected) in enumerate(weights.items()):
        run(tmp_path / str(i), f"--max_steps 1 --reward_weights {flag}")
        (row,) = read_log(tmp_path / str(i))
        assert row["reward"] == pytest.approx(expected), flag
    advantages = [
        [s["advantage"] for s in read_log(tmp_path / name, "samples.jsonl")] for name in "01"
    ]
    assert advantages[0] != pytest.approx(advantages[1])


def test_unknown_reward_is_refused_and_the_known_ones_are_listed(tmp_path, capfd, length_reward):
    run(tmp_path / "run", "--reward_weights format=1,beauty=1", expect=2)
    known = "known: attention, format, accuracy, length"
    line = f"sayo_mini.py: --reward_weights: no reward 'beauty'; {known}\n"
    assert capfd.readouterr().err == line
    assert not (tmp_path / "run").exists()


def test_without_its_entry_the_reward_is_unknown(tmp_path, capfd):
    run(tmp_path / "run", "--reward_weights length=1", expect=2)
    assert "no reward 'length'; known: attention, format, accuracy\n" in capfd.readouterr().err


def test_trl_logs_and_weights_the_new_reward(tmp_path, monkeypatch, length_reward):
    trl = pytest.importorskip("trl")
    from extras import scale_trl

    def generate_fixed(trainer, prompt_ids, images, fields, num_generations):
        tokenizer = trainer.processing_class.tokenizer
        return [completion_of(tokenizer, length) for length in sum(LENGTHS, [])], None

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", generate_fixed)
    flags = "--max_steps 1 --reward_weights format=1,length=0.5".split()
    argv = [*FAST, "--output_dir", str(tmp_path), *flags]
    assert scale_trl.main(argv) == 0
    (row,) = [row for row in read_log(tmp_path) if "loss" in row]
    assert row["rewards/length/mean"] == pytest.approx(LENGTH_MEAN, abs=1e-5)
    assert row["rewards/format/mean"] == pytest.approx(FORMAT_MEAN, abs=1e-5)
    assert row["reward"] == pytest.approx(FORMAT_MEAN + 0.5 * LENGTH_MEAN, abs=1e-5)
