"""The maths of reward.py: a worked example of each step of the README, then edge cases.
The comments contain the arithmetic, so every expected number can be checked by hand."""

import math
from functools import partial

import pytest
import torch

import reward
from data import region_mask

INF, NAN = math.inf, math.nan
approx = partial(pytest.approx, rel=1e-5, abs=1e-5)


def bools(*values):
    return torch.tensor(values).bool()


def real_tokens(lengths, width):
    """The mask of completions with these lengths, padded on the right."""
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def positions(row):
    return row.nonzero().flatten().tolist()


# --- Worked examples, in the order of the README. Steps 2 (sample), 3 (score) and 8 (update) need a
# model: see test_model.py and test_train.py.

# Two completions of three tokens (G 2, C 3) about an image of four tokens (N 4).
FIRST = [[0.1, 0.0, 0.2, 0.1], [0.3, 0.1, 0.05, 0.05], [0.0, 0.0, 0.9, 0.1]]
SECOND = [[0.1, 0.1, 0.1, 0.1], [0.0, 0.2, 0.3, 0.3], [0.2, 0.2, 0.2, 0.2]]
ATTENTION, REGION = torch.tensor([FIRST, SECOND]), bools(1, 1, 0, 0)


def test_step_1_region():
    # 30 x 30 pixels and 3 x 3 image tokens: a token covers 10 x 10 pixels.
    region = region_mask([(0, 0, 20, 10)], image_size=(30, 30), grid=(3, 3))
    assert region.tolist() == [True, True, False] + [False] * 6
    # One more pixel to the right reaches the third token of the row.
    assert positions(region_mask([(0, 0, 21, 10)], (30, 30), (3, 3))) == [0, 1, 2]


def test_step_4_select():
    # 30 % of ten real tokens are three, of five floor(1.5) = one. Padding never counts.
    entropy = [0.5, 0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.4, 0.6, 0.0]
    mask = real_tokens([10, 5], 10)
    selected = reward.select_tokens(torch.tensor([entropy, entropy]), mask, fraction=0.3)
    assert [positions(row) for row in selected] == [[1, 3, 6], [1]]


def test_step_5_align():
    # "query": token j has the row whose query is token j. "predict": the row before, which predicts
    # token j. The prompt's last token predicts the first token.
    rows, prompt_row = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([7.0, 8.0])
    assert torch.equal(reward.align_attention(rows, prompt_row), rows)  # the default is "query"
    assert reward.align_attention(rows, prompt_row, "query").tolist() == [[1, 2], [3, 4], [5, 6]]
    assert reward.align_attention(rows, prompt_row, "predict").tolist() == [[7, 8], [1, 2], [3, 4]]


def test_step_5_attention_reward():
    # The second token of each completion is selected.
    # First:  a = (0.3 + 0.1) / 2 = 0.2, v = 0.5 / 4 = 0.125, rho = 1.6
    # Second: a = (0.0 + 0.2) / 2 = 0.1, v = 0.8 / 4 = 0.2, rho = 0.5
    selected = bools([0, 1, 0], [0, 1, 0])
    rho = reward.attention_ratio(ATTENTION, REGION, selected)
    assert rho.tolist() == [approx(1.6), approx(0.5)]
    # r_v = (rho^2 - 1) / (rho^2 + 1): 1.56 / 3.56, and -0.75 / 1.25
    r_v = reward.attention_reward(ATTENTION, REGION, selected)
    assert r_v.tolist() == [approx(1.56 / 3.56), approx(-0.6)]


def test_step_5_format_and_accuracy():
    text = "The dot is red. <answer> Red </answer>"
    assert reward.format_reward(text, n_tokens=80, shortest=60, longest=100) == 1.0
    assert reward.format_reward(text, 30, 60, 100) == approx(0.3)  # too short: 0.6 * 30 / 60
    assert reward.format_reward(text, 120, 60, 100) == approx(0.5)  # too long: 0.6 * 100 / 120
    assert reward.format_reward("The dot is red.", 80, 60, 100) == 0.0
    assert reward.accuracy_reward(text, "red") == 1.0
    assert reward.accuracy_reward(text, "blue") == 0.0


