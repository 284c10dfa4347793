"""Tests of analysis/results_table.py: textbook confidence intervals and the cells of the table."""

import math
import random
import re

from analysis.results_table import confidence_interval, results_table

INF = math.inf


def test_confidence_intervals():
    # Wilson, 8 of 10: center (0.8 + 1.9208 / 10) / 1.38416,
    # half width 1.96 sqrt(0.016 + 0.009604) / 1.38416
    assert confidence_interval([1.0] * 8 + [0.0] * 2, proportion=True) == "0.800 [0.490, 0.943]"
    # The normal interval would have zero width.
    assert confidence_interval([1.0] * 10, proportion=True) == "1.000 [0.722, 1.000]"
    # The mean of 1, 2, 3 is 2, the standard deviation 1, the half width 1.96 / sqrt(3).
    assert confidence_interval([1.0, 2.0, 3.0], largest=INF) == "2.000 [0.868, 3.132]"
    values = [1.0, math.nan, 2.0, 3.0]
    assert confidence_interval(values, largest=INF) == "2.000 [0.868, 3.132]"
    assert confidence_interval([1.0]) == "1.000" and confidence_interval([math.nan]) == "-"


def test_intervals_stay_in_the_possible_range():
    # Inside the range, the normal interval is used: 0.5 +- 1.96 * 0.1 / sqrt(3).
    assert confidence_interval([0.4, 0.5, 0.6]) == "0.500 [0.387, 0.613]"
    # The normal interval is [-0.240, 0.740], so Wilson's for 1 of 4 is used: center
    # (0.25 + 1.9208 / 4) / 1.9604, half width 1.96 sqrt(0.046875 + 0.060025) / 1.9604 = 0.3269.
    # It depends only on the mean and n, so shared ties (0.5) get the same interval.
    assert confidence_interval([0.0, 0.0, 0.0, 1.0]) == "0.250 [0.046, 0.699]"
    assert confidence_interval([0.0, 0.0, 0.5, 0.5]).startswith("0.250 [0.046, ")
    # The normal interval has zero width. Rounding can push a mean above 1.
    assert confidence_interval([1.0] * 5) == confidence_interval([1 + 1e-15] * 5)
    assert confidence_interval([1.0] * 5) == "1.000 [0.566, 1.000]"
    # 2 +- 1.96 * 2.828 / sqrt(2), clipped at 0; a ratio has no upper bound.
    assert confidence_interval([0.0, 4.0], largest=INF) == "2.000 [0.000, 5.920]"
    rng = random.Random(0)
    for _ in range(300):
        values = [rng.choice((0, 1, rng.random())) for _ in range(rng.randint(2, 9))]
        mean, low, high = map(float, re.findall(r"[\d.]+", confidence_interval(values)))
        assert 0 <= low <= mean <= high <= 1 and low < high


def make_result(correct, auroc):
    names = ["permuted_auroc", "mass_over_area", "pointing", "tas", "image_mass"]
    names += ["fixed_auroc", "fixed_mass_over_area"]
    return dict.fromkeys(names, 0.5) | dict(correct=correct, auroc=auroc, area=0.1, length=13)


def test_results_table():
    before, after = [make_result(0.0, 0.4)] * 5, [make_result(1.0, 0.9)] * 5
    lines = results_table(before, after).splitlines()
    assert lines[1].split()[:3] == ["greedy", "accuracy", "0.000"]
    assert "1.000 [0.566, 1.000]" in lines[1]
    assert "0.400 [0.400, 0.400]" in lines[2] and "0.900 [0.900, 0.900]" in lines[2]
    assert lines[2].endswith("0.500")


def test_long_numbers_keep_their_columns_apart():
    results = [make_result(1.0, 0.4) | {"length": 110}] * 5
    *_, line = results_table(results, results).splitlines()
    assert line.split("tokens")[1].split() == ["110.000", "[110.000,", "110.000]"] * 2
    assert len({len(line) for line in results_table(results, results).splitlines()}) == 1


def test_one_example_shows_its_numbers_and_why_there_is_no_interval():
    results = [make_result(1.0, math.nan)]
    *lines, reason, dash = results_table(results, results).splitlines()
    assert "1.000" in lines[1] and "[" not in "".join(lines)
    assert "--eval_examples" in reason and "whole image" in dash


def with_looks(correct, early, late):
    looks = {"early": early, "late": late, "permuted_early": 0.0, "permuted_late": 1.0}
    return make_result(correct, 0.5) | looks


def test_looks_are_counted_with_their_accuracy():
    before = [with_looks(*row) for row in [(1.0, 1, 1), (0.0, 1, 0), (0.0, 0, 0), (1.0, 0, 1)]]
    after = [with_looks(*row) for row in [(1.0, 1, 1), (0.0, 1, 1), (1.0, 1, 1), (0.0, 0, 0)]]
    lines = results_table(before, after).splitlines()
    rows = {line[:32].strip(): line[32:].split() for line in lines}
    early = rows["early look on the region"]
    assert (early[0], early[3], early[-1]) == ("0.500", "0.750", "0.000")
    assert rows["late look on the region"][-1] == "1.000"
    assert (
        " ".join(rows["on the region, on the region"])
        == "1 answer, 100% right 3 answers, 67% right"
    )
    assert " ".join(rows["off, on the region"]) == "1 answer, 100% right 0 answers"
    assert " ".join(rows["on the region, off"]) == "1 answer, 0% right 0 answers"
    assert " ".join(rows["off, off"]) == "1 answer, 0% right 1 answer, 0% right"
    assert " ".join(rows["wrong early looks corrected"]) == "1 of 2 0 of 1"


def test_results_of_earlier_versions_have_no_looks():
    text = results_table([make_result(0.0, 0.4)] * 2, [with_looks(1.0, 1, 1)] * 2)
    assert "look" not in text
