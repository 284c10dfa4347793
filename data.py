"""An `Example` is a question about an image; `region_mask` finds the image tokens that its boxes
overlap. A data set is anything with `len()` and `[i]` that returns Examples, see sources/."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from PIL import Image

from config import InputError


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    image: Image.Image
    question: str
    answer: str  # the ground truth
    boxes: list[tuple[float, float, float, float]]  # (x1, y1, x2, y2) in pixels of `image`
    id: str = ""


def region_mask(boxes, image_size, grid):
    """Mark the image tokens that the boxes overlap.

    Args: boxes, a list of `(x1, y1, x2, y2)` in pixels of the original image, half-open;
    image_size, its `(width, height)` before any resizing; grid, the `(rows, cols)` of image tokens.
    Returns: bool (rows * cols,) in row-major order. A cell is marked if it overlaps a box by a
    positive area, so every box marks at least one cell. Several boxes mark their union. Parts of a
    box outside the image are ignored.
    Raises: ValueError if there are no boxes, or if a box is not four finite numbers, is empty or
    inverted, or lies entirely outside the image.

    The official code assumes a fixed 28-pixel grid, clamps boxes before scaling them and reads only
    the first box. Here the image processor determines the grid, and cell edges are exact fractions.
    """
    (width, height), (rows, cols) = image_size, grid
    if not len(boxes):
        raise ValueError("no boxes: a region needs at least one")
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for box in boxes:
        if len(box) != 4 or not all(-math.inf < v < math.inf for v in box):
            raise ValueError(f"box {list(box)} is not four finite numbers x1, y1, x2, y2")
        x1, y1, x2, y2 = box
        if x1 >= x2 or y1 >= y2:
            raise ValueError(f"box {list(box)} is empty or inverted: it needs x1 < x2 and y1 < y2")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(f"box {list(box)} lies outside the {width} x {height} image")
        x1, x2 = (Fraction(max(x, 0)) * cols / width for x in (x1, x2))  # in cells, exact
        y1, y2 = (Fraction(max(y, 0)) * rows / height for y in (y1, y2))
        # A slice stops at the edge of the grid, so x2 and y2 need no clamping.
        mask[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = True
    return mask.flatten()


def example_region(example, grid):
    """`region_mask` of an example. Raises: InputError naming the example."""
    try:
        return region_mask(example.boxes, example.image.size, grid)
    except ValueError as error:
        raise InputError(f"example {example.id}: {error}") from None


def format_question(example, cfg):
    """The text of the prompt: the question, with the instruction appended."""
    return f"{example.question} {cfg.instruction}".strip()


def encode_example(vlm, example, cfg):
    """The model's Prompt for an example. Raises: InputError naming the example."""
    try:
        return vlm.encode(example.image, format_question(example, cfg))
    except ValueError as error:  # from the image processor, or a special token in the question
        raise InputError(f"example {example.id}: {error}") from None