def test_step_6_advantages():
    # mean 2; std of (-1, 0, 1) with Bessel's correction: sqrt((1 + 0 + 1) / (3 - 1)) = 1
    advantages = reward.group_advantages(torch.tensor([1.0, 2.0, 3.0]))
    assert advantages.tolist() == [approx(-1 / 1.0001), 0, approx(1 / 1.0001)]
    # Each group has its own std: rewards that differ ten times less have about the same advantages.
    advantages = reward.group_advantages(torch.tensor([0.1, 0.2, 0.3]))
    assert advantages.tolist() == [approx(-0.1 / 0.1001), approx(0), approx(0.1 / 0.1001)]


def test_step_7_loss():
    # Tokens 1 and 2 are a completion with advantage 1, token 3 is one with advantage -1. Token 1 is
    # now 1.5 times as likely as when it was sampled, token 2 as likely, token 3 half as likely.
    ratio = torch.tensor([[1.5, 1.0], [0.5, 1.0]])
    mask = bools([1, 1], [1, 0])
    logps = torch.zeros(2, 2, requires_grad=True)
    old_logps, advantages = -ratio.log(), torch.tensor([1.0, -1.0])
    loss, stats = reward.grpo_loss(logps, old_logps, None, advantages, mask, clip=0.2)
    # -min(1.5, 1.2) = -1.2, -1, -min(-0.5, -0.8) = 0.8: a mean over tokens, not over completions.
    assert loss.item() == approx((-1.2 - 1 + 0.8) / 3)
    clipped = {"clip_ratio/low_mean": approx(1 / 3), "clip_ratio/high_mean": approx(1 / 3)}
    assert stats == {"kl": 0.0, "ratio": approx((1.5 + 1 + 0.5) / 3)} | clipped
    loss.backward()  # the clipped tokens 1 and 3 have no gradient
    assert logps.grad.tolist() == [[0, approx(-1 / 3)], [0, 0]]


def test_step_7_kl_penalty():
    # The reference is twice as likely, and half as likely, to write the token.
    # d = log 2: e^d - d - 1 = 1 - log 2. d = -log 2: 1/2 + log 2 - 1. The sum is 1/2.
    logps, ref_logps = torch.zeros(1, 2, requires_grad=True), torch.tensor([[2.0, 0.5]]).log()
    args = logps, logps.detach(), ref_logps, torch.zeros(1), bools([1, 1])
    loss, stats = reward.grpo_loss(*args, beta=0.1)
    assert stats["kl"] == approx(0.25) and loss.item() == approx(0.1 * 0.25)
    loss.backward()  # The derivative of e^d - d - 1 in logp is 1 - e^d: -1 and 1/2.
    assert logps.grad.tolist() == [[approx(0.1 * -1 / 2), approx(0.1 * 0.5 / 2)]]


def test_localization():
    # Cells 1 and 3 are the region. Pairs of a cell inside and one outside: 0.4 > 0.3, 0.4 > 0.1,
    # 0.2 < 0.3, 0.2 > 0.1, so 3 of 4 are in the right order. a = 0.3, v = 0.25, rho = 1.2.
    scores = reward.localization(torch.tensor([0.4, 0.3, 0.2, 0.1]), bools(1, 0, 1, 0))
    tas = 1.44 / 2.44  # (1 + r_v) / 2 = rho^2 / (rho^2 + 1)
    assert scores.pop("pointing") == 1  # the largest value, 0.4, is inside
    expected = {"auroc": 0.75, "mass_over_area": 1.2, "tas": tas, "image_mass": 1.0}
    assert scores == {name: approx(value) for name, value in expected.items()}


# --- Edge cases, in the same order.


@pytest.mark.parametrize(
    "entropy, mask, fraction, expected",
    [
        ([0.5, 0.9, 0.1], [1, 1, 1], 0.3, [1]),  # floor(0.9) = 0, but at least one token
        ([0.5, 0.9, 0.1], [1, 1, 1], 1.0, [0, 1, 2]),
        ([0.1, 0.7, 0.2, 0.7, 0.7], [1] * 5, 0.4, [1, 3]),  # ties go to the earlier token
        ([9.0, 1.0, 9.0, 2.0, 3.0, 9.0], [0, 1, 0, 1, 1, 0], 0.67, [3, 4]),  # floor(0.67 * 3) = 2
        ([0.1, 0.3, 0.2, NAN, INF], [1, 1, 1, 0, 0], 0.7, [1, 2]),
        ([INF, NAN], [0, 0], 1.0, []),  # nothing is selected in an empty completion
    ],
)
def test_select_tokens(entropy, mask, fraction, expected):
    selected = reward.select_tokens(torch.tensor([entropy]), bools(mask), fraction)
    assert selected.dtype == torch.bool and positions(selected[0]) == expected


