"""Tests of reward.py against numbers worked out by hand, with the arithmetic next to each, and of
the measures of reward hacking in analysis/metrics.py."""

import math
import random

import pytest
import torch

import reward
from analysis.metrics import has_unclosed_tag, repeated_sentences, seq_rep_3

INF, NAN = math.inf, math.nan


def approx(x):
    return pytest.approx(x, rel=1e-5, abs=1e-5)


def bools(*values):
    return torch.tensor(values).bool()


def lengths_mask(lengths, width):
    """A mask of right-padded rows, true on the first n positions of each."""
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def picked(row):
    return row.nonzero().flatten().tolist()


# --- select_tokens ---


@pytest.mark.parametrize(
    "entropy, fraction, expected",
    [
        ([0.5, 0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.4, 0.6, 0.0], 0.3, [1, 3, 6]),  # floor(3.0) = 3
        ([0.5, 0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.4, 0.6], 0.3, [1, 3]),  # floor(2.7) = 2
        ([0.5, 0.9, 0.1], 0.3, [1]),  # floor(0.9) = 0, but at least 1
        ([0.0], 0.3, [0]),
        ([0.5, 0.9, 0.1], 1.0, [0, 1, 2]),
        ([0.4] * 10, 0.3, [0, 1, 2]),  # ties: the lowest index
        # floor(2.0) = 2 of three equal values: the first two
        ([0.1, 0.7, 0.2, 0.7, 0.7], 0.4, [1, 3]),
    ],
)
def test_highest_entropies_are_selected(entropy, fraction, expected):
    mask = torch.ones(1, len(entropy)).bool()
    selected = reward.select_tokens(torch.tensor([entropy]), mask, fraction)
    assert selected.dtype == torch.bool and picked(selected[0]) == expected


def test_default_fraction_is_0_3():
    selected = reward.select_tokens(torch.arange(20.0)[None], torch.ones(1, 20).bool())
    assert picked(selected[0]) == [14, 15, 16, 17, 18, 19]


def test_ties_of_many_tokens_go_to_the_lowest_index():
    # An unstable sort may keep the order of a few equal values by chance, but not of 1000.
    selected = reward.select_tokens(torch.zeros(1, 1000), torch.ones(1, 1000).bool(), 0.3)
    assert picked(selected[0]) == list(range(300))


def test_count_is_the_exact_floor_of_each_completions_own_length():
    # In floats 0.29 * 100 is 28.999999999999996, but 29 tokens must be selected. The expected count
    # is computed with integers.
    lengths = range(1, 201)
    entropy = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    mask = lengths_mask(lengths, 200)
    for percent in range(1, 101):
        count = reward.select_tokens(entropy, mask, percent / 100).sum(1).tolist()
        assert count == [max(1, percent * n // 100) for n in lengths], percent


def test_fraction_is_of_the_real_tokens_and_not_of_the_padded_length():
    # Defect 2 of the official code: 30 % of the padded 20 would be 6 in both rows.
    entropy = torch.arange(20.0).repeat(2, 1)
    selected = reward.select_tokens(entropy, lengths_mask([10, 20], 20), 0.3)
    assert picked(selected[0]) == [7, 8, 9] and picked(selected[1]) == [14, 15, 16, 17, 18, 19]


@pytest.mark.parametrize("garbage", [INF, NAN, 1e30, -INF])
def test_padding_is_never_selected(garbage):
    entropy = torch.tensor([[0.1, 0.3, 0.2, garbage, garbage, garbage], [garbage] * 6])
    selected = reward.select_tokens(entropy, lengths_mask([3, 0], 6), 0.7)
    assert picked(selected[0]) == [1, 2]  # floor(2.1) = 2
    assert picked(selected[1]) == []  # an empty row selects nothing


def test_mask_may_have_gaps():
    entropy = torch.tensor([[9.0, 1.0, 9.0, 2.0, 3.0, 9.0]])
    selected = reward.select_tokens(entropy, bools([0, 1, 0, 1, 1, 0]), 0.67)
    assert picked(selected[0]) == [3, 4]  # floor(0.67 * 3) = 2


# --- align_attention ---

FIRST = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]  # (C, N)
SECOND = [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]
ATTENTION = torch.tensor([FIRST, SECOND])  # (G, C, N)
PROMPT_ROW = torch.tensor([0.5, 0.25])  # (N,)


def test_query_alignment_uses_the_row_of_the_token_itself():
    assert torch.equal(reward.align_attention(ATTENTION, PROMPT_ROW, "query"), ATTENTION)
    assert torch.equal(reward.align_attention(ATTENTION, PROMPT_ROW), ATTENTION)  # the default


def test_predict_alignment_uses_the_row_before_and_the_prompt_for_the_first_token():
    expected = [[[0.5, 0.25], [1.0, 2.0], [3.0, 4.0]], [[0.5, 0.25], [7.0, 8.0], [9.0, 10.0]]]
    assert reward.align_attention(ATTENTION, PROMPT_ROW, "predict").tolist() == expected


def test_alignment_with_leading_dimensions_by_hand():
    # Two layers of one head: (L, H, C, N) with a prompt row per head, (L, H, N).
    attention = torch.tensor([[FIRST], [SECOND]])
    prompt_rows = torch.tensor([[[0.5, 0.25]], [[0.75, 0.125]]])
    expected = [
        [[[0.5, 0.25], [1.0, 2.0], [3.0, 4.0]]],
        [[[0.75, 0.125], [7.0, 8.0], [9.0, 10.0]]],
    ]
    assert reward.align_attention(attention, prompt_rows, "predict").tolist() == expected
    assert torch.equal(reward.align_attention(attention, prompt_rows, "query"), attention)


@pytest.mark.parametrize("alignment", ["query", "predict"])
def test_alignment_with_leading_dimensions_equals_a_call_per_layer_and_head(alignment):
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 2, 5, 7, generator=generator)  # (L, H, C, N)
    prompt_rows = torch.rand(3, 2, 7, generator=generator)  # (L, H, N)
    aligned = reward.align_attention(attention, prompt_rows, alignment)
    assert aligned.shape == (3, 2, 5, 7)
    for layer in range(3):
        for head in range(2):
            one = attention[layer, head], prompt_rows[layer, head]  # (C, N), (N,)
            assert torch.equal(aligned[layer, head], reward.align_attention(*one, alignment))


