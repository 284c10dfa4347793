"""look.py: a hot cell lights its own pixels and no others; intervals are the textbook's."""

import math

import pytest
from PIL import Image, ImageChops

from look import before_after, interval, overlay, table


@pytest.mark.parametrize("size, grid", [((70, 70), (7, 7)), ((120, 30), (2, 8)), ((30, 90), (6, 2))])
@pytest.mark.parametrize("cell", [0, 5, 11])
def test_a_hot_cell_lights_its_own_pixels_and_no_others(size, grid, cell):
    image = Image.new("RGB", size, (40, 120, 200))
    rows, cols = grid
    hot = overlay(image, [float(i == cell) for i in range(rows * cols)], grid, size=max(size))
    box = ImageChops.difference(hot, image).getbbox()
    row, col = divmod(cell, cols)
    width, height = size[0] // cols, size[1] // rows
    assert box == (col * width, row * height, (col + 1) * width, (row + 1) * height)


def test_more_attention_is_brighter_in_grey_too():
    picture = overlay(Image.new("RGB", (50, 10)), [0.0, 0.1, 0.3, 0.6, 1.0], (1, 5), size=50).convert("L")
    grey = [picture.getpixel((5 + 10 * i, 5)) for i in range(5)]
    assert grey == sorted(grey) and len(set(grey)) == 5


def test_the_box_is_drawn_where_it_is():
    picture = overlay(Image.new("RGB", (100, 50), "gray"), [0.0] * 8, (2, 4), boxes=[(20, 10, 60, 40)], size=200)
    white = Image.eval(picture.convert("L"), lambda v: 255 if v > 250 else 0).getbbox()
    assert all(abs(a - b) <= 3 for a, b in zip(white, (40, 20, 121, 81)))


def test_an_even_or_empty_map_is_no_error():
    for value in (0.0, 0.5):
        overlay(Image.new("RGB", (20, 20)), [value] * 4, (2, 2))


def test_intervals():
    # Wilson, 8 of 10: centre (0.8 + 1.9208 / 10) / 1.38416, half width 1.96 sqrt(0.016 + 0.009604) / 1.38416
    assert interval([1.0] * 8 + [0.0] * 2, share=True) == "0.800 [0.490, 0.943]"
    assert interval([1.0] * 10, share=True) == "1.000 [0.722, 1.000]"  # the normal interval would have no width
    # mean of 1, 2, 3 is 2, standard deviation 1, half width 1.96 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == "2.000 [0.868, 3.132]"
    assert interval([1.0, math.nan, 2.0, 3.0]) == "2.000 [0.868, 3.132]"
    assert interval([1.0]) == "-"


def result(correct, auroc):
    keys = ("permuted_auroc", "mass_over_area", "pointing", "tas", "fixed_auroc", "fixed_mass_over_area", "image_mass")
    return dict.fromkeys(keys, 0.5) | {"correct": correct, "auroc": auroc, "area": 0.1, "length": 13, "grid": [2, 2],
                                       "map": [0.1, 0.2, 0.3, 0.4], "text": "the dot on red is blue"}  # fmt: skip


def test_table_and_picture(tmp_path):
    before, after = [result(0.0, 0.4)] * 5, [result(1.0, 0.9)] * 5
    lines = table(before, after).splitlines()
    assert lines[1].split()[:3] == ["greedy", "accuracy", "0.000"] and "1.000 [0.566, 1.000]" in lines[1]
    assert "0.400 [0.400, 0.400]" in lines[2] and "0.900 [0.900, 0.900]" in lines[2] and lines[2].endswith("0.500")
    scene = type("Scene", (), dict(image=Image.new("RGB", (50, 50)), boxes=[(0, 0, 9, 9)], question="?"))
    before_after([scene] * 5, before[:2], after[:2], tmp_path / "look.png")
    assert Image.open(tmp_path / "look.png").size[0] > 1000