def test_the_number_of_selected_tokens_is_exact():
    # In floats 0.29 * 100 is 28.999999999999996. The expected number is computed with integers.
    lengths = range(1, 201)
    entropy = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    for percent in range(1, 101):
        counts = reward.select_tokens(entropy, real_tokens(lengths, 200), percent / 100).sum(1)
        assert counts.tolist() == [max(1, percent * n // 100) for n in lengths], percent
    # By default it is 30 %. A sort that is not stable would mix up a thousand equal values.
    selected = reward.select_tokens(torch.zeros(1, 1000), real_tokens([1000], 1000))
    assert positions(selected[0]) == list(range(300))


def ratio_and_reward(rows, region, selected=None, **eps):
    """rho and r_v of one completion, two numbers."""
    selected = bools([1] * len(rows) if selected is None else selected)
    args = torch.tensor([rows], dtype=torch.float32), bools(*region), selected
    rho, r_v = reward.attention_ratio(*args, **eps), reward.attention_reward(*args, **eps)
    return rho.item(), r_v.item()


@pytest.mark.parametrize(
    "rows, region, selected, rho",
    [
        # A ratio of means, not a mean of ratios, which would be (3.2 + 0.4) / 2 = 1.8:
        # a = (0.08 + 0.1) / 2 = 0.09, v = (0.1 + 1.0) / 2 / 4 = 0.1375
        ([[0.08, 0.02, 0.0, 0.0], [0.1, 0.3, 0.3, 0.3]], [1, 0, 0, 0], [1, 1], 36 / 55),
        # Only the second token is selected: 0.2 / 0.15
        ([[0.0, 0.9], [0.2, 0.1], [0.0, 0.9]], [1, 0], [0, 1, 0], 4 / 3),
        # Uniform attention, and a region of the whole image.
        ([[0.125] * 8, [0.001] * 8], [1] + [0] * 7, [1, 1], 1.0),
        ([[0.3, 0.1, 0.05, 0.05]], [1, 1, 1, 1], [1], 1.0),
        # All attention is inside: N / |R|, or none.
        ([[0.3, 0.5, 0.0, 0.0]], [1, 1, 0, 0], [1], 2.0),
        ([[0.0, 0.0, 0.5, 0.3]], [1, 1, 0, 0], [1], 0.0),
        # What padding contains does not matter.
        ([[0.3, 0.1, 0.05, 0.05], [NAN] * 4, [INF] * 4], [1, 1, 0, 0], [1, 0, 0], 1.6),
    ],
)
def test_attention_ratio_and_reward(rows, region, selected, rho):
    expected = approx(rho), approx((rho**2 - 1) / (rho**2 + 1))
    assert ratio_and_reward(rows, region, selected) == expected


def test_eps_is_added_to_both_means():
    # (3e-8 + 1e-8) / (1.5e-8 + 1e-8) = 1.6; without eps it would be 2. r_v = 1.56 / 3.56
    expected = approx(1.6), approx(1.56 / 3.56)
    assert ratio_and_reward([[3.0, 0.0]], [1, 0], eps=1.0) == expected
    # The means are over selected tokens only, so the others do not increase the weight of eps.
    rows = [[2e-8, 0.0], [4e-8, 0.0], [0.0, 0.0]]
    assert ratio_and_reward(rows, [1, 0], [1, 1, 0]) == expected
    assert ratio_and_reward([[0.0, 0.0]], [1, 0]) == (1, 0)  # no attention counts as uniform


def test_a_completion_without_selected_tokens_gets_minus_one():
    args = ATTENTION, REGION, bools([1, 0, 0], [0, 0, 0])
    assert reward.attention_reward(*args).tolist() == [approx(-0.6), -1]  # rho: 0.05 / 0.1
    # The second ratio is not NaN, because one NaN would make every logged mean NaN.
    assert reward.attention_ratio(*args).tolist() == [approx(0.5), 1]


def test_empty_regions_wrong_shapes_and_unknown_alignments_are_refused():
    with pytest.raises(ValueError, match="alignment 'sideways': choose query or predict"):
        reward.align_attention(ATTENTION, ATTENTION[0, 0], "sideways")
    for region, selected, message in (
        ([0, 0, 0, 0], (2, 3), "the region marks no image token"),
        ([1, 0, 0], (2, 3), r"attention \(2, 3, 4\) is not \(2, 3, 3\), \(G, C, N\)"),
        ([1, 0, 0, 0], (1, 3), r"attention \(2, 3, 4\) is not \(1, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            reward.attention_reward(ATTENTION, bools(*region), torch.ones(selected).bool())


# Attention of one token to four cells, of which cell 0 is the region. HARD looks at one cell, SOFT
# spreads more attention over several, and FLAT over all.
HARD_ON, HARD_OFF = [0.6, 0.1, 0.0, 0.0], [0.1, 0.0, 0.6, 0.0]
HARDEST_OFF = [0.0, 0.0, 0.9, 0.0]
SOFT_ON, SOFT_OFF = [0.3, 0.2, 0.2, 0.2], [0.2, 0.3, 0.2, 0.2]
FLAT_ON, FLAT_OFF = [0.26, 0.25, 0.25, 0.24], [0.25, 0.26, 0.25, 0.24]


@pytest.mark.parametrize(
    "rows, before_answer, expected",
    [
        # One look among six tokens, floor(0.15 * 6) = 0: it is early and late.
        ([FLAT_OFF, HARD_ON, *[FLAT_OFF] * 4], [1] * 6, [True, True]),
        # Two of 14 tokens, a wrong look and a right one.
        ([*[FLAT_ON] * 3, HARD_OFF, *[FLAT_OFF] * 9, HARD_ON], [1] * 14, [0, 1]),
        ([SOFT_ON, HARD_ON, *[SOFT_OFF] * 9, HARD_OFF, *[SOFT_ON] * 2], [1] * 14, [1, 0]),
        # Looks in and after the answer do not count, unless there is nothing before it.
        ([FLAT_OFF, HARD_ON, FLAT_OFF, HARDEST_OFF], [1, 1, 1, 0], [True, True]),
        ([HARDEST_OFF, HARD_ON, FLAT_OFF], [0, 0, 0], [False, False]),
        ([[0.0] * 4, FLAT_ON], [1, 1], [True, True]),  # a token that ignores the image is no look
        # Four of 28 tokens, two early and two late: their mean map decides.
        ([HARD_OFF, SOFT_ON, HARD_ON, SOFT_OFF, *[FLAT_ON] * 24], [1] * 28, [False, True]),
        ([HARD_ON, SOFT_ON, HARD_OFF, SOFT_OFF, *[FLAT_ON] * 24], [1] * 28, [True, False]),
        ([[0.1] * 4], [1], [False, False]),  # uniform attention is not on the region
    ],
)
def test_early_and_late_looks(rows, before_answer, expected):
    args = bools(1, 0, 0, 0), bools(*before_answer)
    expected = [bool(look) for look in expected]
    assert reward.early_and_late(torch.tensor(rows), *args) == expected
    assert reward.early_and_late(torch.tensor(rows).bfloat16(), *args) == expected
    mass = torch.linspace(1, 9, len(rows))[:, None]  # attention to the image: it does not matter
    assert reward.early_and_late(mass * torch.tensor(rows), *args) == expected


@pytest.mark.parametrize(
    "text, found",
    [
        ("I look. <answer>red</answer>", "red"),
        ("<answer>two\nlines < 3</answer>", "two\nlines < 3"),
        ("", None),
        ("<answer> \n\t</answer>", None),  # blank
        ("<answer>red", None),  # not closed
        ("red</answer>", None),  # not opened
        ("</answer> or <answer>red", None),  # in the wrong order
        ("<answer>red</answer><answer>red</answer>", None),  # two answers
        ("<answer>red</answer> or blue</answer>", None),
    ],
)
def test_rewards_require_exactly_one_well_formed_answer(text, found):
    assert reward.find_answer(text) == found
    assert reward.format_reward(text, 80) == (1.0 if found else 0.0)
    assert reward.accuracy_reward(text, found or "red") == (1.0 if found else 0.0)


def test_format_reward_of_a_length():
    text = "<answer>red</answer>"
    # By default 60 to 100 tokens: 0.6 * n / 60 below, 0.6 * 100 / n above.
    for n, expected in {0: 0.0, 59: 0.59, 60: 1.0, 100: 1.0, 101: 60 / 101}.items():
        value = reward.format_reward(text, n)
        assert type(value) is float and value == approx(expected)
    for n, expected in {3: 0.45, 4: 1.0, 10: 1.0, 12: 0.5}.items():
        assert reward.format_reward(text, n, 4, 10) == approx(expected)
    assert reward.format_reward(text, 0, 0, 10) == 1.0  # no minimum length


@pytest.mark.parametrize(
    "said, answer",
    [
        ("RED", " Red\n"),  # case and spaces
        ("red?! ...,;:", "red ."),  # punctuation at the end
        ("light\n  blue", "light blue"),
        ("STRASSE", "straße"),
        ("Four", ("4", "four")),  # one of several accepted answers
        ("ﬁve", ["x", "five"]),  # variants of a letter
        ("１０", "10"),
        ("blue\u200b", "blue"),  # a character without a width
        ("cafe\u0301", "CAFÉ"),
        ("\u0390", "\u03aa\u0301"),  # casefold decomposes the first one only
        ("!", "!"),
        ("猫。", "猫"),
    ],
)
def test_answers_that_are_right(said, answer):
    value = reward.accuracy_reward(f"<answer>{said}</answer>", answer)
    assert type(value) is float and value == 1


def test_answers_that_are_wrong():
    """A part of the answer, or more than it; texts without an answer."""
    pairs = [("a", "a red card"), ("a red card", "a"), ("10", "1"), ("-5", "5"), ("3.5", "35")]
    pairs += [("lightblue", "light blue"), ("!", "?"), ("...", "."), ("five", ("4", "four"))]
    for said, answer in [*pairs, ("4", ())]:
        assert reward.accuracy_reward(f"It is {answer}. <answer>{said}</answer>", answer) == 0
    for answer in ("", " .", None):
        assert reward.accuracy_reward("I do not know.", answer) == 0


def test_group_advantages():
    # A difference of 1e-4 is not amplified to 1: std 7.07e-5, 5e-5 / 1.707e-4.
    advantages = reward.group_advantages(torch.tensor([0.0, 1e-4]))
    assert advantages.tolist() == [approx(-0.29289), approx(0.29289)]
    assert reward.group_advantages(torch.tensor([1.0, 2.0, 3.0]), eps=1.0)[2] == approx(0.5)
    # Equal rewards: exactly 0. In floats the mean of three 0.1 is not 0.1, nor the std exactly 0.
    for value in (0.0, 0.1, 1 / 3, 1e6 + 0.1):
        for G in (2, 3, 7):
            assert reward.group_advantages(torch.full((G,), value)).tolist() == [0.0] * G
    with pytest.raises(ValueError, match="num_generations must be at least 2"):
        reward.group_advantages(torch.tensor([1.0]))


def loss_of(ratios, advantages, d=None, mask=None, **settings):
    """Loss, gradient in the log-probabilities, stats. Args: ratios and d = ref - logp, (G, C)."""
    old_logps = -torch.tensor(ratios).double().log()  # logps are 0
    logps = torch.zeros_like(old_logps, requires_grad=True)
    ref_logps = None if d is None else torch.tensor(d).double()
    mask = torch.ones_like(logps).bool() if mask is None else bools(*mask)
    advantages = torch.tensor(advantages).double()
    loss, stats = reward.grpo_loss(logps, old_logps, ref_logps, advantages, mask, **settings)
    loss.backward()
    assert loss.shape == () and all(type(value) is float for value in stats.values())
    return loss.item(), logps.grad.tolist(), stats


@pytest.mark.parametrize(
    "ratio, A, clip, loss, gradient, low, high",
    [
        (1.1, 2.0, 0.2, -2.2, -2.2, 0, 0),  # within the clip range
        (1.5, 1.0, 0.2, -1.2, 0.0, 0, 1),  # -min(1.5, 1.2): good, and already likely enough
        (1.5, -1.0, 0.2, 1.5, 1.5, 0, 0),  # -min(-1.5, -1.2): bad, and now more likely
        (0.5, 1.0, 0.2, -0.5, -0.5, 0, 0),  # -min(0.5, 0.8): good, and now less likely
        (0.5, -1.0, 0.2, 0.8, 0.0, 1, 0),  # -min(-0.5, -0.8): bad, and already unlikely
        (1.5, 1.0, 0.5, -1.5, -1.5, 0, 0),  # a wider clip range; its ends are not clipped
        (0.5, -1.0, 0.5, 0.5, 0.5, 0, 0),
        *[(ratio, 0.0, 0.2, 0.0, 0.0, 0, 0) for ratio in (0.5, 1.5)],
    ],
)
def test_clipping(ratio, A, clip, loss, gradient, low, high):
    found, grad, stats = loss_of([[ratio]], [A], clip=clip)
    assert found == approx(loss) and grad == [[approx(gradient)]]
    clipped = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high}
    assert stats == {"kl": 0.0, "ratio": approx(ratio)} | clipped


def test_defaults_and_no_reference():
    assert loss_of([[1.5]], [1.0])[0] == approx(-1.2)  # clip 0.2
    # beta 0.001; e^d - d - 1 of d = 10 is 22015.466.
    assert loss_of([[1.0]], [0.0], d=[[10.0]])[0] == approx(22.015466)
    assert loss_of([[1.0]], [0.0], d=None, beta=100.0)[:2] == (0, [[0]])


def test_a_token_that_all_completions_share_gets_no_policy_gradient():
    """So GRPO cannot change a first look that all samples of a group share."""
    shared = torch.tensor(-1.0, requires_grad=True)
    own = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    logps = torch.stack([shared.expand(3), own], 1)  # (3, 2)
    advantages = reward.group_advantages(torch.tensor([1.0, 0.5, -1.0]))
    mask = torch.ones(3, 2, dtype=torch.bool)
    reward.grpo_loss(logps, logps.detach(), None, advantages, mask)[0].backward()
    assert shared.grad.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(own.grad, -advantages / 6)


def test_the_denominator_divides_policy_loss_and_kl():
    args = [[1.0] * 3] * 2, [1.0, -1.0], [[math.log(2)] * 3] * 2, [[1, 1, 1], [1, 0, 0]]
    loss, grad, _ = loss_of(*args, beta=1.0, denominator=10)
    assert loss == approx((-3 + 1 + 4 * (1 - math.log(2))) / 10)
    assert grad == [[approx((-1 - 1) / 10)] * 3, [approx((1 - 1) / 10), 0.0, 0.0]]
    for denominator in (None, 0):  # without tokens, loss and gradient are 0
        loss, grad, stats = loss_of([[1.0]], [1.0], [[0.1]], [[0]], denominator=denominator)
        assert loss == 0 and grad == [[0]] and set(stats.values()) == {0.0}


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
def test_log_ratios_are_clamped_to_keep_exp_finite(gap):
    # logp - old_logp and ref_logp - logp are this gap, clamped to 20 or -20.
    clamped = math.copysign(20, gap)
    logps, far = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), gap)
    args = logps, -far, far, torch.tensor([-1.0]), bools([1])
    loss, stats = reward.grpo_loss(*args, clip=INF, beta=1.0)
    loss.backward()
    assert stats["ratio"] == pytest.approx(math.exp(clamped), rel=1e-5)
    assert stats["kl"] == pytest.approx(math.exp(clamped) - clamped - 1, rel=1e-5)
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_padding_reaches_neither_loss_nor_gradient(garbage):
    mask, results = bools([1, 1], [1, 0]), []
    for padding in (0.0, garbage):
        rows = (torch.full((2, 2), value) for value in (-1.0, -1.1, -0.8))
        logps, old, ref = (row.masked_fill(~mask, padding) for row in rows)
        logps.requires_grad_()
        loss, stats = reward.grpo_loss(logps, old, ref, torch.tensor([1.0, -0.5]), mask)
        loss.backward()
        results.append((loss.item(), logps.grad.tolist(), stats))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "attention, region, auroc, rho, pointing, mass",
    [
        # Ties: 1/2 + 1 + 0 + 1/2 of 4; one of the two largest cells is inside.
        ([0.3, 0.3, 0.1, 0.1], [1, 0, 1, 0], 1 / 2, 1.0, 1 / 2, 0.8),
        # Ties: 1/2 + 1 + 1/2 + 1 of 4; two of the three largest; a = 0.2, v = 0.7 / 4.
        ([0.2, 0.2, 0.2, 0.1], [1, 1, 0, 0], 3 / 4, 8 / 7, 2 / 3, 0.7),
        # One cell gets all attention.
        ([0.0, 0.0, 1.0, 0.0], [0, 0, 1, 0], 1, 4.0, 1, 1.0),
        # Uniform attention is at chance, and the region of the whole image has no AUROC.
        ([0.01] * 4, [1, 0, 0, 0], 1 / 2, 1.0, 1 / 4, 0.04),
        ([0.4, 0.3, 0.2, 0.1], [1, 1, 1, 1], NAN, 1.0, 1, 1.0),
    ],
)
def test_localization_of_a_map(attention, region, auroc, rho, pointing, mass):
    scores = reward.localization(torch.tensor(attention), bools(*region))
    expected = [auroc, rho, pointing, rho**2 / (rho**2 + 1), mass]  # in the order of its keys
    assert list(scores.values()) == pytest.approx(expected, nan_ok=True)
    assert all(type(score) is float for score in scores.values())


