"""An `Example` is a question about an image, with boxes around the answer; `region_mask` finds the
image tokens under them. `JsonLines` reads your own examples and checks every row."""

import codecs
import copy
import hashlib
import json
import math
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from config import InputError, is_tiny

MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL raise an error above it
MAX_PIXELS = 2**26  # of an image, before it is decoded: a small file can hold gigabytes
IMAGE_FORMATS = "AVIF BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()  # none starts a program
OTHER_NAMES = {  # names of the keys in other formats; difflib finds misspellings
    "image": "img images path file file_path file_name filename image_path image_file".split(),
    "question": "prompt query text problem instruction input".split(),
    "answer": "label target solution response output ground_truth gt".split(),
    "boxes": "bbox bboxes bbox_2d bounding_box bounding_boxes region regions rect rects".split(),
}
UNITS = {  # a value of --boxes -> what such boxes are
    "0-1": "fractions of the image",
    "0-100": "percent of the image",
    "0-1000": "thousandths of the image, as Qwen writes them",
    "xywh": "x, y, width, height",
}
FORMATS = {  # how a file in another format starts -> what it is, and what to do
    rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ": "compressed (gzip, zip ...): unpack it",
    b"PAR1": "Parquet: read it with pandas and write to_json(path, orient='records', lines=True)",
    rb"\d+( [\d.]+){4,}\s": "a label of YOLO: extras/convert.py yolo converts it",
    rb'\s*\{(?=.*"category_id"\s*:)(?=.*"images"\s*:)': "COCO: extras/convert.py coco converts it",
    rb'\s*\[(?=.*"(conversations|messages)")': "a chat (LLaVA): write question, answer and boxes",
    rb"\s*\[": "a JSON array: write one object per line, without commas",
    rb"\s*\{([^\n]*[{[,])?[ \t\r]*\n": "pretty-printed JSON: write each object on one line",
    rb"[^{\s][^\n{]*[,;\t]": "CSV: write one JSON object per line",
}
# Removed around an answer: spaces, characters without a width, tags, and the end of a text.
BEFORE_ANSWER = r"^([\s\u200b-\u200f\u2060\ufeff]|<answer>|<s>|<bos>)+"
END = r"</s>|<eos>|<pad>|<end_of_turn>|<[|｜](?!image|video|vision)[^<>]+[|｜]>"
AFTER_ANSWER = rf"([\s\u200b-\u200f\u2060\ufeff]|</answer>|{END})+$"
IMAGE_TAG = r"</?(?:image|img)(?:here)?(?![a-z])[^<>]*>"
SPECIAL = {"question": rf"<[|｜][^<>]+[|｜]>|{IMAGE_TAG}"}  # what a text may not contain
SPECIAL["answer"] = rf"{SPECIAL['question']}|{END}|</?answer>"


@dataclass(frozen=True)
class Example:
    """One question about one image."""

    image: Image.Image
    question: str
    answer: str | tuple[str, ...]  # the ground truth, or several accepted answers
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
    """The (training, held-out) data sets of a run; each has `len()`, and `[i]` returns an Example.
    Prints what may be wrong with them. Raises: InputError."""
    if cfg.dataset == "scenes":
        from scenes import LARGE_SCENES, Scenes  # here, because scenes.py imports this module

        style, held_out = ({}, 256) if is_tiny(cfg.model_name_or_path) else (LARGE_SCENES, 64)
        if cfg.eval_examples >= 0:
            held_out = cfg.eval_examples
        count = max(1, cfg.max_steps * cfg.prompts_per_step)
        train_set = Scenes("train", count, cfg.seed, **style)
        eval_set = Scenes("test", held_out, **style)
    else:
        data = read_file(cfg.dataset, cfg)
        train_set, eval_set = data.split(0 if cfg.eval_dataset else cfg.eval_examples)
    if cfg.eval_dataset:
        eval_set = read_file(cfg.eval_dataset, cfg)
        eval_set.rows = first(eval_set.rows, cfg.eval_examples)
        eval_set.checksum += getattr(train_set, "checksum", "")
        if shared := len(image_keys(train_set) & image_keys(eval_set)):
            print(f"note: images of {eval_set.path} that are also in the training data: {shared}")
    files = [x.images.values() for x in (train_set, eval_set) if isinstance(x, JsonLines)]
    warn_tiny(cfg, [size for images in files for size, *_ in images])
    return train_set, eval_set


def read_file(path, cfg):
    """The JsonLines of a file. Prints what may be wrong with it. Raises: InputError."""
    problems = [] if cfg.skip_bad_examples else None
    data = JsonLines(path, cfg.allow_absolute_paths, problems, cfg.boxes)
    if problems:
        print(f"skipped {data.rejected} rows of {data.path}; first problem: {problems[0]}")
    for note in data.notes():
        print(f"note: {note}")
    return data