def test_unknown_alignment_is_refused():
    with pytest.raises(ValueError, match="sideways"):
        reward.align_attention(ATTENTION, PROMPT_ROW, "sideways")


# --- early_and_late ---


def looks(rows, region, selected):
    return reward.early_and_late(torch.tensor(rows), bools(*region), bools(*selected))


def test_early_and_late_looks_by_hand():
    on, off = [0.4, 0.1, 0.1, 0.0], [0.1, 0.3, 0.1, 0.1]  # cell 0: 0.4 / 0.15, and 0.1 / 0.15
    region = [1, 0, 0, 0]
    assert looks([on, off], region, [1, 1]) == [True, False]
    assert looks([off, on, on], region, [1, 1, 1]) == [False, True]
    assert looks([off, on, off], region, [0, 1, 0]) == [True, True]  # one token is both looks
    assert looks([off, on, off, on], region, [0, 1, 1, 0]) == [True, False]
    # Four tokens: two each, (0.4 + 0.1) / 2 = 0.25 above 0.15. Off and off: 0.1.
    assert looks([on, off, off, off], region, [1, 1, 1, 1]) == [True, False]
    # Seven tokens: three each. 0.4 + 0 + 0 and 0.4 + 0.1 + 0.1 against 3 * 0.15 = 0.45.
    never = [0.0, 0.3, 0.2, 0.1]
    rows = [on, never, never, on, on, off, off]
    assert looks(rows, region, [1] * 7) == [False, True]
    even = [0.1, 0.1, 0.1, 0.1]  # a uniform look is not on the region
    assert looks([even], region, [1]) == [False, False]


def test_looks_in_16_bits_and_with_masks_that_are_not_bool():
    rows = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.bfloat16)
    assert reward.early_and_late(rows, bools(1, 0), bools(1, 1)) == [True, False]
    with pytest.raises(ValueError, match="must be bool"):
        reward.early_and_late(rows, torch.tensor([1, 0]), bools(1, 1))
    with pytest.raises(ValueError, match="selected is torch.int64: a mask must be bool"):
        reward.early_and_late(rows, bools(1, 0), torch.tensor([1, 0]))


# --- attention_reward, attention_ratio ---


def ratio_and_reward(rows, region, selected=None, **kw):
    """rho and r_v of one completion, as two numbers."""
    attention = torch.tensor([rows], dtype=torch.float32)
    selected = torch.ones(1, len(rows)).bool() if selected is None else bools(selected)
    args = attention, bools(*region), selected
    return reward.attention_ratio(*args, **kw).item(), reward.attention_reward(*args, **kw).item()


@pytest.mark.parametrize(
    "rows, region, rho",
    [
        # a = 0.4 / 2 = 0.2, v = 0.5 / 4 = 0.125
        ([[0.3, 0.1, 0.05, 0.05]], [1, 1, 0, 0], 1.6),
        # a = 0.1 / 2 = 0.05, v = 0.125
        ([[0.3, 0.1, 0.05, 0.05]], [0, 0, 1, 1], 0.4),
        # means over the tokens: cell 0 gets 0.3, the image (0.5 + 0.3) / 2 = 0.4; v = 0.4 / 2 = 0.2
        ([[0.4, 0.1], [0.2, 0.1]], [1, 0], 1.5),
        # uniform attention of any strength
        ([[0.01] * 7], [0, 1, 1, 0, 0, 0, 0], 1.0),
        ([[0.125] * 8, [0.001] * 8], [1] + [0] * 7, 1.0),
        # the whole image
        ([[0.3, 0.1, 0.05, 0.05]], [1, 1, 1, 1], 1.0),
    ],
)
def test_ratio_and_reward_by_hand(rows, region, rho):
    expected = (rho**2 - 1) / (rho**2 + 1)  # tanh(log rho), written without either
    assert ratio_and_reward(rows, region) == (approx(rho), approx(expected))


def test_reward_is_a_ratio_of_means_and_not_a_mean_of_ratios():
    # Token 1 pays little attention to the image, most of it to the region: 0.08 / 0.025 = 3.2.
    # Token 2 pays a lot, most of it elsewhere: 0.1 / 0.25 = 0.4. The mean of the ratios is 1.8.
    # The ratio of the means is below 1: a = (0.08 + 0.1) / 2 = 0.09, v = (0.1 + 1.0) / 8 = 0.1375,
    # and rho = 36 / 55.
    rho, r = ratio_and_reward([[0.08, 0.02, 0.0, 0.0], [0.1, 0.3, 0.3, 0.3]], [1, 0, 0, 0])
    assert rho == approx(36 / 55)
    assert r == approx((36**2 - 55**2) / (36**2 + 55**2))  # -1729 / 4321 = -0.400


