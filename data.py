"""Questions about images, with the boxes of what they ask about.

An `Example` is one question; anything with `len()` and `[i]` that gives Examples is a data set: `JsonLines` reads
your own, `paper_data` the paper's, `scenes.Scenes` draws puzzles. `region_mask` turns boxes into the image tokens they
touch: the region that the attention reward is about.
"""

import copy
import json
import math
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

LONGEST = 200  # times the shorter side: Qwen-VL's image processors refuse more


class InputError(ValueError):
    """A mistake in what the user gave. The message is one line that names the culprit; the program prints it."""


@dataclass(frozen=True)
class Example:
    """One question. `boxes`: the places that answer it, each `(x1, y1, x2, y2)` in pixels of `image`."""

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


def stored_size(image):
    """(width, height) of an opened image before its EXIF rotation. Pillow names a TIFF's size after it."""
    turned = image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def cut(box, size):
    """The box, cut off at the edge of the image. One that needs no cut is returned as it is."""
    inside = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    return box if inside == tuple(box) else inside


def upright(image, boxes):
    """The image as it is meant to be seen, in RGB, and its boxes, turned with it.

    Cameras store the sensor's rows as they are and note in EXIF how to hold the picture. Boxes come in pixels of the
    image as stored, and stay on what they frame. What is transparent becomes white, 16 bits of grey become 8.
    """
    turn, (width, height) = image.getexif().get(ExifTags.Base.Orientation), stored_size(image)
    if turn in (2, 3, 7, 8):
        boxes = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
    if turn in (3, 4, 6, 7):
        boxes = [(x1, height - y2, x2, height - y1) for x1, y1, x2, y2 in boxes]
    if turn in (5, 6, 7, 8):
        boxes = [(y1, x1, y2, x2) for x1, y1, x2, y2 in boxes]
    image.load()  # this turns a TIFF, which then says so no more
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB"), boxes


