"""metrics.py: the metrics of a group and of a step by hand, signs of reward hacking, and alarms."""

import json
from math import isnan, log, nan, tanh
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sayo_mini
from config import Config, InputError
from data import Example
from metrics import ALARMS, Alarms, attention_metrics, seq_rep_3, step_metrics
from model import Completions, Scores

# Two completions of three tokens on a grid of two cells; the second has one token of padding.
TEXTS = ["<answer> red </answer>", "<answer> blue </answer>"]
MASK = torch.tensor([[True, True, True], [True, True, False]])
ENTROPY = torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.9, 5.0]])  # the second token of each is selected
ATTENTION = torch.tensor([[[0.1, 0.1], [0.6, 0.2], [0.3, 0.3]], [[0.2, 0.6], [0.1, 0.3], [9, 9.0]]])
PROMPT_ROW = torch.tensor([0.5, 0.1])
EXAMPLE = Example(Image.new("RGB", (20, 10)), "What color?", "red", [[0, 0, 10, 10]], "test")


def rewards_of(rows=1, **settings):
    cfg = Config(format_lengths="3,3", **settings)
    prompt = SimpleNamespace(grid=(rows, 2))
    completions = Completions(torch.zeros(2, 3).long(), MASK, TEXTS)
    attention, prompt_row = ATTENTION.repeat(1, 1, rows), PROMPT_ROW.repeat(rows)
    scores = Scores(torch.zeros(2, 3), ENTROPY, attention, prompt_row)
    return sayo_mini.compute_rewards(EXAMPLE, prompt, completions, scores, cfg)


@pytest.mark.parametrize(
    "alignment, fraction, rho",
    [
        ("query", 0.3, [0.6 / 0.4, 0.1 / 0.2]),  # the rows of the selected tokens
        ("predict", 0.3, [0.1 / 0.1, 0.2 / 0.4]),  # the rows before them
        # The prompt's row and those of all tokens but the last: (0.5 + 0.1 + 0.6) and
        # (0.1 + 0.1 + 0.2); (0.5 + 0.2) and (0.1 + 0.6).
        ("predict", 1.0, [1.2 / 0.8, 0.7 / 0.7]),
    ],
)
def test_rewards_of_a_group(alignment, fraction, rho):
    rewards, inputs = rewards_of(alignment=alignment, token_fraction=fraction)
    assert rewards["attention"].tolist() == pytest.approx([tanh(log(x)) for x in rho], abs=1e-6)
    # The end-of-turn token counts, although it is not part of the text.
    assert inputs.lengths == [3, 2]
    assert rewards["format"].tolist() == pytest.approx([1.0, 0.6 * 2 / 3])
    assert rewards["accuracy"].tolist() == [1.0, 0.0]


def test_the_placebo_rewards_the_box_rolled_by_half_the_image():
    rewards, inputs = rewards_of(rows=2)
    rolled, placebo = rewards_of(rows=2, region="rolled")  # of a 2 x 2 grid, so the other column
    assert inputs.region.tolist() == [True, False, True, False]
    assert placebo.region.tolist() == [False, True, False, True]
    assert rolled["attention"].tolist() != rewards["attention"].tolist()
    assert rolled["format"].tolist() == rewards["format"].tolist()


def test_the_loss_of_a_forward_sums_over_its_groups_in_the_loss():
    """Its gradient makes the first completion, which has the better reward, more likely."""
    parts = dict(old_logps=torch.zeros(2, 3), advantages=torch.tensor([1.0, -1]), ref_logps=None)
    completions = Completions(torch.zeros(2, 3).long(), MASK, TEXTS)
    groups = [SimpleNamespace(in_loss=t, completions=completions, **parts) for t in (1, 0, 1)]
    scores = [Scores(torch.zeros(2, 3, requires_grad=True), None, None, None) for _ in groups]
    loss, stats = sayo_mini.batch_loss(groups, scores, Config(beta=0), step_tokens=10)
    loss.backward()
    for score in (scores[0], scores[2]):  # each token counts 1/10
        assert (10 * score.logps.grad).tolist() == [[-1, -1, -1], [1, 1, 0]]
    assert scores[1].logps.grad is None
    assert [(s["tokens"], round(s["loss"], 6)) for s in stats] == [(5, -0.1)] * 2


