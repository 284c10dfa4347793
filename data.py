"""An `Example` is a question about an image, with boxes around the answer; `region_mask` finds the
image tokens under them. `JsonLines` reads your own examples and checks every row."""

import codecs
import copy
import json
import math
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from config import InputError, is_tiny

MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL raise an error above it
OTHER_NAMES = {  # names of the keys in other formats; difflib finds misspellings
    "image": "img images path file file_path file_name filename image_path image_file".split(),
    "question": "prompt query text problem instruction input".split(),
    "answer": "label target solution response output ground_truth gt".split(),
    "boxes": "bbox bboxes bbox_2d bounding_box bounding_boxes region regions rect rects".split(),
}


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


# --- the data sets of a run ---


def load_datasets(cfg):
    """The (training, held-out) data sets of `--dataset`; each has `len()`, and `[i]` returns an
    Example. Prints how many rows were skipped. Raises: InputError."""
    if cfg.dataset == "scenes":
        from scenes import LARGE_SCENES, Scenes  # here, because scenes.py imports this module

        style = {} if is_tiny(cfg.model_name_or_path) else LARGE_SCENES
        count = max(1, cfg.max_steps * cfg.prompts_per_step)
        return Scenes("train", count, cfg.seed, **style), Scenes("test", cfg.eval_examples, **style)
    problems = [] if cfg.skip_bad_examples else None
    data = JsonLines(cfg.dataset, cfg.allow_absolute_paths, problems)
    if problems:
        print(f"skipped {data.rejected} rows of {data.path}; first problem: {problems[0]}")
    return data.split(cfg.eval_examples)


def step_examples(train_set, step, cfg):
    """The Examples of a training step, a list of `prompts_per_step`."""
    order = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
    return [train_set[epoch_index(k, len(train_set), cfg.seed)] for k in order]


def epoch_index(k, n, seed):
    """Index of the k-th example of an endless stream; each epoch is a new permutation of n."""
    epoch, i = divmod(k, n)
    generator = torch.Generator().manual_seed(seed + 1000003 * epoch)
    return torch.randperm(n, generator=generator)[i].item()


