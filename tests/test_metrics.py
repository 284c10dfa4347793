"""The rewards and metrics of a group, computed by hand from made-up scores."""

from math import log, tanh
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import reward
import sayo_mini
from analysis.metrics import attention_metrics
from config import Config
from data import Example
from model import Completions, Scores

# Two completions of three tokens on a grid of two cells; the second has one token of padding.
TEXTS = ["<answer> red </answer>", "<answer> blue </answer>"]
MASK = torch.tensor([[True, True, True], [True, True, False]])
ENTROPY = torch.tensor([[0.1, 0.9, 0.2], [0.1, 0.9, 5.0]])  # the second token of each is selected
ATTENTION = torch.tensor([[[0.1, 0.1], [0.6, 0.2], [0.3, 0.3]], [[0.2, 0.6], [0.1, 0.3], [9, 9.0]]])
PROMPT_ROW = torch.tensor([0.5, 0.1])
EXAMPLE = Example(Image.new("RGB", (20, 10)), "What color?", "red", [[0, 0, 10, 10]], "test")


def rewards_of(alignment, fraction=0.3):
    cfg = Config(alignment=alignment, token_fraction=fraction, format_lengths="3,3")
    vlm, prompt = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(grid=(1, 2))
    completions = Completions(torch.zeros(2, 3).long(), MASK, TEXTS)
    scores = Scores(torch.zeros(2, 3), ENTROPY, ATTENTION, PROMPT_ROW)
    return sayo_mini.compute_rewards(vlm, EXAMPLE, prompt, completions, scores, cfg)


@pytest.mark.parametrize(
    "alignment, rho",
    [
        ("query", [0.6 / 0.4, 0.1 / 0.2]),  # the rows of the selected tokens
        ("predict", [0.1 / 0.1, 0.2 / 0.4]),  # the rows before them
    ],
)
def test_the_attention_reward_is_made_of_the_selected_rows(alignment, rho):
    rewards, _ = rewards_of(alignment)
    assert rewards["attention"].tolist() == pytest.approx([tanh(log(x)) for x in rho], abs=1e-6)


def test_the_first_token_is_predicted_by_the_prompt():
    rewards, _ = rewards_of("predict", fraction=1.0)
    # Rows of the prompt and of all tokens but the last: (0.5 + 0.1 + 0.6) and (0.1 + 0.1 + 0.2);
    # and (0.5 + 0.2) and (0.1 + 0.6).
    rho = [1.2 / 0.8, 0.7 / 0.7]
    assert rewards["attention"].tolist() == pytest.approx([tanh(log(x)) for x in rho], abs=1e-6)


def test_the_length_in_the_format_reward_counts_every_real_token():
    """The end-of-turn token is one of them, although it is not part of the text."""
    rewards, inputs = rewards_of("query")
    assert inputs.lengths == [3, 2]
    assert rewards["format"].tolist() == pytest.approx([1.0, 0.6 * 2 / 3])
    assert rewards["accuracy"].tolist() == [1.0, 0.0]


def test_attention_metrics_use_the_selection_and_leave_out_padding():
    _, inputs = rewards_of("query")
    metrics = attention_metrics(ENTROPY, MASK, inputs)
    assert metrics["attention/log_rho"] == pytest.approx((log(1.5) + log(0.5)) / 2, abs=1e-6)
    assert metrics["attention/auroc"] == 0.5  # 0.6 against 0.2, and 0.1 against 0.3
    assert metrics["attention/image_mass"] == pytest.approx((0.2 + 0.8 + 0.6 + 0.8 + 0.4) / 5)
    assert metrics["entropy"] == pytest.approx((0.1 + 0.9 + 0.2 + 0.1 + 0.9) / 5)


def test_the_ratio_is_clamped_at_exp_20():
    logps, old = torch.tensor([[30.0]]), torch.tensor([[0.0]])
    loss, stats = reward.grpo_loss(
        logps, old, None, torch.tensor([-1.0]), torch.tensor([[True]]), beta=0
    )
    assert loss.item() == pytest.approx(torch.tensor(20.0).exp().item(), rel=1e-5)
    assert stats["ratio"] == pytest.approx(torch.tensor(20.0).exp().item(), rel=1e-5)