def test_attention_metrics_use_the_selection_and_leave_out_padding():
    _, inputs = rewards_of(alignment="query", token_fraction=0.3)
    metrics = attention_metrics(ENTROPY, MASK, inputs)
    assert json.loads(json.dumps(metrics)) == {
        "entropy": pytest.approx((0.1 + 0.9 + 0.2 + 0.1 + 0.9) / 5),
        "attention/auroc": 0.5,  # 1 and 0: 0.6 against 0.2, and 0.1 against 0.3
        "attention/log_rho": pytest.approx((log(1.5) + log(0.5)) / 2, abs=1e-6),
        "attention/image_mass": pytest.approx((0.2 + 0.8 + 0.6 + 0.8 + 0.4) / 5),
    }
    inputs.attention[1, 1] = torch.tensor([0.3, 0.1])
    assert attention_metrics(ENTROPY, MASK, inputs)["attention/auroc"] == 1.0
    inputs.region = torch.tensor([True, True])  # the region of the whole image has no AUROC: chance
    assert attention_metrics(ENTROPY, MASK, inputs)["attention/auroc"] == 0.5
    inputs.attention[0, 1, 0] = nan
    assert isnan(attention_metrics(ENTROPY, MASK, inputs)["attention/auroc"])


def group(total, lengths, finished, attention, entropy):
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    rewards = {"attention": torch.tensor(attention), "accuracy": torch.tensor([0.0, 1.0])}
    texts = ["I look. <answer> red </answer>", "<answer> blue"]
    return SimpleNamespace(
        total_reward=torch.tensor(total),
        completions=Completions(mask.long(), mask, texts, 1.0, torch.tensor(finished)),
        rewards=rewards,
        metrics={"entropy": entropy},
        in_loss=False,
    )


