"""analysis/plots.py: attention maps, boxes and text are drawn at the right place."""

import matplotlib
import pytest
from PIL import Image, ImageChops

from analysis.plots import (
    BOX_COLORS,
    COLOR_TABLE,
    RIGHT,
    WRONG,
    draw_color_bar,
    fit,
    lay_out,
    load_font,
    overlay,
    plot_before_after,
    show_boxes,
    wrap,
)
from data import Example


def find_color(picture, color):
    """The bounding box of the pixels of exactly this color, or None."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, color))
    return difference.convert("L").point(lambda v: 255 * (v == 0)).getbbox()


# --- the overlay ---


def test_the_color_map_is_inferno():
    inferno = matplotlib.colormaps["inferno"]
    for level in range(256):
        expected = [255 * v for v in inferno(level)[:3]]
        assert COLOR_TABLE[3 * level : 3 * level + 3] == pytest.approx(expected, abs=9)


@pytest.mark.parametrize(
    "size, grid", [((70, 70), (7, 7)), ((120, 30), (2, 8)), ((30, 90), (6, 2))]
)
@pytest.mark.parametrize("cell", [0, 5, 11])
def test_a_hot_cell_lights_only_its_own_pixels(size, grid, cell):
    image = Image.new("RGB", size, (40, 120, 200))
    rows, cols = grid
    dark = overlay(image, [0.0] * (rows * cols), grid, size=size)
    hot = overlay(image, [float(i == cell) for i in range(rows * cols)], grid, size=size)
    box = ImageChops.difference(hot, dark).getbbox()
    row, col = divmod(cell, cols)
    width, height = size[0] // cols, size[1] // rows
    assert box == (col * width, row * height, (col + 1) * width, (row + 1) * height)
    red, green, blue = dark.getpixel((0, 0)) if cell else dark.getpixel((size[0] - 1, 0))
    assert max(red, green, blue) - min(red, green, blue) <= 4 and green < 60  # gray and dark


@pytest.mark.parametrize("color", ["black", "gray", "yellow", "white"])
def test_more_attention_is_also_brighter_in_grayscale(color):
    attention = [0.0, 0.1, 0.2, 0.4, 0.7, 1.0]
    picture = overlay(Image.new("RGB", (60, 10), color), attention, (1, 6), size=(60, 10))
    gray = [picture.convert("L").getpixel((5 + 10 * i, 5)) for i in range(6)]
    assert gray == sorted(gray) and len(set(gray)) == 6


def test_two_maps_with_one_scale_can_be_compared():
    image = Image.new("RGB", (20, 10))
    one, other = ([0.2, 0.8], [0.2, 0.4])
    pictures = [overlay(image, x, (1, 2), size=(20, 10), highest=0.8) for x in (one, other)]
    weak, strong = ([p.getpixel((x, 5)) for p in pictures] for x in (5, 15))
    assert weak[0] == weak[1] and strong[0] != strong[1]


def test_colors_are_linear_and_end_at_the_scale():
    image = Image.new("RGB", (40, 10))
    picture = overlay(image, [0.0, 0.2, 0.4, 0.6], (1, 4), size=(40, 10), highest=0.4)
    found = [picture.getpixel((5 + 10 * i, 5)) for i in range(4)]
    expected = [tuple(COLOR_TABLE[3 * level : 3 * level + 3]) for level in (0, 128, 255, 255)]
    assert found == expected


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_uniform_or_empty_map_is_no_error(value):
    picture = overlay(Image.new("RGB", (20, 20)), [value] * 4, (2, 2), size=(20, 20))
    assert len(picture.getcolors()) == 1


def test_the_color_bar_has_the_colors_of_the_overlay():
    sheet = Image.new("RGB", (80, 200), "white")
    draw_color_bar(sheet, 0, 0, 200, highest=0.4)
    for y, attention in ((1, 0.4), (100, 0.2), (198, 0.0)):
        cell = overlay(
            Image.new("RGB", (9, 9), "gray"), [attention], (1, 1), size=(9, 9), highest=0.4
        )
        assert sheet.getpixel((3, y)) == pytest.approx(cell.getpixel((4, 4)), abs=4)


# --- boxes ---


@pytest.mark.parametrize("map", [None, [0.0] * 8])
def test_the_box_is_drawn_around_its_place(map):
    image, boxes = Image.new("RGB", (100, 50), "gray"), [(20, 10, 60, 40)]
    if map:
        picture = overlay(image, map, (2, 4), boxes, size=(200, 200))
    else:
        picture = show_boxes(image, boxes, (200, 200))
    assert picture.size == (200, 100)
    outer, inner = (find_color(picture, color) for color in BOX_COLORS)
    assert outer == (35, 15, 125, 85) and inner == (37, 17, 123, 83)
    inside = picture.crop((40, 20, 120, 80))
    assert len(inside.getcolors()) == 1  # the line covers nothing of the region


@pytest.mark.parametrize(
    "box", [(0, 0, 100, 50), (99, 0, 100, 50), (-9, -9, 1, 1), (0, 49, 200, 70)]
)
def test_a_box_at_the_edge_stays_visible(box):
    picture = show_boxes(Image.new("RGB", (100, 50), "gray"), [box], (200, 100))
    assert all(find_color(picture, color) for color in BOX_COLORS)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (400, 1)])
def test_very_small_images_can_be_drawn(size):
    image = Image.new("RGB", size, "gray")
    assert overlay(image, [0.5], (1, 1), [(0, 0, 1, 1)], size=(64, 64)).width <= 64


def test_fit_keeps_the_shape():
    assert fit(Image.new("L", (640, 480)), (310, 280)).size == (310, 232)
    assert fit(Image.new("L", (112, 112)), (310, 280)).size == (280, 280)


# --- text ---


def test_words_stay_inside_the_lines_and_keep_their_spaces():
    font, words = load_font(20), ["The", " dot", "\n", "on", "the", " un", "likely", "", " x" * 99]
    placed = lay_out(words, font, 150)
    assert [word for _, _, word in placed][:8] == [
        "The",
        "dot",
        "",
        "on",
        "the",
        "un",
        "likely",
        "",
    ]
    assert placed[-1][2].endswith("...")
    for line, x, word in placed:
        assert x + font.getlength(word) <= 150 + 1e-3
    space = font.getlength(" ")
    assert placed[1][:2] == (0, pytest.approx(font.getlength("The") + space))  # after a space
    assert placed[4][1] == pytest.approx(placed[3][1] + font.getlength("on"))  # no space between


def test_wrapped_text_is_complete_or_ends_in_dots():
    font, text = load_font(20), "What color is the dot on the orange card?"
    lines = wrap(text, font, 150, 9)
    assert len(lines) > 2 and " ".join(lines) == text
    lines = wrap(text, font, 150, 2)
    assert len(lines) == 2 and lines[-1].endswith("...") and text.startswith(lines[0])
    assert all(font.getlength(line) <= 150 for line in lines)


# --- before and after ---


def make_row(text="the dot on red is blue", size=(50, 50)):
    answer = dict(grid=[2, 2], map=[0.1, 0.2, 0.3, 0.4], text=text)
    answers = [answer | {"caption": c, "correct": c == "after"} for c in ("before", "after")]
    return Example(Image.new("RGB", size, "gray"), "Where?", "blue", [(0, 0, 9, 9)]), answers


def test_before_after_is_one_wide_row_per_question(tmp_path):
    sizes = []
    for count in (1, 3):
        plot_before_after([make_row()] * count, tmp_path / "look.png")
        picture = Image.open(tmp_path / "look.png")
        sizes.append(picture.size)
    assert sizes[0][0] > 2.4 * sizes[0][1]
    assert sizes[1] == (sizes[0][0], 3 * sizes[0][1])


def test_before_after_says_right_and_wrong_in_color(tmp_path):
    plot_before_after([make_row(text="a long answer " * 99)], tmp_path / "look.png")
    picture = Image.open(tmp_path / "look.png")
    wrong, right = (find_color(picture, color) for color in (WRONG, RIGHT))
    third = picture.width / 3
    assert third - 80 < wrong[0] < wrong[2] < right[0] < right[2] < picture.width
    assert right[3] <= picture.height
