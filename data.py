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
        if len(box) != 4 or not all(-math.inf < v < math.inf for v in box):
            raise ValueError(f"box {list(box)} is not four finite numbers x1, y1, x2, y2")
        x1, y1, x2, y2 = box
        if x1 >= x2 or y1 >= y2:
            raise ValueError(f"box {list(box)} is empty or inverted: it needs x1 < x2 and y1 < y2")
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise ValueError(f"box {list(box)} lies outside the {width} x {height} image")
        x1, x2 = (Fraction(max(x, 0)) * cols / width for x in (x1, x2))  # in cells, exactly
        y1, y2 = (Fraction(max(y, 0)) * rows / height for y in (y1, y2))
        mask[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = True  # a slice ends at the image edge
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
            lines = self.path.read_text(encoding="utf-8").split("\n")  # splitlines also breaks inside JSON strings
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the data set {path}: {getattr(error, 'strerror', None) or error}") from None
        self.rows = [self._check(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not self.rows:
            raise InputError(f"{path}: no examples in it")

    def _check(self, number, line):
        where = f"{self.path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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
        except TypeError:
            raise InputError(f"{where}: boxes must be a list of [x1, y1, x2, y2], all numbers") from None
        except ValueError as error:
            raise InputError(f"{where}: boxes: {error}") from None
        return row

    def _open(self, row):
        """The image, its header read."""
        try:
            return Image.open(self.path.parent / row["image"])
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise InputError(f"{row['where']}: cannot read the image {row['image']!r}: {reason}") from None

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        try:
            image = self._open(row).convert("RGB")
        except (OSError, SyntaxError) as error:
            raise InputError(f"{row['where']}: the image {row['image']!r} is damaged: {error}") from None
        return Example(image, row["question"], row["answer"], row["boxes"], str(row.get("id") or row["where"]))

    def split(self, held_out):
        """(training, held-out): a fifth of the images, chosen by a hash of their path and at least one, is held out,
        with at most `held_out` questions. No image is in both. Raises: InputError if there is but one image."""
        images = sorted({Path(row["image"]) for row in self.rows}, key=lambda path: zlib.crc32(str(path).encode()))
        if held_out and len(images) < 2:
            raise InputError(f"{self.path}: one image only: none to hold out; give --eval_examples 0")
        chosen = set(images[: max(1, len(images) // 5)]) if held_out else set()
        parts = copy.copy(self), copy.copy(self)
        parts[0].rows = [row for row in self.rows if Path(row["image"]) not in chosen]
        parts[1].rows = [row for row in self.rows if Path(row["image"]) in chosen][:held_out]
        return parts