@pytest.mark.parametrize(
    "name, call",
    [
        ("mask", lambda m: reward.select_tokens(torch.ones(1, 2), m[None])),
        ("region", lambda m: reward.attention_reward(torch.ones(1, 1, 2), m, bools([1]))),
        ("selected", lambda m: reward.attention_reward(torch.ones(1, 2, 2), bools(1, 0), m[None])),
        ("mask", lambda m: reward.grpo_loss(*[torch.ones(1, 2)] * 3, torch.ones(1), m[None])),
        ("region", lambda m: reward.localization(torch.ones(2), m)),
        ("before_answer", lambda m: reward.early_and_late(torch.ones(2, 2), bools(1, 0), m)),
    ],
)
def test_a_mask_that_is_not_bool_is_refused_by_name(name, call):
    """Its zeros and ones would be used as indices."""
    call(bools(1, 0))
    with pytest.raises(ValueError, match=f"{name} is torch.int64: a mask must be bool"):
        call(torch.tensor([1, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    # 1 + 300 cells of 2^-10, exact in both types. A sum in bf16 would stay 1.
    cells = torch.full((301,), 2.0**-10, dtype=dtype)
    cells[0] = 1
    region, rho = torch.arange(301) < 1, 301 / (1 + 300 / 1024)  # a = 1, v = (1 + 300 / 1024) / 301
    ratio = reward.attention_ratio(cells[None, None], region, bools([1]))
    assert ratio.dtype == torch.float32 and ratio.item() == approx(rho)
    scores = reward.localization(cells, region)
    assert (scores["image_mass"], scores["mass_over_area"]) == approx((1 + 300 / 1024, rho))
    # mean 0.5, std sqrt((0.0625 + 0.25) * 2 / 3)
    advantages = reward.group_advantages(torch.tensor([0.25, 0.75, 0.0, 1.0], dtype=dtype))
    assert advantages[3].item() == pytest.approx(0.5 / (math.sqrt(0.625 / 3) + 1e-4), rel=1e-6)
    # Log-ratios of 1/8 are exact in both types, exp(1/8) is not.
    logps = torch.tensor([[-1.0, -1.25]], dtype=dtype)
    args = logps, logps - 0.125, logps + 0.25, torch.tensor([0.5], dtype=dtype), bools([1, 1])
    loss, _ = reward.grpo_loss(*args, beta=0.1)
    expected = -0.5 * math.exp(0.125) + 0.1 * (math.exp(0.25) - 1.25)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