class JsonLines:
    """A data set in a file with one JSON object per line: `image` (a path relative to the file),
    `question`, `answer`, `boxes` ([[x1, y1, x2, y2], ...] in pixels of the stored image) and an
    optional `id`. Every row is checked at once; pixels are decoded when `[i]` returns the Example.

    Args: allow_absolute_paths, whether images may be outside the file's folder; problems, None to
    raise InputError for the first bad row, or a list, to which the problems of skipped rows are
    added. Raises: InputError naming file and line.
    """

    def __init__(self, path, allow_absolute_paths=False, problems=None):
        self.path, self.folder = path, Path(path).parent.resolve()
        self.allow_absolute_paths, self.problems = allow_absolute_paths, problems
        self.rows = []  # dicts: image, question, answer, boxes, id, where, image_key
        self.rejected = 0  # rows
        self.ids = {}  # id -> place of its first use
        self.sizes = {}  # image -> (width, height) or what is wrong with it
        try:  # some editors write a byte order mark
            content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read the data set {path}: {reason}") from None
        if content.lstrip()[:1] == b"[":
            raise InputError(f"{path} is a JSON array: write one object per line, without commas")
        # str.splitlines() also splits at characters that may occur inside JSON strings.
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                self.add(f"{path}:{number}", line)
        if not self.rows:
            first = f"; first problem: {problems[0]}" if problems else ""
            raise InputError(f"{path}: no usable examples{first}")

    def add(self, where, line):
        """Keep the row on this line if nothing is wrong with it."""
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            return self.reject(where, [f"not JSON in UTF-8 ({error})"])
        if not isinstance(row, dict):
            message = "not a JSON object with image, question, answer and boxes"
            return self.reject(where, [message])
        row["where"] = where
        if row.get("id") in (None, ""):
            row["id"] = where
        errors = list(self.row_errors(row))
        if errors:
            self.reject(where, errors)
        else:
            self.rows.append(row)

    def reject(self, where, errors):
        self.rejected += 1
        for error in errors:
            self.report(f"{where}: {error}")

    def report(self, problem):
        if self.problems is None:
            raise InputError(f"{problem} (use --skip_bad_examples to skip unusable examples)")
        self.problems.append(problem)

    def row_errors(self, row):
        """Yield everything that is wrong with a row, one line each."""
        for name in ("image", "question", "answer"):
            if row.get(name) is None:
                yield f"{name} is missing{suggest_key(name, row)}"
            else:
                yield from text_errors(name, row[name])
        if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
            yield "id must be text or an integer"
        elif (first := self.ids.setdefault(str(row["id"]), row["where"])) != row["where"]:
            yield f"id {row['id']!r} is already used by {first}"
        if row.get("boxes") is None:
            yield f"boxes are missing{suggest_key('boxes', row)}"
        if isinstance(row.get("image"), str) and row["image"].strip():
            yield from self.image_and_box_errors(row)

    def image_and_box_errors(self, row):
        name = row["image"]
        if name not in self.sizes:  # open an image once, even if many questions share it
            try:
                with image_errors(name), self.open_image(name) as image:
                    self.sizes[name] = stored_size(image)
            except InputError as error:
                yield str(error)
                return
        path = self.image_path(name)
        inside = path.is_relative_to(self.folder)
        row["image_key"] = str(path.relative_to(self.folder) if inside else path)
        if row.get("boxes") is not None:
            yield from region_errors(row["boxes"], self.sizes[name])

    def image_path(self, name):
        return (self.folder / name).resolve()

    def open_image(self, name):
        """Open an image with Pillow. Raises: any exception; `image_errors` makes it a message."""
        path = self.image_path(name)
        # `..`, links and absolute paths can leave the folder.
        if not path.is_relative_to(self.folder) and not self.allow_absolute_paths:
            advice = "move it, or use --allow_absolute_paths"
            raise ValueError(f"it is outside the data set's folder: {advice}")
        if not path.is_file():  # opening a pipe would block forever
            raise ValueError("it is a folder" if path.is_dir() else "no such file")
        return Image.open(path)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        """The Example at `index` or, if bad rows are skipped, the next readable one.

        Damaged pixels are detected only here, during a run. A replacement changes the training
        data, so it is printed. Raises: InputError if bad rows are not skipped.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} examples: no index {index}")
        for offset in range(len(self)):
            try:
                return self.read_example(self.rows[(index + offset) % len(self)])
            except InputError as error:
                if self.problems is None or str(error) not in self.problems:
                    self.report(str(error))
                    print(f"skipped, using the next example: {error}")
        raise InputError(f"{self.path}: no image can be read; last problem: {self.problems[-1]}")

    def read_example(self, row):
        """The Example of a row. Raises: InputError naming the row if its image is unreadable."""
        try:
            with image_errors(row["image"]), self.open_image(row["image"]) as image:
                size = stored_size(image)
                for error in region_errors(row["boxes"], size):  # the file may have changed
                    raise ValueError(error)
                boxes = [clip_box(box, size) for box in row["boxes"]]
                image, boxes = apply_exif_orientation(image, boxes)
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from None
        return Example(image, row["question"], row["answer"], boxes, str(row["id"]))

    def split(self, held_out):
        """Split by image into a training and a held-out data set.

        A hash of the image's path selects a fifth of the images, at least one. These are held out,
        with at most `held_out` questions about them. No image is in both parts. With `held_out` 0,
        nothing is held out. Returns: (training, held-out). Raises: InputError if an image has to
        be held out and there is only one.
        """
        keys = {row["image_key"] for row in self.rows}
        keys = sorted(keys, key=lambda key: zlib.crc32(key.encode()))
        if held_out and len(keys) < 2:
            advice = "add images, or use --eval_examples 0"
            raise InputError(f"{self.path}: the only image cannot be held out; {advice}")
        chosen = set(keys[: max(1, len(keys) // 5)]) if held_out else set()
        train_set, eval_set = copy.copy(self), copy.copy(self)
        train_set.rows = [row for row in self.rows if row["image_key"] not in chosen]
        eval_set.rows = [row for row in self.rows if row["image_key"] in chosen][:held_out]
        return train_set, eval_set


# --- checks of a row ---


def text_errors(name, value):
    """Yield what is wrong with a row's image, question or answer."""
    if not isinstance(value, str):
        yield f"{name} must be text, in quotes, but is {shorten(value)}"
    elif not value.strip():
        yield f"{name} is empty"
    elif re.search("[\ud800-\udfff]", value):
        yield f"{name} {value!r} is not valid Unicode: it contains an unpaired surrogate"
    elif name == "question" and (special := re.search(r"<\|\w+\|>", value)):
        yield f"question contains {special.group()}, a special token: remove it"