def warn_tiny(cfg, sizes):
    """Say what the tiny model knows, if images have other `sizes` than those it was trained on."""
    if is_tiny(cfg.model_name_or_path) and set(sizes) - {(112, 112)}:
        advice = "for anything else, use --model_name_or_path"
        print(f"the tiny model only knows cards such as those in example/: {advice}")


def image_keys(dataset):
    """What identifies the images of a data set; generated scenes never share one."""
    rows = getattr(dataset, "rows", None)
    return set(range(len(dataset))) if rows is None else {row["image_key"] for row in rows}


def first(rows, count):
    """The first `count` rows; -1 means all."""
    return rows if count < 0 else rows[:count]


def step_examples(train_set, step, cfg):
    """The Examples of a training step, a list of `prompts_per_step`."""
    order = range(step * cfg.prompts_per_step, (step + 1) * cfg.prompts_per_step)
    return [train_set[epoch_index(k, len(train_set), cfg.seed)] for k in order]


def epoch_index(k, n, seed):
    """Index of the k-th example of an endless stream; each epoch is a new permutation of n."""
    epoch, i = divmod(k, n)
    return permutation(n, seed + 1000003 * epoch)[i].item()


@lru_cache(maxsize=2)  # a step can end one epoch and begin the next
def permutation(n, seed):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


