"""Questions about images, with the boxes of what they ask about.

An `Example` is one question; anything with `len()` and `[i]` that gives Examples is a data set: `JsonLines` reads
your own, `scenes.Scenes` draws puzzles. `region_mask` turns boxes into the image tokens they touch: the region that
the attention reward is about.
"""

import copy
import json
import math
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from PIL import Image


class InputError(ValueError):
    """A mistake in what the user gave. The message is one line that names the culprit; the program prints it."""


@dataclass(frozen=True)
class Example:
    """One question. `boxes`: the places that answer it, each `(x1, y1, x2, y2)` in pixels of the original image."""

    image: Image.Image
    question: str
    answer: str
    boxes: list[tuple[float, float, float, float]]
    id: str = ""


def region_mask(boxes, image_size, grid):
    """Which image tokens the boxes touch.

    Args: boxes, a list of `(x1, y1, x2, y2)` in pixels of the original image, half-open; image_size, its
    `(width, height)` before any resizing; grid, the `(rows, cols)` of image tokens laid over it.
    Returns: bool (rows * cols,), row by row. A cell counts when it shares positive area with a box, so a box smaller
    than a cell marks at least one; several boxes mark their union; what lies beyond the image edge is cut off.
    Raises: ValueError naming the box that is empty, inverted, not finite or wholly outside, or if there is no box.

    The paper's code [reward function] fixes the grid at 28 px, clamps boxes before scaling them and reads only the
    first. Here the grid is the processor's own, and cell edges are compared as exact fractions.
    """
    (width, height), (rows, cols) = image_size, grid
    if not len(boxes):
        raise ValueError("no boxes: a region needs at least one")
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    for box in boxes:
        if len(box) != 4 or not all(math.isfinite(v) for v in box):
            raise ValueError(f"box {list(box)} is not four finite numbers x1, y1, x2, y2")
        x1, y1, x2, y2 = box
        if x1 >= x2 or y1 >= y2:
            raise ValueError(f"box {list(box)} is empty or inverted: it needs x1 < x2 and y1 < y2")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(f"box {list(box)} lies outside the {width} x {height} image")
        left, top = (
            math.floor(Fraction(max(v, 0)) * n / size) for v, n, size in ((x1, cols, width), (y1, rows, height))
        )
        right, bottom = (math.ceil(Fraction(v) * n / size) for v, n, size in ((x2, cols, width), (y2, rows, height)))
        mask[top:bottom, left:right] = True  # a slice ends at the last cell, so this cuts off at the image edge
    return mask.flatten()


def example_region(example, grid):
    """`region_mask` of an example's boxes on a grid of image tokens. Raises: InputError naming the example."""
    try:
        return region_mask(example.boxes, example.image.size, grid)
    except ValueError as error:
        raise InputError(f"example {example.id}: {error}") from None


class JsonLines:
    """Examples from a file with one JSON object a line: `image` (a path relative to the file), `question`, `answer`,
    `boxes` ([[x1, y1, x2, y2], ...] in pixels of the image as stored) and, if you like, `id`.

    Every line is checked at once, down to the image's header; pixels are read when an example is asked for.
    Raises: InputError naming file and line.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the data set {path}: {getattr(error, 'strerror', None) or error}") from None
        self.rows = [self._check(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise InputError(f"{path}: no examples in it")

    def _check(self, number, line):
        where = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: not an object with image, question, answer and boxes")
        for key in ("image", "question", "answer"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise InputError(f"{where}: {key} is missing or empty: it must be text")
        row["where"] = where
        image = self._open(row)
        try:
            region_mask(row.get("boxes") or [], image.size, (1, 1))
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: boxes: {error}") from None
        return row

    def _open(self, row):
        """The image, its header read."""
        try:
            return Image.open(self.path.parent / row["image"])
        except OSError as error:
            reason = error.strerror or "not a picture"
            raise InputError(f"{row['where']}: cannot read the image {row['image']}: {reason}") from None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            image = self._open(row).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InputError(f"{row['where']}: the image {row['image']} is damaged: {error}") from None
        return Example(image, row["question"], row["answer"], row["boxes"], str(row.get("id", row["where"])))

    def split(self, held_out):
        """(training, held-out): a fifth of the images, by a hash of their path, is held out, at most `held_out`
        questions about them. No image is in both. Raises: InputError if nothing is left to train on."""
        parts = copy.copy(self), copy.copy(self)
        for part, chosen in zip(parts, (False, True)):
            part.rows = [row for row in self.rows if (zlib.crc32(row["image"].encode()) % 5 == 0) == chosen]
        parts[1].rows = parts[1].rows[:held_out]
        if not parts[0].rows:
            raise InputError(f"{self.path}: too few images to hold some out and train on others")
        return parts