def test_uniform_attention_has_a_reward_of_zero():
    assert ratio_and_reward([[0.02] * 50] * 3, [1] * 5 + [0] * 45)[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cells, cap", [(50, 0.60), (25, 0.88), (10, 0.98)])
def test_reward_is_capped_by_the_size_of_the_region(cells, cap):
    # All attention inside: rho = N / |R| = 100 / cells. 3/5 = 0.600, 15/17 = 0.882, 99/101 = 0.980.
    region = [1] * cells + [0] * (100 - cells)
    rho, r = ratio_and_reward([[1 / cells] * cells + [0.0] * (100 - cells)], region)
    assert rho == approx(100 / cells) and r == pytest.approx(cap, abs=0.005)
    # No other distribution has a larger rho.
    spread = torch.rand(64, 4, 100, generator=torch.Generator().manual_seed(cells)) ** 9
    rho = reward.attention_ratio(spread, bools(*region), torch.ones(64, 4).bool())
    assert (rho < 100 / cells).all()


def test_reward_is_a_function_of_rho_in_minus_one_to_one():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(200, 5, 12, generator=generator) ** 8  # peaked
    attention[:20, :, :3] = 0  # nothing in the region
    attention[20:40, :, 3:] = 0  # nothing outside
    region, selected = bools(*[1, 1, 1] + [0] * 9), torch.rand(200, 5, generator=generator) < 0.7
    selected[:, 0] = True
    kept = attention.double() * selected.unsqueeze(-1)
    rho = kept[..., :3].sum((1, 2)) / 3 / (kept.sum((1, 2)) / 12)
    r = reward.attention_reward(attention, region, selected)
    assert ((r >= -1) & (r <= 1)).all() and r.shape == (200,)
    assert torch.allclose(r.double(), (rho**2 - 1) / (rho**2 + 1), atol=1e-4)
    assert torch.allclose(r[:20], torch.tensor(-1.0))
    assert torch.allclose(r[20:40], torch.tensor(15 / 17))  # rho 4


def test_eps_is_added_to_numerator_and_denominator():
    # (3e-8 + 1e-8) / (1.5e-8 + 1e-8) = 1.6 (without eps it would be 2); r = 1.56 / 3.56
    expected = approx(1.6), approx(1.56 / 3.56)
    assert ratio_and_reward([[3e-8, 0.0]], [1, 0]) == expected
    assert ratio_and_reward([[3.0, 0.0]], [1, 0], eps=1.0) == expected
    # No attention to the image at all counts as uniform.
    assert ratio_and_reward([[0.0, 0.0]], [1, 0]) == (approx(1), approx(0))
    # The means are over selected tokens only, so the others do not increase the weight of eps.
    assert ratio_and_reward([[3e-8, 0.0], [0.0, 0.0]], [1, 0], [1, 0]) == expected


def test_only_selected_tokens_count():
    rows = [[0.0, 0.9], [0.2, 0.1], [0.0, 0.9]]
    # row 1 alone: a = 0.2, v = 0.15, rho = 4/3, r = (16 - 9) / (16 + 9)
    assert ratio_and_reward(rows, [1, 0], [0, 1, 0]) == (approx(4 / 3), approx(7 / 25))


def test_completion_without_selected_tokens_gets_minus_one():
    attention = torch.full((3, 2, 4), 0.25)
    r = reward.attention_reward(attention, bools(1, 0, 0, 0), bools([1, 1], [0, 0], [0, 1]))
    assert r.tolist() == [approx(0), -1.0, approx(0)]
    # Its rho is not NaN, which would make every logged mean NaN.
    assert ratio_and_reward([[0.5, 0.1]], [1, 0], [0]) == (approx(1), -1.0)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_garbage_at_padding_does_not_change_the_reward(garbage):
    clean = [[0.3, 0.1, 0.05, 0.05]]
    attention = torch.tensor([clean + [[garbage] * 4], [[garbage] * 4] * 2])
    r = reward.attention_reward(attention, bools(1, 1, 0, 0), bools([1, 0], [0, 0]))
    assert r.tolist() == [approx(1.56 / 3.56), -1.0]  # rho 1.6


@pytest.mark.parametrize("measure", [reward.attention_reward, reward.attention_ratio])
@pytest.mark.parametrize(
    "attention, region, selected",
    [
        pytest.param((2, 3, 4), [0, 0, 0, 0], (2, 3), id="empty region"),
        pytest.param((2, 3, 4), [1, 0, 0], (2, 3), id="region too short"),
        pytest.param((2, 3, 4), [1, 0, 0, 0, 0], (2, 3), id="region too long"),
        pytest.param((2, 3, 4), [1, 0, 0, 0], (2, 2), id="other C"),
        pytest.param((2, 3, 4), [1, 0, 0, 0], (1, 3), id="other G"),
        pytest.param((3, 4), [1, 0, 0, 0], (2, 3), id="no G"),
    ],
)
def test_empty_regions_and_mismatched_shapes_are_refused(measure, attention, region, selected):
    with pytest.raises(ValueError):
        measure(torch.ones(attention), bools(*region), torch.ones(selected).bool())


# --- find_answer, format_reward, accuracy_reward ---

ONE = "I look. <answer>red</answer>"
TEXTS = [
    (ONE, "red"),
    ("<answer> red\n</answer> and more", "red"),
    ("<answer>a < b</answer>", "a < b"),
    ("<answer>two\nlines</answer>", "two\nlines"),
    ("", None),
    ("red", None),
    ("<answer></answer>", None),
    ("<answer> \n\t</answer>", None),
    ("<answer>red", None),  # unclosed
    ("red</answer>", None),  # never opened
    ("</answer>red<answer>", None),  # in the wrong order
    ("</answer> or <answer>red", None),
    ("<answer>red<answer>", None),
    ("<answer>red</answer><answer>red</answer>", None),  # doubled
    ("<answer>red</answer> or <answer>blue", None),
    ("<answer>red</answer> or blue</answer>", None),
    ("</answer><answer>red</answer>", None),
    ("<answer><answer>red</answer></answer>", None),  # nested
    ("<answer><answer>red</answer>", None),
    ("<ANSWER>red</ANSWER>", None),
    ("<answer >red</answer>", None),
]


@pytest.mark.parametrize("text, found", TEXTS)
def test_find_answer_requires_exactly_one_well_formed_answer(text, found):
    assert reward.find_answer(text) == found


@pytest.mark.parametrize("text, found", TEXTS)
def test_format_and_accuracy_agree_with_find_answer(text, found):
    assert reward.format_reward(text, 80) == (1.0 if found else 0.0)
    assert reward.accuracy_reward(text, found or "red") == (1.0 if found else 0.0)


@pytest.mark.parametrize(
    "n, lengths, expected",
    [
        (0, (), 0.0),
        (1, (), 0.01),  # 0.6 * 1 / 60
        (30, (), 0.3),  # 0.6 * 30 / 60
        (59, (), 0.59),
        (60, (), 1.0),
        (61, (), 1.0),
        (99, (), 1.0),
        (100, (), 1.0),
        (101, (), 60 / 101),  # 0.6 * 100 / 101
        (120, (), 0.5),
        (600, (), 0.1),
        (3, (4, 10), 0.45),  # 0.6 * 3 / 4
        (4, (4, 10), 1.0),
        (10, (4, 10), 1.0),
        (12, (4, 10), 0.5),  # 0.6 * 10 / 12
        (0, (0, 10), 1.0),  # no minimum length
    ],
)
def test_format_reward_is_lower_for_too_few_or_too_many_tokens(n, lengths, expected):
    value = reward.format_reward(ONE, n, *lengths)
    assert type(value) is float and value == pytest.approx(expected)
    assert reward.format_reward("<answer>red", n, *lengths) == 0.0


@pytest.mark.parametrize(
    "said, answer, expected",
    [
        ("red", "red", 1),
        ("RED", "red", 1),
        ("red", "Red", 1),
        ("  red ", "red", 1),
        ("Red.", "red", 1),
        ("red", "red.", 1),
        ("red !", "red", 1),
        ("red?!...", "red", 1),
        ("light\n  blue", "light blue", 1),
        ("STRASSE", "straße", 1),  # letter case beyond ASCII
        ("3.5", "3.5", 1),
        # A substring is wrong, in either direction (defect 9 of the official code).
        ("a", "a red card", 0),
        ("a red card", "a", 0),
        ("red", "redder", 0),
        ("infrared", "red", 0),
        ("red or blue", "red", 0),
        ("1", "10", 0),
        ("10", "1", 0),
        ("blue", "red", 0),
        ("-5", "5", 0),  # only trailing punctuation is ignored
        (".5", "5", 0),
        ("3.5", "35", 0),
        ("lightblue", "light blue", 0),
    ],
)
def test_accuracy_compares_the_whole_answer(said, answer, expected):
    value = reward.accuracy_reward(f"I look. <answer>{said}</answer>", answer)
    assert type(value) is float and value == expected


def test_answer_outside_the_tags_is_not_right():
    assert reward.accuracy_reward("It is red. <answer>blue</answer>", "red") == 0
    assert reward.accuracy_reward("It is red.", "red") == 0


# --- analysis/metrics.py: signs of reward hacking ---


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", 0),
        (" .. \n", 0),
        ("I look", 0),
        ("I look. I see. I answer.", 0),
        ("I look. I look.", 1 / 2),
        ("I look. I look! I LOOK?", 2 / 3),
        ("I look. I see.\nI look\nI see. So.", 2 / 5),
        ("I look... I look", 1 / 2),
        ("I look. I look again.", 0),  # containing an earlier sentence is not repeating it
        ("It is 3.5. Or is it 4.5.", 0),  # a decimal point does not end a sentence
    ],
)
def test_repeated_sentences_is_the_share_of_repeated_ones(text, expected):
    assert repeated_sentences(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", 0),
        ("red card", 0),  # no triple
        ("the dot on red r3 c5 is blue . <answer> blue </answer>", 0),
        ("red card red card red card", 2 / 4),  # rcr crc rcr crc
        ("Red red RED red", 1 / 2),
        ("card " * 12, 9 / 10),
    ],
)
def test_seq_rep_3_is_the_share_of_repeated_word_triples(text, expected):
    assert seq_rep_3(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", False),
        ("red", False),
        ("<answer>red</answer>", False),
        ("<answer>red", True),
        ("red</answer>", False),
        ("<answer>red</answer> or <answer>blue", True),
    ],
)
def test_unclosed_tag_is_an_answer_opened_but_not_closed(text, expected):
    assert has_unclosed_tag(text) == expected