@contextmanager
def reading(row):
    """Turn whatever goes wrong with a row's image into one line. Pillow raises nearly anything on a damaged file, and
    warns of what it can read all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError:
            reason = "no image of a kind that Pillow knows"
        except Exception as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        else:
            return
    raise InputError(f"cannot read the image {row['image']!r}: {reason}")


class Rows:
    """What all readers share: `rows`, light dicts with image, question, answer, boxes, id, `key` (the same for the same
    image) and `where` (for messages). Every row is checked at once, down to the image's header; pixels are read when
    an example is asked for. A reader says how to `open` a row's image.

    Args: name, for messages; problems: with None the first bad row raises InputError; else it is left out, and what
    is wrong with it added to this list. An image whose pixels prove damaged later is then replaced by the next.
    """

    def __init__(self, name, problems=None):
        self.name, self.problems = name, problems
        self.rows, self.notes, self.bad = [], [], 0
        self.seen, self.headers = {}, {}  # id -> where; image -> its size and key

    def add(self, where, row):
        """Take in a row, if nothing is wrong with it."""
        row |= {"where": where, "id": where if row["id"] in (None, "") else row["id"]}
        faults = [f"{where}: {fault}" for fault in self.faults(row)]
        for fault in faults:
            self.complain(fault)
        if faults:
            self.bad += 1
        else:
            self.rows.append(row)

    def complain(self, problem):
        if self.problems is None:
            raise InputError(f"{problem} (--skip_bad_examples leaves out what cannot be used)")
        self.problems.append(problem)

    def faults(self, row):
        """Everything that is wrong with a row, one line each."""
        for name in ("image", "question", "answer"):
            if not isinstance(row[name], str) or not row[name].strip():
                yield f"{name} is missing or empty: it must be text"
            elif re.search("[\ud800-\udfff]", row[name]):
                yield f"{name} {row[name]!r} holds half a character"
            elif name == "question" and (special := re.search(r"<\|\w+\|>", row[name])):
                yield f"question holds {special.group()}, which has a meaning of its own in the prompt"
        if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
            yield "id must be text or a whole number"
        elif (first := self.seen.setdefault(str(row["id"]), row["where"])) != row["where"]:
            yield f"id {row['id']!r} is also that of {first}"
        if isinstance(row["image"], str) and row["image"].strip():
            try:
                if row["image"] not in self.headers:  # several questions may be about one image
                    with reading(row), self.open(row) as image:
                        self.headers[row["image"]] = stored_size(image), row["key"]
            except InputError as error:
                yield str(error)
            else:
                size, row["key"] = self.headers[row["image"]]
                yield from faults_in_region(row["boxes"], size)

    def finish(self):
        """Called when all rows are in."""
        if self.bad:
            self.notes.append(f"{self.name}: {self.bad} bad examples skipped; the first: {self.problems[0]}")
        if not self.rows:
            raise InputError(f"{self.name}: no examples in it" + (f"; {self.notes[-1]}" if self.notes else ""))
        self.seen = self.headers = None  # large, and needed no more

    def read(self, row):
        """The Example of a row. Raises: InputError naming it if the image's pixels cannot be read."""
        try:
            with reading(row), self.open(row) as image:
                size = stored_size(image)
                for fault in faults_in_region(row["boxes"], size):  # the file may have changed since it was checked
                    raise ValueError(fault)
                picture, boxes = upright(image, [cut(box, size) for box in row["boxes"]])
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from None
        return Example(picture, row["question"], row["answer"], boxes, str(row["id"]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.rows[index]  # IndexError ends a loop over the examples
        for i in range(len(self)):
            try:
                return self.read(self.rows[(index + i) % len(self)])
            except InputError as error:
                if str(error) not in (self.problems or ()):
                    self.complain(str(error))
                    print(f"skipped, the next one stands in ({len(self.problems)} so far): {error}")
        raise InputError(f"{self.name}: no image in it can be read; {self.problems[-1]}")

    def split(self, held_out):
        """(training, held-out): a fifth of the images, chosen by a hash of their key and at least one, is held out,
        with at most `held_out` questions. No image is in both. Raises: InputError if there is but one image."""
        keys = sorted({row["key"] for row in self.rows}, key=lambda key: zlib.crc32(key.encode()))
        if held_out and len(keys) < 2:
            raise InputError(f"{self.name}: one image only: none to hold out; give --eval_examples 0")
        chosen = set(keys[: max(1, len(keys) // 5)]) if held_out else set()
        parts = copy.copy(self), copy.copy(self)
        parts[0].rows = [row for row in self.rows if row["key"] not in chosen]
        parts[1].rows = [row for row in self.rows if row["key"] in chosen][:held_out]
        return parts


def faults_in_region(boxes, size):
    """What is wrong with the boxes of an image of this size, or with the size."""
    if max(size) > LONGEST * min(size):
        yield f"the image is {size[0]} x {size[1]}: one side may be {LONGEST} times the other at most; crop it"
    boxes = [] if boxes is None else boxes
    if not isinstance(boxes, list) or not all(
        isinstance(box, (list, tuple)) and all(type(v) in (int, float) for v in box) for box in boxes
    ):
        yield "boxes must be a list of [x1, y1, x2, y2], all numbers"
        return
    try:
        region_mask(boxes, size, (1, 1))
    except ValueError as error:
        yield f"boxes: {error}"


class Files(Rows):
    """Rows whose images are files below `folder`; with `anywhere`, wherever their paths lead."""

    def __init__(self, name, folder, anywhere=False, problems=None):
        super().__init__(name, problems)
        self.folder, self.anywhere = folder, anywhere

    def open(self, row):
        path, folder = (self.folder / row["image"]).resolve(), self.folder.resolve()
        if not (self.anywhere or path.is_relative_to(folder)):  # .., a link, or an absolute path
            raise ValueError("it lies outside the data set's folder (--allow_absolute_paths permits that)")
        if not path.is_file():
            raise ValueError("a folder" if path.is_dir() else "no such file")
        row["key"] = str(path.relative_to(folder) if path.is_relative_to(folder) else path)
        return Image.open(path)


class JsonLines(Files):
    """Examples from a file with one JSON object a line: `image` (a path relative to the file), `question`, `answer`,
    `boxes` ([[x1, y1, x2, y2], ...] in pixels of the image as stored) and, if you like, `id`.
    Raises: InputError naming file and line."""

    def __init__(self, path, anywhere=False, problems=None):
        self.path = Path(path)
        super().__init__(path, self.path.parent, anywhere, problems)
        try:
            lines = self.path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # some editors begin with a BOM
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the data set {path}: {getattr(error, 'strerror', None) or error}") from None
        for number, line in enumerate(lines, 1):
            if line.strip():
                self.parse(f"{path}:{number}", line)
        self.finish()

    def parse(self, where, line):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # a line that is not UTF-8 is a ValueError, too
            problem = f"{where}: not JSON in UTF-8 ({error})"
        else:
            if isinstance(row, dict):
                return self.add(where, {key: row.get(key) for key in ("image", "question", "answer", "boxes", "id")})
            problem = f"{where}: not an object with image, question, answer and boxes"
        self.complain(problem)
        self.bad += 1
