"""extras/pictures.py: maps, boxes, words and verdicts are drawn at the right place."""

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw, ImageSequence

from data import Example
from extras import pictures
from extras.pictures import COLORS, color_scale, draw_row, mean_map, overlay, plot_animation

GRAY = Image.new("RGB", (56, 56), "gray")
WORDS = ["the", " dot", " is", " blue", " .", ""]


def make_answer(shift=0, words=WORDS, grid=(7, 7), **fields):
    """An answer whose word i attends to cell 3 * i + shift, and a little to all. Every third word
    is selected."""
    cells = grid[0] * grid[1]
    maps = [[0.01] * cells for _ in words]
    for i, row in enumerate(maps):
        row[(3 * i + shift) % cells] = 0.5
    selected = [i % 3 == 0 for i in range(len(words))]
    answer = dict(caption="answer", words=words, maps=maps, grid=grid, selected=selected)
    return answer | fields


def make_example(image=GRAY, question="Where?", answer="blue", boxes=((8, 8, 16, 16),)):
    return Example(image, question, answer, list(boxes))


EXAMPLE = make_example()
ANSWERS = [make_answer(0, correct=0.0), make_answer(20, correct=1.0)]  # before and after training


def find_color(picture, color):
    """The bounding box of the pixels of this color, or None."""
    difference = ImageChops.difference(picture, Image.new("RGB", picture.size, color))
    masks = [band.point(lambda v: 255 * (v == 0)) for band in difference.split()]
    return ImageChops.darker(ImageChops.darker(masks[0], masks[1]), masks[2]).getbbox()


@pytest.mark.parametrize("size, grid", [((70, 70), (7, 7)), ((120, 30), (2, 8))])
def test_a_hot_cell_lights_only_its_own_pixels(size, grid):
    image, (rows, cols) = Image.new("RGB", size, (40, 120, 200)), grid
    dark = overlay(image, [0.0] * (rows * cols), grid, (), size, 1)
    width, height = size[0] // cols, size[1] // rows
    for cell in (0, 5, 11):
        hot = overlay(image, [float(i == cell) for i in range(rows * cols)], grid, (), size, 1)
        x, y = cell % cols * width, cell // cols * height
        assert ImageChops.difference(hot, dark).getbbox() == (x, y, x + width, y + height)


def test_the_color_scale_is_linear_and_ends_at_the_highest():
    picture = overlay(Image.new("RGB", (40, 10)), [0, 0.2, 0.4, 0.6], (1, 4), (), (40, 10), 0.4)
    bar = Image.new("RGB", (80, 512))
    pictures.draw_color_bar(bar, 0, 0, 512, 0.4, clipped=False)
    for i, level in enumerate((0, 128, 255, 255)):
        color = tuple(COLORS[3 * level : 3 * level + 3])
        assert picture.getpixel((5 + 10 * i, 5)) == bar.getpixel((3, 511 - 2 * level)) == color


def test_boxes_are_drawn_around_their_place_and_stay_visible_at_the_edge():
    image = Image.new("RGB", (100, 50), "gray")
    picture = pictures.show_boxes(image, [(20, 10, 60, 40)], (200, 200))
    outer, inner = (find_color(picture, color) for color in pictures.BOX_COLORS)
    assert outer == (35, 15, 125, 85) and inner == (37, 17, 123, 83)
    assert len(picture.crop((40, 20, 120, 80)).getcolors()) == 1  # it covers nothing of the region
    for box, outline in ((0, 0, 100, 50), (0, 0, 200, 100)), ((-9, -9, 9, 9), (0, 0, 21, 21)):
        picture = pictures.show_boxes(image, [box], (200, 100))
        assert find_color(picture, pictures.BOX_COLORS[1]) == outline


def test_the_note_explains_a_place_that_the_answer_names(monkeypatch):
    drawn, letters = [], []
    monkeypatch.setattr(pictures, "find_font", lambda size, text: letters.append(text))
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *args, **_: drawn.append(args[2]))
    draw_row(make_example(question="Größe?"), [make_answer(words=["look", " r6", " c2", " :"])])
    assert {*"Größe?look"} <= {*letters[0]}  # the font has to have all of them
    assert any(text.endswith("; r6 c2: row 6, column 2") for text in drawn)
    drawn.clear()
    draw_row(make_example(), [make_answer()])
    assert not any("column" in text for text in drawn)


def distance(row, side, column, attention):
    """The largest difference between the photo in a column and the expected one."""
    left, top = pictures.GAP + column * (side + pictures.GAP), pictures.CAPTION
    photo = row.crop((left, top, left + side, top + side))
    scale = color_scale(ANSWERS)
    expected = overlay(GRAY, attention, (7, 7), EXAMPLE.boxes, (side, side), scale)
    return max(high for _, high in ImageChops.difference(photo, expected).getextrema())


def test_before_and_after_have_their_mean_maps_and_colored_verdicts():
    row = draw_row(EXAMPLE, ANSWERS)
    wrong, right = find_color(row, pictures.WRONG), find_color(row, pictures.RIGHT)
    assert pictures.SIDE < wrong[0] < wrong[2] < right[0] < right[2] <= row.width
    for column, answer in enumerate(ANSWERS, 1):
        assert distance(row, pictures.SIDE, column, mean_map(answer)) == 0


def read_gif(path):
    """Its frames as RGB images, and their durations in milliseconds."""
    with Image.open(path) as gif:
        assert gif.format == "GIF" and gif.info["loop"] == 0
        frames = [frame.copy() for frame in ImageSequence.Iterator(gif)]
    return [frame.convert("RGB") for frame in frames], [frame.info["duration"] for frame in frames]


def test_the_animation_shows_the_map_of_each_word_and_then_the_mean(tmp_path):
    plot_animation(EXAMPLE, ANSWERS, tmp_path / "x.gif")
    frames, durations = read_gif(tmp_path / "x.gif")
    assert len(frames) == len(WORDS)  # the last word has no text, and the last frame the means
    assert durations[0] > durations[1] and durations[-1] > durations[1]
    for column, answer in enumerate(ANSWERS, 1):
        maps = [*answer["maps"][:-1], mean_map(answer)]
        for i, frame in enumerate(frames):
            distances = [distance(frame, pictures.GIF_SIDE, column, each) for each in maps]
            # The palette changes colors slightly, another map changes a cell completely.
            assert distances.pop(i) < 48 and min(distances) > 80


@pytest.mark.slow
@pytest.mark.parametrize("size", [(640, 480), (90, 900), (1, 1)])
def test_the_animation_stays_below_one_megabyte(tmp_path, size):
    # Noise compresses worst. The answers are as long as the default permits.
    image = Image.merge("RGB", [Image.effect_noise(size, 200)] * 3)
    maps = torch.rand(110, 300, generator=torch.Generator().manual_seed(0)).tolist()
    answers = [make_answer(0, [f" word{i}" for i in range(110)], (15, 20), maps=maps)] * 2
    plot_animation(make_example(image, boxes=[(0, 0, 1, 1)]), answers, tmp_path / "x.gif")
    assert (tmp_path / "x.gif").stat().st_size <= 1_000_000
    plot_animation(EXAMPLE, [make_answer(words=[""])], tmp_path / "x.gif")  # an empty answer