# --- group_advantages ---


@pytest.mark.parametrize(
    "rewards, kw, expected",
    [
        # mean 2, variance (1 + 0 + 1) / (3 - 1) = 1
        ([1.0, 2.0, 3.0], {}, [-1 / 1.0001, 0, 1 / 1.0001]),
        ([1.0, 2.0, 3.0], {"eps": 1.0}, [-0.5, 0, 0.5]),
        # mean 0.5, variance (0.25 + 0.25) / 1; without Bessel's correction the advantage would be 1
        ([0.0, 1.0], {}, [-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)]),
        # mean 0.25, variance (3 / 16 + 9 / 16) / 3 = 0.25
        ([0.0, 0.0, 0.0, 1.0], {}, [-0.25 / 0.5001] * 3 + [0.75 / 0.5001]),
        # a difference of 1e-4 is not amplified to 1: std 7.07e-5, 5e-5 / 1.707e-4
        ([0.0, 1e-4], {}, [-0.29289, 0.29289]),
    ],
)
def test_advantages_by_hand(rewards, kw, expected):
    assert reward.group_advantages(torch.tensor(rewards), **kw).tolist() == [
        approx(x) for x in expected
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -0.7, 1e6 + 0.1])
@pytest.mark.parametrize("G", [2, 3, 7, 16])
def test_equal_rewards_have_an_advantage_of_exactly_zero(value, G, dtype):
    # In floats the mean of three 0.1 is not 0.1. Divided by a tiny std, the difference is not tiny.
    assert reward.group_advantages(torch.full((G,), value, dtype=dtype)).tolist() == [0.0] * G


