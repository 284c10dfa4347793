"""analysis/plots.py: attention maps and boxes are drawn at the right place."""

import pytest
from PIL import Image, ImageChops

from analysis.plots import overlay, plot_before_after
from data import Example


@pytest.mark.parametrize(
    "size, grid", [((70, 70), (7, 7)), ((120, 30), (2, 8)), ((30, 90), (6, 2))]
)
@pytest.mark.parametrize("cell", [0, 5, 11])
def test_a_hot_cell_lights_only_its_own_pixels(size, grid, cell):
    image = Image.new("RGB", size, (40, 120, 200))
    rows, cols = grid
    hot = overlay(image, [float(i == cell) for i in range(rows * cols)], grid, size=max(size))
    box = ImageChops.difference(hot, image).getbbox()
    row, col = divmod(cell, cols)
    width, height = size[0] // cols, size[1] // rows
    assert box == (col * width, row * height, (col + 1) * width, (row + 1) * height)


def test_more_attention_is_also_brighter_in_grayscale():
    attention = [0.0, 0.1, 0.3, 0.6, 1.0]
    picture = overlay(Image.new("RGB", (50, 10)), attention, (1, 5), size=50).convert("L")
    gray = [picture.getpixel((5 + 10 * i, 5)) for i in range(5)]
    assert gray == sorted(gray) and len(set(gray)) == 5


def test_the_box_is_drawn_at_its_place():
    image = Image.new("RGB", (100, 50), "gray")
    picture = overlay(image, [0.0] * 8, (2, 4), boxes=[(20, 10, 60, 40)], size=200)
    white = Image.eval(picture.convert("L"), lambda v: 255 if v > 250 else 0).getbbox()
    assert all(abs(a - b) <= 3 for a, b in zip(white, (40, 20, 121, 81)))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_uniform_or_empty_map_is_no_error(value):
    overlay(Image.new("RGB", (20, 20)), [value] * 4, (2, 2))


def test_before_after_picture(tmp_path):
    result = dict(grid=[2, 2], map=[0.1, 0.2, 0.3, 0.4], text="the dot on red is blue")
    before, after = [result | {"correct": 0.0}] * 2, [result | {"correct": 1.0}] * 2
    scenes = [Example(Image.new("RGB", (50, 50)), "?", "", [(0, 0, 9, 9)])] * 5
    plot_before_after(scenes, before, after, tmp_path / "look.png")
    assert Image.open(tmp_path / "look.png").size[0] > 1000