def region_errors(boxes, size):
    """Yield what is wrong with an image's `size` (width, height), or with the boxes on it."""
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        ratio = f"one side is more than {MAX_ASPECT_RATIO} times the other"
        yield f"the image is {width} x {height}: {ratio}; crop it"
    if not isinstance(boxes, list) or not all(map(is_numeric, boxes)):
        yield f"boxes must be a list of [x1, y1, x2, y2], all numbers, but are {shorten(boxes)}"
        return
    values = [value for box in boxes for value in box]
    if min(size) > 1 and all(-1 <= v <= 1 for v in values) and any(v % 1 for v in values):
        problem = f"{shorten(boxes)} are probably fractions of the image, not pixels"
        yield f"boxes: {problem}: multiply x by the width, {width}, and y by the height, {height}"
        return
    try:
        region_mask(boxes, size, (1, 1))
    except ValueError as error:
        yield f"boxes: {error}"


def is_numeric(box):
    # `type`, because bool is an int for `isinstance`
    return isinstance(box, (list, tuple)) and all(type(v) in (int, float) for v in box)


def suggest_key(name, row):
    """A hint if a key of the row is probably meant to be `name`, otherwise ""."""
    unknown = {key.lower(): key for key in row if key not in (*OTHER_NAMES, "id", "where")}
    known = [key for key in unknown if key in OTHER_NAMES[name] or key == name]
    matches = known or get_close_matches(name, unknown, n=1, cutoff=0.7)
    return f" (rename the key {shorten(unknown[matches[0]])} to {name!r}?)" if matches else ""


def shorten(value):
    """The repr of a value for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- images ---


@contextmanager
def image_errors(name):
    """Turn any exception in the block into an InputError that names the image.

    Pillow can raise almost any exception on a damaged file. Its warnings are silenced, because they
    are about files that it can still read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UnidentifiedImageError:
            reason = "not an image format that Pillow can read"
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        else:
            return
    raise InputError(f"cannot read the image {name!r}: {' '.join(str(reason).split())}")


def stored_size(image):
    """The (width, height) of an opened image before any EXIF rotation."""
    if image.format == "TIFF":  # only for TIFF does Pillow report the rotated size
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return image.size[::-1]
    return image.size


def clip_box(box, size):
    """The box clipped to an image of `size` (width, height). Boxes inside it are unchanged."""
    clipped = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    return box if clipped == tuple(box) else clipped


def apply_exif_orientation(image, boxes):
    """Apply the EXIF orientation to an image and its boxes, and convert the image to RGB.

    Cameras store pixels in sensor order and record the orientation in EXIF. Boxes are in pixels of
    the stored image, so they must be rotated with it.

    Args: image, an opened image whose pixels are not loaded yet; boxes, a list of
    `(x1, y1, x2, y2)` in pixels of the stored image.
    Returns: (RGB image, boxes in its pixels). Transparency becomes white; 16-bit gray, 8-bit.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    width, height = stored_size(image)
    if orientation in (2, 3, 7, 8):
        boxes = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in boxes]
    if orientation in (3, 4, 6, 7):
        boxes = [(x1, height - y2, x2, height - y1) for x1, y1, x2, y2 in boxes]
    if orientation in (5, 6, 7, 8):
        boxes = [(y1, x1, y2, x2) for x1, y1, x2, y2 in boxes]
    image.load()  # rotates a TIFF and clears its orientation, so it is not rotated twice
    return to_rgb(ImageOps.exif_transpose(image)), boxes


def to_rgb(image):
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")
