"""data.py: regions of image tokens, compared with an exact brute-force computation."""

import math
import random
from fractions import Fraction

import pytest
from PIL import Image

from config import InputError
from data import Example, example_region, region_mask

INF, NAN = math.inf, math.nan


def cells(boxes, image_size, grid):
    """The marked cells as [(row, column), ...]."""
    mask = region_mask(boxes, image_size, grid)
    assert mask.dtype.is_floating_point is False and mask.shape == (grid[0] * grid[1],)
    return [divmod(i, grid[1]) for i in mask.nonzero().flatten().tolist()]


def brute_force(boxes, image_size, grid):
    """The cells that overlap a box by a positive length in x and in y, compared one by one."""
    (width, height), (rows, cols) = image_size, grid

    def overlaps(low, high, size, i, count):
        start, end = Fraction(size * i, count), Fraction(size * (i + 1), count)
        return min(Fraction(high), end) > max(Fraction(low), start)

    return [
        (r, c)
        for r in range(rows)
        for c in range(cols)
        if any(
            overlaps(x1, x2, width, c, cols) and overlaps(y1, y2, height, r, rows)
            for x1, y1, x2, y2 in boxes
        )
    ]


def random_side(rng, size, count, kind):
    """A random (low, high) that overlaps [0, size).

    Args: kind, "integer", "float", or "edge" for floats on a cell edge or one rounding step off.
    """
    while True:
        if kind == "integer":
            pair = [rng.randint(-size // 3, size + size // 3) for _ in range(2)]
        elif kind == "float":
            pair = [rng.uniform(-0.3, 1.3) * size for _ in range(2)]
        else:
            pair = [size * rng.randint(0, count) / count for _ in range(2)]
            pair = [rng.choice([v, math.nextafter(v, INF), math.nextafter(v, -INF)]) for v in pair]
        low, high = sorted(pair)
        if low < high and high > 0 and low < size:
            return low, high


@pytest.mark.parametrize("kind", ["integer", "float", "edge"])
def test_region_equals_exact_overlap(kind):
    rng = random.Random(kind)
    for _ in range(200):
        size = width, height = rng.randint(1, 700), rng.randint(1, 700)
        grid = rows, cols = rng.randint(1, 12), rng.randint(1, 12)
        boxes = []
        for _ in range(rng.randint(1, 3)):
            (x1, x2), (y1, y2) = (
                random_side(rng, width, cols, kind),
                random_side(rng, height, rows, kind),
            )
            boxes.append((x1, y1, x2, y2))
        assert cells(boxes, size, grid) == brute_force(boxes, size, grid), (boxes, size, grid)


@pytest.mark.parametrize(
    "box, expected",
    [  # a 100 x 60 image, cells of 25 x 20: 3 rows, 4 columns
        ((0, 0, 25, 20), [(0, 0)]),  # half-open: no neighbor
        ((25, 20, 50, 40), [(1, 1)]),
        ((24, 20, 26, 40), [(1, 0), (1, 1)]),  # one pixel on each side of an edge
        ((25, 19, 50, 21), [(0, 1), (1, 1)]),
        ((75, 40, 100, 60), [(2, 3)]),
        ((75, 0, 100, 20), [(0, 3)]),  # top right: the last cell of the first row
        ((0, 40, 25, 60), [(2, 0)]),
        ((0, 0, 100, 20), [(0, 0), (0, 1), (0, 2), (0, 3)]),
        ((0, 0, 25, 60), [(0, 0), (1, 0), (2, 0)]),
        ((0, 0, 100, 60), [(r, c) for r in range(3) for c in range(4)]),
        # smaller than a cell
        ((30, 5, 31, 6), [(0, 1)]),
        ((30.25, 5.25, 30.5, 5.5), [(0, 1)]),
        ((99, 59, 100, 60), [(2, 3)]),
        ((0, 0, 5e-324, 5e-324), [(0, 0)]),  # the smallest positive float
        # at a cell edge, with almost no width
        ((50, 0, 50 + 1e-12, 20), [(0, 2)]),
        ((50 - 1e-12, 0, 50, 20), [(0, 1)]),
        ((50 - 1e-12, 0, 50 + 1e-12, 20), [(0, 1), (0, 2)]),
        # clipped at the edge of the image
        ((-40, -40, 10, 10), [(0, 0)]),
        ((90, 50, 400, 400), [(2, 3)]),
        ((-1e300, 20, 1e300, 40), [(1, 0), (1, 1), (1, 2), (1, 3)]),
        ((-0.0, 0, 1, 1), [(0, 0)]),
    ],
)
def test_region_matches_cells_found_by_hand(box, expected):
    assert cells([box], (100, 60), (3, 4)) == expected


def test_cell_edges_that_are_not_floats_are_compared_exactly():
    # The float nearest to 100 / 3 is slightly larger, so [33, 100 / 3) overlaps the second cell.
    assert Fraction(100 / 3) > Fraction(100, 3)
    assert cells([(33, 0, 100 / 3, 1)], (100, 1), (1, 3)) == [(0, 0), (0, 1)]
    assert cells([(33, 0, math.nextafter(100 / 3, 0), 1)], (100, 1), (1, 3)) == [(0, 0)]
    assert cells([(100 / 3, 0, 34, 1)], (100, 1), (1, 3)) == [(0, 1)]


def test_several_boxes_mark_their_union():
    # The official code uses only the first box.
    boxes = [(0, 0, 10, 10), (90, 90, 100, 100), (5, 5, 60, 10)]
    assert cells(boxes, (100, 100), (2, 2)) == [(0, 0), (0, 1), (1, 1)]
    assert cells(boxes[::-1], (100, 100), (2, 2)) == [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize(
    "grid, expected",
    [((1, 1), [0]), ((2, 2), [3]), ((2, 4), [7]), ((5, 10), [48, 49]), ((4, 2), [7])],
)
def test_boxes_are_in_pixels_of_the_original_image_for_any_grid(grid, expected):
    # The official code assumes cells of 28 px and clamps boxes to the resized image before scaling
    # them. This image is far larger than these grids times 28 px, and the box is in its far corner.
    mask = region_mask([(3300, 1700, 4000, 2000)], (4000, 2000), grid)
    assert mask.nonzero().flatten().tolist() == expected


BAD_BOXES = [
    pytest.param((10, 10, 10, 20), id="no width"),
    pytest.param((10, 10, 20, 10), id="no height"),
    pytest.param((20, 10, 10, 30), id="inverted in x"),
    pytest.param((10, 30, 20, 10), id="inverted in y"),
    *[
        pytest.param((*[1] * i, v, *[9] * (3 - i)), id=f"{v} at {i}")
        for v in (NAN, INF, -INF)
        for i in range(4)
    ],
    pytest.param((-20, 10, -10, 20), id="left of the image"),
    pytest.param((-20, 10, 0, 20), id="ends at the left edge"),
    pytest.param((100, 10, 120, 20), id="starts at the right edge"),
    pytest.param((101, 10, 120, 20), id="right of the image"),
    pytest.param((10, -20, 20, -10), id="above"),
    pytest.param((10, -20, 20, 0), id="ends at the top edge"),
    pytest.param((10, 60, 20, 80), id="starts at the bottom edge"),
    pytest.param((10, 61, 20, 80), id="below"),
    pytest.param((10, 10, 20), id="three numbers"),
    pytest.param((10, 10, 20, 20, 30), id="five numbers"),
]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_a_bad_box_is_an_error_that_names_it(box):
    numbers = ", ".join(str(v) for v in box)
    for boxes in ([box], [(0, 0, 5, 5), box], [list(box), (0, 0, 5, 5)]):
        with pytest.raises(ValueError) as error:
            region_mask(boxes, (100, 60), (3, 4))
        assert numbers in str(error.value)


def test_a_region_without_boxes_is_an_error():
    with pytest.raises(ValueError, match="box"):
        region_mask([], (100, 60), (3, 4))


def test_example_region_marks_the_boxes_of_the_example():
    example = Example(
        Image.new("RGB", (100, 60)), "?", "!", [(0, 0, 25, 20), (75, 40, 100, 60)], "seven"
    )
    assert example_region(example, (3, 4)).nonzero().flatten().tolist() == [0, 11]


@pytest.mark.parametrize("boxes", [[], [(0, 0, 0, 5)], [(0, 0, 5, 5), (200, 0, 300, 5)]])
def test_example_region_names_the_example(boxes):
    with pytest.raises(InputError, match="scene-seventeen"):
        example_region(
            Example(Image.new("RGB", (100, 60)), "?", "!", boxes, "scene-seventeen"), (3, 4)
        )