@pytest.mark.parametrize("rewards", [[0.5], []])
def test_group_of_one_is_refused(rewards):
    with pytest.raises(ValueError, match="num_generations"):
        reward.group_advantages(torch.tensor(rewards))


# --- grpo_loss ---


def loss_of(ratios, advantages, d=None, mask=None, **kw):
    """Returns: (loss, gradient of logps, stats). Args: ratios and d = ref - logp, both (G, C)."""
    logps = torch.full((len(ratios), len(ratios[0])), -1.5, dtype=torch.float64, requires_grad=True)
    base = logps.detach()
    ref = None if d is None else base + torch.tensor(d, dtype=torch.float64)
    mask = torch.ones_like(base).bool() if mask is None else bools(*mask)
    old = base - torch.tensor(ratios, dtype=torch.float64).log()
    A = torch.tensor(advantages, dtype=torch.float64)
    loss, stats = reward.grpo_loss(logps, old, ref, A, mask, **kw)
    loss.backward()
    assert loss.shape == () and all(type(value) is float for value in stats.values())
    return loss.item(), logps.grad.tolist(), stats


@pytest.mark.parametrize(
    "ratio, A, clip, loss, gradient, low, high",
    [
        (1.0, 2.0, 0.2, -2.0, -2.0, 0, 0),
        # inside the clip range: -ratio * A, and its derivative in logp is the same
        (1.1, 2.0, 0.2, -2.2, -2.2, 0, 0),
        (0.9, -2.0, 0.2, 1.8, 1.8, 0, 0),
        (1.5, 1.0, 0.2, -1.2, 0.0, 0, 1),  # -min(1.5, 1.2): good, already likely enough
        (1.5, -1.0, 0.2, 1.5, 1.5, 0, 0),  # -min(-1.5, -1.2): bad and now more likely
        (0.5, 1.0, 0.2, -0.5, -0.5, 0, 0),  # -min(0.5, 0.8)
        (0.5, -1.0, 0.2, 0.8, 0.0, 1, 0),  # -min(-0.5, -0.8): bad, already unlikely
        (1.5, 1.0, 0.6, -1.5, -1.5, 0, 0),  # a wider clip range
        (0.5, -1.0, 0.6, 0.5, 0.5, 0, 0),
        (1.5, 0.0, 0.2, 0.0, 0.0, 0, 0),
    ],
)
def test_clipping_on_both_sides_for_both_signs(ratio, A, clip, loss, gradient, low, high):
    found, grad, stats = loss_of([[ratio]], [A], clip=clip)
    assert found == approx(loss) and grad == [[approx(gradient)]]
    assert stats == {
        "kl": 0.0,
        "ratio": approx(ratio),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
    }


def test_default_clip_is_0_2():
    assert loss_of([[1.5]], [1.0])[0] == approx(-1.2)


def test_stats_are_means_over_tokens():
    # ratios 1.5, 1.0 | 0.5, 0.5: of four tokens one is clipped above and two below
    stats = loss_of([[1.5, 1.0], [0.5, 0.5]], [1.0, -1.0])[2]
    assert stats == {
        "kl": 0,
        "ratio": approx(0.875),
        "clip_ratio/low_mean": 0.5,
        "clip_ratio/high_mean": 0.25,
    }


def test_k3_by_hand():
    # d = log 2: k3 = 2 - log 2 - 1, derivative in logp 1 - 2.
    # d = -log 2: k3 = 1/2 + log 2 - 1, derivative 1 - 1/2. The two k3 add up to 1/2.
    log2 = math.log(2)
    loss, grad, stats = loss_of([[1.0, 1.0]], [0.0], d=[[log2, -log2]], beta=0.5)
    assert stats["kl"] == approx(0.25)
    assert loss == approx(0.5 * 0.25)
    assert grad == [[approx(0.5 * -1 / 2), approx(0.5 * 0.5 / 2)]]
    # plus the policy loss, -(1 + 1) / 2; beta is 0.001 by default
    assert loss_of([[1.0, 1.0]], [1.0], d=[[log2, -log2]])[0] == approx(-1 + 0.00025)