def test_metrics_of_a_step():
    groups = [
        group([0.0, 2.0], [1, 2], [True, False], [0.1, 0.2], entropy=0.5),
        group([1.0, 1.0], [3, 4], [True, True], [0.3, 0.4], entropy=1.5),
    ]
    first = {"loss": 2.0, "tokens": 3, "kl": 0.1, "ratio": 1.0}
    second = {"loss": 4.0, "tokens": 1, "kl": 0.5, "ratio": 1.4}
    clipped = {"clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.5}
    updates = [
        {"stats": [first | clipped], "grad_norm": 1.0, "finite": True},
        {"stats": [second | clipped], "grad_norm": 3.0, "finite": False},
    ]
    expected = clipped | {
        "loss": 3.0,  # per update
        "grad_norm": 2.0,
        "skipped_updates": 1,
        "reward": 1.0,
        "reward_std": 2**0.5 / 2,  # mean of sqrt(2) and 0
        "frac_reward_zero_std": 1.0,
        "entropy": 1.0,
        "completions/mean_length": 2.5,
        "completions/min_length": 1.0,
        "completions/max_length": 4.0,
        "completions/clipped_ratio": 0.25,
        "completions/seq_rep_3": 0.0,
        "completions/unclosed_tags": 0.5,
        "num_tokens": 10,
        "kl": (0.1 * 3 + 0.5) / 4,  # per token
        "ratio": 1.1,
        "rewards/attention/mean": 0.25,
        "rewards/attention/std": 0.1 / 2**0.5,
        "rewards/accuracy/mean": 0.5,
        "rewards/accuracy/std": 0.5**0.5,
        "attention/corr_accuracy": 1 / 5**0.5,  # covariance 0.1 / 4, variances 0.05 / 4 and 1 / 4
        "attention/corr_length": 1.0,
    }
    metrics = step_metrics(groups, updates)
    assert metrics == {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert json.loads(json.dumps(metrics)) == metrics


def test_signs_of_reward_hacking():
    for text, share in {
        "red card": 0,  # no triple
        "red card red card red card": 2 / 4,  # rcr crc rcr crc
        "Red red RED red": 1 / 2,
        "card " * 12: 9 / 10,
    }.items():
        assert seq_rep_3(text) == pytest.approx(share)


def row(share=0.5, skipped=0, **metrics):
    """A row of metrics.jsonl without alarms, except for those of `metrics`."""
    changed = {"rewards/accuracy/mean": share, "skipped_updates": skipped}
    return dict.fromkeys(ALARMS, 0.0) | changed | metrics


def steps_with_alarms(rows, history=(), **settings):
    """{step: what is printed} of the rows that are checked after `history`."""
    cfg, printed = Config(**{"max_steps": 100, "prompts_per_step": 8} | settings), {}
    alarms = Alarms(cfg, history)
    for step, each in enumerate(rows, len(history) + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("metrics.tqdm.write", lambda line: printed.setdefault(step, line))
            alarms.check(each, step)
    return printed


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_printed_once(name):
    threshold, why = ALARMS[name]
    bad = [row(), row(**{name: threshold}), row(**{name: 1.0})]
    assert steps_with_alarms(bad) == {2: f"step 2: {name} {threshold:.2f}: {why}"}
    assert steps_with_alarms(bad, history=bad) == {}  # nor after a resume
    assert steps_with_alarms([row(**{name: threshold - 0.01})]) == {}


def test_answers_that_get_worse_raise_an_alarm():
    # With 8 questions per step, means over 16 steps are compared. The mean falls from 0.75 by
    # 0.25 / 16 per step: it is 0.156 lower after 10 steps.
    rows = [row(share) for share in [0.5] * 16 + [0.75] * 16 + [0.5] * 20]
    line = "step 42: answers get worse: 59% of the recent samples are right, down from 75%"
    assert steps_with_alarms(rows) == {42: f"{line}; stop here, or use --keep_best"}
    assert list(steps_with_alarms(rows[20:], history=rows[:20])) == [42]  # the same after a resume
    # With 128 questions per step, one step has enough of them.
    assert steps_with_alarms(rows, prompts_per_step=128, keep_best=True)[33].endswith("is kept")
    assert not steps_with_alarms(rows[:41])
    assert not steps_with_alarms([row(share) for share in [0.9] * 8 + [0.1] * 7])  # too few


def test_the_best_steps_had_the_highest_share_of_right_samples():
    def is_best(*shares):  # of one step each; a window has two
        return Alarms(Config(save_steps=2), map(row, shares)).is_best()

    assert is_best(0.25, 0.5) and is_best(0.25, 0.5, 0.125, 1.0)
    assert is_best(0.25, 0.5, 0.375, 0.375)  # of equals, the later one
    assert not is_best(0.9, 0.1, 0.1, 0.8)  # 0.5, then 0.45
    assert not is_best(0.8, 0.8, 0.1, 0.1, 0.5, 0.5)  # better than the second, not than the first
    assert is_best(0.5) and not is_best(0.5, 0.5, 1.0)  # one step is not enough, unless it is all
    alarms = Alarms(Config(save_steps=1), [row(0.9)])
    alarms.forget_best()
    alarms.add(row(0.1))
    assert alarms.is_best()


def test_many_skipped_updates_in_a_row_end_the_run():
    nine = [row(skipped=1)] * 9
    line = "update skipped: loss or gradient is not finite"
    expected = {step: f"step {step}: {line}" for step in [*range(1, 10), *range(11, 20)]}
    assert steps_with_alarms([*nine, row(), *nine]) == expected
    with pytest.raises(InputError, match="^stopped after step 10: .* in 10 steps in a row; "):
        steps_with_alarms(nine[:1], history=nine)
    with pytest.raises(InputError, match="^stopped after step 2: "):  # no update of a short run
        steps_with_alarms(nine, max_steps=2)
