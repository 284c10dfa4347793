"""analysis/summary.py: the intervals are the textbook's; the table has the results in its cells."""

import math

from analysis.summary import confidence_interval, results_table


def test_confidence_intervals():
    # Wilson, 8 of 10: center (0.8 + 1.9208 / 10) / 1.38416,
    # half width 1.96 sqrt(0.016 + 0.009604) / 1.38416
    assert confidence_interval([1.0] * 8 + [0.0] * 2, proportion=True) == "0.800 [0.490, 0.943]"
    # The normal interval would have no width.
    assert confidence_interval([1.0] * 10, proportion=True) == "1.000 [0.722, 1.000]"
    # The mean of 1, 2, 3 is 2, the standard deviation 1, the half width 1.96 / sqrt(3).
    assert confidence_interval([1.0, 2.0, 3.0]) == "2.000 [0.868, 3.132]"
    assert confidence_interval([1.0, math.nan, 2.0, 3.0]) == "2.000 [0.868, 3.132]"
    assert confidence_interval([1.0]) == "-"


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