def test_without_a_reference_there_is_no_kl():
    loss, grad, stats = loss_of([[1.0, 1.0]], [0.0], d=None, beta=100.0)
    assert loss == 0 and grad == [[0.0, 0.0]]
    clip = {"clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0}
    assert stats == {"kl": 0.0, "ratio": 1.0} | clip


@pytest.mark.parametrize("d, k3", [(1000.0, math.exp(20) - 21), (-1000.0, math.exp(-20) + 19)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_cannot_overflow(d, k3, dtype):
    logps = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    args = logps, logps.detach(), torch.full_like(logps, d), torch.zeros(1, dtype=dtype), bools([1])
    loss, stats = reward.grpo_loss(*args, beta=1.0)
    loss.backward()
    assert stats["kl"] == pytest.approx(k3, rel=1e-5) and loss.item() == pytest.approx(k3, rel=1e-5)
    assert logps.grad.isfinite().all()


def test_clipped_ratio_too_large_for_floats_has_no_gradient():
    # exp(1000) is inf. With A > 0 clipping fixes the loss at -1.2 for any logp.
    logps = torch.zeros(1, 1, requires_grad=True)
    loss, _ = reward.grpo_loss(logps, torch.full((1, 1), -1000.0), None, torch.ones(1), bools([1]))
    loss.backward()
    assert loss.item() == approx(-1.2) and logps.grad.tolist() == [[0.0]]


def test_on_policy_loss_and_gradient():
    # Ratio exactly 1: loss = -(3 tokens * 1 + 1 token * -1) / 4, gradient -A / 4 at each of the
    # four tokens. The mean is over tokens; a mean over completions first would be 0.
    mask = [[1, 1, 1], [1, 0, 0]]
    loss, grad, stats = loss_of([[1.0] * 3] * 2, [1.0, -1.0], mask=mask)
    assert loss == approx(-0.5) and stats["ratio"] == 1.0
    assert grad == [[approx(-0.25)] * 3, [approx(0.25), 0.0, 0.0]]


def test_denominator_divides_policy_loss_and_kl():
    args = [[1.0] * 3] * 2, [1.0, -1.0], [[math.log(2)] * 3] * 2, [[1, 1, 1], [1, 0, 0]]
    loss, grad, _ = loss_of(*args, beta=1.0, denominator=10)
    k3 = 1 - math.log(2)
    assert loss == approx((-3 + 1 + 4 * k3) / 10)
    assert grad == [[approx((-1 - 1) / 10)] * 3, [approx((1 - 1) / 10), 0.0, 0.0]]


def test_micro_batches_with_a_shared_denominator_add_up_to_the_whole():
    ratios, A = [[1.3, 0.6], [0.9, 1.0]], [0.7, -1.1]
    d, mask = [[0.2, -0.3], [0.1, 0.0]], [[1, 1], [1, 0]]
    whole, grad, _ = loss_of(ratios, A, d, mask)
    parts = [loss_of([ratios[i]], [A[i]], [d[i]], [mask[i]], denominator=3) for i in range(2)]
    assert whole == approx(sum(part[0] for part in parts))
    assert grad == [pytest.approx(part[1][0]) for part in parts]


def test_group_without_tokens_has_zero_loss_and_gradient():
    loss, grad, stats = loss_of([[1.0, 1.0]], [1.0], d=[[0.1, 0.1]], mask=[[0, 0]])
    assert loss == 0 and grad == [[0.0, 0.0]] and set(stats.values()) == {0.0}


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("where", ["logps", "old_logps", "ref_logps"])
def test_garbage_at_padding_reaches_neither_loss_nor_gradient(where, garbage):
    def step(pad):
        values = {"logps": -1.0, "old_logps": -1.1, "ref_logps": -0.8}
        rows = {name: torch.full((2, 2), value) for name, value in values.items()}
        rows[where][~mask] = pad
        logps, A = rows.pop("logps").requires_grad_(), torch.tensor([1.0, -0.5])
        loss, stats = reward.grpo_loss(logps, **rows, advantages=A, mask=mask, beta=0.1)
        loss.backward()
        return loss.item(), logps.grad, stats

    mask = bools([1, 1], [1, 0])
    loss, grad, stats = step(garbage)
    clean_loss, clean_grad, clean_stats = step(-1.0)
    assert loss == clean_loss and torch.equal(grad, clean_grad) and stats == clean_stats
    assert grad[1, 1] == 0 and grad[mask].abs().min() > 0


def naive_loss(logps, old, ref, A, mask, clip, beta):
    """The formula, token by token, with Python's own min and max."""
    total, tokens = 0, 0
    for i in range(len(logps)):
        for j in range(len(logps[i])):
            if mask[i][j]:
                ratio = torch.exp(logps[i, j] - old[i, j])
                clipped = min(max(ratio, ratio.new_tensor(1 - clip)), ratio.new_tensor(1 + clip))
                gap = ref[i, j] - logps[i, j]
                kl = torch.exp(gap) - gap - 1
                total = total - min(ratio * A[i], clipped * A[i]) + beta * kl
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_a_naive_implementation(seed):
    generator = torch.Generator().manual_seed(seed)
    how = {"dtype": torch.float64, "generator": generator}
    logps, old, ref = (torch.randn(4, 9, **how) / 2 for _ in range(3))
    A = torch.randn(4, **how)
    mask = lengths_mask([9, 4, 1, 0], 9)
    found, expected = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    loss, _ = reward.grpo_loss(found, old, ref, A, mask, clip=0.3, beta=0.2)
    other = naive_loss(expected, old, ref, A, mask, 0.3, 0.2)
    loss.backward()
    other.backward()
    assert loss.item() == pytest.approx(other.item(), abs=1e-12)
    assert torch.allclose(found.grad, expected.grad, rtol=0, atol=1e-12)
    assert found.grad[~mask].eq(0).all()


# --- localization ---


def metrics(attention, region):
    return reward.localization(torch.tensor(attention), bools(*region))


@pytest.mark.parametrize(
    "attention, region, auroc, rho, pointing, mass",
    [
        # pairs (in, out): 0.4 > 0.3, 0.4 > 0.1, 0.2 < 0.3, 0.2 > 0.1. a = 0.3, v = 0.25
        ([0.4, 0.3, 0.2, 0.1], [1, 0, 1, 0], 3 / 4, 1.2, 1, 1.0),
        ([0.4, 0.3, 0.2, 0.1], [0, 1, 0, 1], 1 / 4, 0.8, 0, 1.0),
        ([0.4, 0.3, 0.2, 0.1], [1, 1, 0, 0], 1, 1.4, 1, 1.0),
        ([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1], 0, 0.6, 0, 1.0),
        # with ties: 1/2 + 1 + 0 + 1/2 of 4; one of the two largest cells is inside
        ([0.3, 0.3, 0.1, 0.1], [1, 0, 1, 0], 1 / 2, 1.0, 1 / 2, 0.8),
        # 1/2 + 1 + 1/2 + 1 of 4; two of the three largest; a = 0.2, v = 0.7 / 4
        ([0.2, 0.2, 0.2, 0.1], [1, 1, 0, 0], 3 / 4, 8 / 7, 2 / 3, 0.7),
        # all attention to the image is on one cell
        ([0.0, 0.0, 0.01, 0.0], [0, 0, 1, 0], 1, 4.0, 1, 0.01),
    ],
)
def test_localization_by_hand(attention, region, auroc, rho, pointing, mass):
    assert metrics(attention, region) == {
        "auroc": approx(auroc),
        "mass_over_area": approx(rho),
        "pointing": approx(pointing),
        "tas": approx(rho**2 / (rho**2 + 1)),  # (1 + (rho^2 - 1) / (rho^2 + 1)) / 2
        "image_mass": approx(mass),
    }


@pytest.mark.parametrize("seed", range(20))
def test_auroc_counts_pairs(seed):
    rng = random.Random(seed)
    attention = [rng.randint(1, 6) / 64 for _ in range(30)]  # few values, so many ties
    region = [1, 0] + [rng.random() < 0.3 for _ in range(28)]
    inside = [a for a, marked in zip(attention, region) if marked]
    outside = [a for a, marked in zip(attention, region) if not marked]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside)
    assert metrics(attention, region)["auroc"] == approx(wins / (len(inside) * len(outside)))


@pytest.mark.parametrize("cells", [1, 5, 12, 19])
def test_uniform_map_is_at_chance_on_every_metric(cells):
    found = metrics([0.01] * 20, [1] * cells + [0] * (20 - cells))
    chance = {
        "auroc": 0.5,
        "mass_over_area": 1,
        "pointing": cells / 20,
        "tas": 0.5,
        "image_mass": 0.2,
    }
    assert found == {name: approx(value) for name, value in chance.items()}


def test_auroc_does_not_depend_on_the_scale_of_the_map():
    attention, region = torch.tensor([0.4, 0.3, 0.2, 0.1]), bools(1, 0, 1, 0)
    scores = [reward.localization(attention * scale, region) for scale in (1.0, 1e-3)]
    for name in ("auroc", "mass_over_area", "pointing", "tas"):
        assert scores[1][name] == pytest.approx(scores[0][name], rel=1e-3)
    assert scores[1]["image_mass"] == approx(1e-3)


def test_region_of_the_whole_image_has_no_auroc():
    found = metrics([0.4, 0.3, 0.2, 0.1], [1, 1, 1, 1])
    assert math.isnan(found.pop("auroc"))
    assert found == {
        "mass_over_area": approx(1),
        "pointing": 1.0,
        "tas": approx(0.5),
        "image_mass": approx(1),
    }


def test_localization_refuses_an_empty_region():
    with pytest.raises(ValueError):
        metrics([0.4, 0.3, 0.2, 0.1], [0, 0, 0, 0])


# --- RewardInputs, REWARDS ---

# Two completions of two tokens. The image has four tokens; the first two are the region.
INPUTS = reward.RewardInputs(
    texts=["I look. <answer>Red</answer>", "<answer>blue"],
    lengths=[12, 6],
    answer="red",
    attention=torch.tensor(
        [
            [[0.3, 0.1, 0.05, 0.05], [0.0, 0.0, 0.9, 0.1]],
            [[0.0, 0.0, 0.9, 0.1], [0.1, 0.1, 0.1, 0.1]],
        ]
    ),
    region=bools(1, 1, 0, 0),
    selected=bools([1, 0], [0, 1]),
    format_lengths=(4, 10),
)


def test_registry_contains_attention_format_and_accuracy():
    assert {"attention", "format", "accuracy"} <= set(reward.REWARDS)


def test_registered_rewards_by_hand():
    # attention: rho = 0.2 / 0.125 = 1.6, r = 1.56 / 3.56; the second is uniform.
    found = reward.REWARDS["attention"](INPUTS)
    assert found.shape == (2,) and found.tolist() == [approx(1.56 / 3.56), approx(0)]
    # format: 12 tokens are more than 10, so 0.6 * 10 / 12; the second is not closed.
    assert reward.REWARDS["format"](INPUTS) == [approx(0.5), 0.0]
    # accuracy: ignores case; the second has no answer.
    assert reward.REWARDS["accuracy"](INPUTS) == [1.0, 0.0]


def test_registered_rewards_equal_their_functions():
    x = INPUTS
    expected = reward.attention_reward(x.attention, x.region, x.selected)
    assert torch.equal(reward.REWARDS["attention"](x), expected)
    expected = [reward.format_reward(text, n, 4, 10) for text, n in zip(x.texts, x.lengths)]
    assert reward.REWARDS["format"](x) == expected
    expected = [reward.accuracy_reward(text, x.answer) for text in x.texts]
    assert reward.REWARDS["accuracy"](x) == expected


# --- masks that are not bool, and half precision ---

HALVES = [[1.0, 1.0]]  # attention, entropies or log-probabilities: (G, C) = (1, 2)
MASKED_CALLS = {
    "select_tokens, mask": lambda m: reward.select_tokens(torch.tensor(HALVES), m([1, 0])[None]),
    "attention_reward, region": lambda m: reward.attention_reward(
        torch.ones(1, 1, 2), m([1, 0]), bools([1])
    ),
    "attention_reward, selected": lambda m: reward.attention_reward(
        torch.ones(1, 1, 2), bools(1, 0), m([1])[None]
    ),
    "attention_ratio, region": lambda m: reward.attention_ratio(
        torch.ones(1, 1, 2), m([1, 0]), bools([1])
    ),
    "attention_ratio, selected": lambda m: reward.attention_ratio(
        torch.ones(1, 1, 2), bools(1, 0), m([1])[None]
    ),
    "grpo_loss, mask": lambda m: reward.grpo_loss(
        *[torch.tensor(HALVES)] * 3, torch.ones(1), m([1, 0])[None]
    ),
    "localization, region": lambda m: reward.localization(torch.ones(2), m([1, 0])),
}


@pytest.mark.parametrize("call", MASKED_CALLS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_that_is_not_bool_is_refused_by_name(call, dtype):
    """As an index, 0 and 1 would be positions: r_v would be 0.649 in the README's example."""
    MASKED_CALLS[call](lambda values: torch.tensor(values).bool())  # is accepted
    with pytest.raises(ValueError, match=f"{call.split(', ')[1]} is torch"):
        MASKED_CALLS[call](lambda values: torch.tensor(values).to(dtype))


HALF_TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@HALF_TYPES
def test_attention_of_half_precision_is_computed_in_fp32(dtype):
    # 1 + 300 cells of 2^-10, all exact in both types. Summed in bf16, 1 + 2^-10 stays 1.
    attention = torch.full((301,), 2.0**-10, dtype=dtype)
    attention[0] = 1
    region = torch.arange(301) < 1
    rho = 301 / (1 + 300 / 1024)  # a = 1, v = (1 + 300 / 1024) / 301
    r_v = (rho**2 - 1) / (rho**2 + 1)
    batch = attention[None, None], region, bools([1])
    for value, expected in (
        (reward.attention_ratio(*batch), rho),
        (reward.attention_reward(*batch), r_v),
    ):
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-5)
    found = reward.localization(attention, region)
    assert found["image_mass"] == pytest.approx(1 + 300 / 1024, rel=1e-5)
    assert found["mass_over_area"] == pytest.approx(rho, rel=1e-5)
    assert found["tas"] == pytest.approx((1 + r_v) / 2, rel=1e-5)


@HALF_TYPES
def test_entropies_of_half_precision_are_ranked_and_ties_go_to_the_first(dtype):
    entropy = torch.tensor([[1.0, 3.0, 2.0, 3.0]], dtype=dtype)
    selected = reward.select_tokens(entropy, lengths_mask([4], 4), fraction=0.5)
    assert picked(selected[0]) == [1, 3]
    assert picked(reward.select_tokens(entropy, lengths_mask([4], 4), fraction=0.25)[0]) == [1]


@HALF_TYPES
def test_advantages_of_half_precision_are_computed_in_fp32(dtype):
    # mean 0.5, deviations 0.25 and 0.5, std sqrt((0.0625 * 2 + 0.25 * 2) / 3) = 0.4564
    found = reward.group_advantages(torch.tensor([0.25, 0.75, 0.0, 1.0], dtype=dtype))
    assert found.dtype == torch.float32
    std = math.sqrt(0.625 / 3) + 1e-4
    assert found.tolist() == [pytest.approx(x / std, rel=1e-6) for x in (-0.25, 0.25, -0.5, 0.5)]


@HALF_TYPES
def test_loss_of_half_precision_is_computed_in_fp32(dtype):
    # Log-ratios 1/8 and -1/8, exact in both types; exp(1/8) is not. Both are within the clip range.
    logps = torch.tensor([[-1.0, -1.25]], dtype=dtype, requires_grad=True)
    old, ref = torch.tensor([[-1.125, -1.125]], dtype=dtype), logps.detach() + 0.25
    A = torch.tensor([0.5], dtype=dtype)
    loss, stats = reward.grpo_loss(logps, old, ref, A, bools([1, 1]), beta=0.1)
    ratios, k3 = (math.exp(1 / 8), math.exp(-1 / 8)), math.exp(0.25) - 1.25
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-0.5 * sum(ratios) / 2 + 0.1 * k3, rel=1e-6)
    assert stats["kl"] == pytest.approx(k3, rel=1e-5)
    assert stats["ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-6)
    loss.backward()
    # d/dlogp of token j: (-A ratio_j + beta (1 - exp(1/4))) / 2
    expected = [(-0.5 * ratio + 0.1 * (1 - math.exp(0.25))) / 2 for ratio in ratios]
    assert logps.grad[0].tolist() == [pytest.approx(x, rel=1e-2) for x in expected]