class JsonLines:
    """A data set in a file with one JSON object per line: `image` (a path relative to the file),
    `question`, `answer`, `boxes` ([[x1, y1, x2, y2], ...] in pixels of the stored image) and an
    optional `id`. Every row is checked at once; pixels are decoded when `[i]` returns the Example.

    Args: allow_absolute_paths, whether images may be outside the file's folder; problems, None to
    raise InputError for the first bad row, or a list, to which the problems of skipped rows are
    added; unit, of the boxes, see `--boxes`. Raises: InputError naming file and line.
    """

    def __init__(self, path, allow_absolute_paths=False, problems=None, unit=""):
        self.path, self.folder = path, Path(path).parent.resolve()
        self.allow_absolute_paths, self.problems = allow_absolute_paths, problems
        self.rows = []  # dicts: image, question, answer, boxes, id, where, image_key
        self.rejected = 0  # rows
        self.ids = {}  # id -> place of its first use
        self.images = {}  # image -> (size, whether EXIF turns it, a hash of its file)
        # Some editors write a byte order mark.
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        for start, what in FORMATS.items():
            if re.match(start, content, re.DOTALL):
                raise InputError(f"{path} is {what}")
        # str.splitlines() also splits at characters that may occur inside JSON strings.
        lines = enumerate(content.split(b"\n"), 1)
        rows = {f"{path}:{number}": parse_row(line) for number, line in lines if line.strip()}
        self.unit = unit or self.refuse_unit(rows.values())
        for where, row in rows.items():
            self.add(where, row)
        keys = "image_key", "question", "answer", "boxes"
        self.contents = [json.dumps([row[key] for key in keys]) for row in self.rows]
        self.checksum = hashlib.sha256("\n".join(self.contents).encode()).hexdigest()
        if not self.rows:
            first = f"; first problem: {problems[0]}" if problems else ""
            raise InputError(f"{path}: no usable examples{first}")

    def refuse_unit(self, rows):
        """Raises: InputError if the boxes of the file are evidently not in pixels."""
        regions = {}  # image -> (its boxes, its size)
        for row in rows:
            try:
                size, turned, _ = self.read_header(row["image"])
                if are_boxes(row["boxes"]):
                    size = (max(size),) * 2 if turned else size  # see `region_errors`
                    regions.setdefault(row["image"], ([], size))[0].extend(row["boxes"])
            except (LookupError, TypeError, InputError):  # `row_errors` says what is wrong
                pass
        if unit := likely_unit(list(regions.values())):
            advice = f"use --boxes {unit}, or --boxes pixels if they are in pixels"
            raise InputError(f"{self.path}: the boxes look like {UNITS[unit]}: {advice}")

    def add(self, where, row):
        """Keep a row if nothing is wrong with it. Args: row, a dict or what is wrong with it."""
        if isinstance(row, str):
            return self.reject(where, [row])
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
                row[name] = clean_text(name, row[name])
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
        try:
            size, turned, row["image_key"] = self.read_header(row["image"])
        except InputError as error:
            yield str(error)
            return
        if row.get("boxes") is not None:
            row["boxes"] = to_pixels(row["boxes"], self.unit, size)
            yield from region_errors(row["boxes"], size, self.unit, turned)

    def read_header(self, name):
        """(size as stored, whether EXIF turns it on its side, a hash of the file) of an image.
        Reads it once, even if many questions share it. Raises: InputError."""
        if name not in self.images:
            with image_errors(name), self.open_image(name) as image:
                key = hashlib.sha256(self.image_path(name).read_bytes()).hexdigest()
                self.images[name] = stored_size(image), is_turned(image), key
        return self.images[name]

    def image_path(self, name):
        return (self.folder / name).resolve()

    def open_image(self, name):
        """Open an image with Pillow. Raises: any exception; `image_errors` makes it a message."""
        if re.match(r"\w+://|data:|/9j/|iVBOR", name):
            raise ValueError("give the path of a file, not a URL or base64 data")
        path = self.image_path(name)
        # `..`, links and absolute paths can leave the folder.
        if not path.is_relative_to(self.folder) and not self.allow_absolute_paths:
            advice = "move it, or use --allow_absolute_paths"
            raise ValueError(f"it is outside the data set's folder: {advice}")
        if not path.is_file():  # opening a pipe would block forever
            hint = "; write / instead of \\" if "\\" in name else ""
            raise ValueError("it is a folder" if path.is_dir() else f"no such file{hint}")
        return open_image(path)

    def notes(self):
        """What may be wrong with the file as a whole, a list of lines."""
        boxes = [(box, self.images[row["image"]][0]) for row in self.rows for box in row["boxes"]]
        beyond = sum(clip_box(*pair) is not pair[0] for pair in boxes)
        copies = len(self) - len(set(self.contents))
        firsts = [(row["answer"], row["question"]) for row in self.rows]
        firsts = [(a if isinstance(a, str) else a[0], question) for a, question in firsts]
        swapped = sum(a.endswith("?") or len(a) > len(question) for a, question in firsts)
        counts = {
            f"of {len(boxes)} boxes extend beyond their image and are clipped": beyond,
            f"of {len(self)} examples repeat an earlier one: same image, text and boxes": copies,
        }
        if 2 * swapped > len(self):
            what = "answers end in ? or are longer than their questions: are they swapped?"
            counts[f"of {len(self)} {what}"] = swapped
        return [f"{count} {what}" for what, count in counts.items() if count]

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
                boxes = [clip_box(box, stored_size(image)) for box in row["boxes"]]
                image, boxes = apply_exif_orientation(image, boxes)
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from None
        return Example(image, row["question"], row["answer"], boxes, str(row["id"]))

    def split(self, held_out):
        """Split by image into a training and a held-out data set.

        A hash of the image's file selects a fifth of the images, at least one. These are held out,
        with at most `held_out` questions about them (-1: all). No image is in both parts, not even
        as a copy under another name. With 0, nothing is held out. Returns: (training, held-out).
        Raises: InputError if an image has to be held out and there is only one.
        """
        keys = sorted(image_keys(self))
        if held_out and len(keys) < 2:
            advice = "add images, or use --eval_examples 0"
            raise InputError(f"{self.path}: the only image cannot be held out; {advice}")
        chosen = set(keys[: max(1, len(keys) // 5)]) if held_out else set()
        train_set, eval_set = copy.copy(self), copy.copy(self)
        train_set.rows = [row for row in self.rows if row["image_key"] not in chosen]
        eval_set.rows = [row for row in self.rows if row["image_key"] in chosen]
        eval_set.rows = first(eval_set.rows, held_out)
        return train_set, eval_set


# --- checks of a row ---


def parse_row(line):
    """The dict in a line, or what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        return f"not JSON in UTF-8 ({error})"
    if not isinstance(row, dict):
        return "not a JSON object with image, question, answer and boxes"
    if "question" not in row and {"conversations", "messages"} & row.keys():
        return "a chat (LLaVA): write its turns as question and answer, and add boxes"
    return row


def clean_text(name, value):
    """A row's image, question or answer without what evidently does not belong to it."""
    if name == "answer" and isinstance(value, list) and value:
        first, *others = (clean_text(name, answer) for answer in value)
        return (first, *others) if others else first
    if name == "image" or not isinstance(value, str):
        return value
    around = rf"^\s*{IMAGE_TAG}\s*" if name == "question" else f"{BEFORE_ANSWER}|{AFTER_ANSWER}"
    return re.sub(around, "", value, flags=re.IGNORECASE)


def text_errors(name, value):
    """Yield what is wrong with a row's image, question or answer."""
    if isinstance(value, tuple):
        for answer in value:
            yield from text_errors(name, answer)
    elif not isinstance(value, str):
        yield f"{name} must be text, in quotes, but is {shorten(value)}"
    elif not value.strip():
        yield f"{name} is empty"
    elif re.search("[\ud800-\udfff]", value):
        yield f"{name} {value!r} is not valid Unicode: it contains an unpaired surrogate"
    elif name in SPECIAL and (special := re.search(SPECIAL[name], value, re.IGNORECASE)):
        yield f"{name} contains {special.group()}, a special token: remove it"


def answer_text(answer):
    """The accepted answers as one text."""
    return answer if isinstance(answer, str) else " or ".join(answer)


def region_errors(boxes, size, unit="", turned=False):
    """Yield what is wrong with an image's `size` (width, height), or with the boxes on it. Args:
    unit, if the user named it; turned, whether EXIF turns the image on its side."""
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        ratio = f"one side is more than {MAX_ASPECT_RATIO} times the other"
        yield f"the image is {width} x {height}: {ratio}; crop it"
    if not isinstance(boxes, list) or not all(map(is_numeric, boxes)):
        yield f"boxes must be a list of [x1, y1, x2, y2], all numbers, but are {shorten(boxes)}"
        return
    for box in boxes:
        if not unit and box and max(box) <= 1.5 and max(size) > 8:
            yield f"boxes: {shorten(box)} looks like {UNITS['0-1']}, not pixels"
            return
        beyond = len(box) == 4 and (box[2] > 1.02 * width or box[3] > 1.02 * height)
        if turned and beyond and clip_box(box, (height, width)) is box:
            fits = f"fits only the image as displayed, {height} x {width}, after EXIF rotation"
            yield f"boxes: {box} {fits}: give pixels of the stored image, {width} x {height}"
            return
    try:
        region_mask(boxes, size, (1, 1))
    except ValueError as error:
        yield f"boxes: {error}"


def likely_unit(regions):
    """The unit that boxes seem to be in, a key of UNITS, or None for pixels. One box proves little,
    so those of a file are judged together. Args: regions, a list of (boxes, image size)."""
    pairs = [(box, size) for boxes, size in regions for box in boxes]
    if not pairs:
        return None
    boxes, sizes = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs))  # (n, 4), (n, 2)
    start, end = boxes.split(2, 1)

    def share(condition):
        return condition.double().mean().item()

    if share((boxes <= 1.5).all(1) & (sizes > 8).any(1)) >= 0.5:
        return "0-1"
    fits_xywh = (start >= 0).all(1) & (start + end <= 1.05 * sizes).all(1)
    if share((start >= end).any(1)) >= 0.25 and share(fits_xywh) >= 0.95:
        return "xywh"
    beyond = share((end > 1.05 * sizes).any(1))
    for unit, side in (("0-100", 100), ("0-1000", 1000)):
        # How likely is it that all boxes on larger images stay below `side`, if they are pixels?
        chance = math.prod(side / x for _, size in regions for x in size if 0.75 * x > side)
        if share(((boxes >= 0) & (boxes <= side)).all(1)) >= 0.95 and boxes.max() > side / 2:
            if beyond > 0.4 or (len(regions) > 2 and chance < 0.01):
                return unit
    return None


def to_pixels(boxes, unit, size):
    """Boxes in a unit of UNITS as pixels. Malformed boxes are not changed."""
    if unit not in UNITS or not are_boxes(boxes):
        return boxes
    if unit == "xywh":
        return [[x, y, x + width, y + height] for x, y, width, height in boxes]
    most = int(unit.removeprefix("0-"))
    return [[v * side / most for v, side in zip(box, size * 2)] for box in boxes]


def are_boxes(boxes):
    return isinstance(boxes, list) and all(
        is_numeric(box) and len(box) == 4 and all(abs(v) < 1e9 for v in box) for box in boxes
    )


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
    raise InputError(f"cannot read the image {name[:200]!r}: {' '.join(str(reason).split())}")


def open_image(path):
    """Open an image file. Raises: any exception."""
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels: at most {MAX_PIXELS}")
    return image


def stored_size(image):
    """The (width, height) of an opened image before any EXIF rotation."""
    # Only for TIFF does Pillow report the rotated size.
    return image.size[::-1] if image.format == "TIFF" and is_turned(image) else image.size


def is_turned(image):
    """Whether EXIF turns an opened image on its side."""
    exif = Image.Image.getexif(image)  # image.getexif() would decode a PNG
    return exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


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
    ImageOps.exif_transpose(image, in_place=True)  # a copy would double the memory
    return to_rgb(image), boxes


def to_rgb(image):
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.mode in ("I", "F"):  # they have no fixed range: map theirs to black to white
        low, high = image.getextrema()
        if not -math.inf < low <= high < math.inf:
            raise ValueError("its pixels are not finite numbers")
        scale = 255 / ((high - low) or 1)
        image = image.convert("F").point(lambda v: v * scale - low * scale).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
