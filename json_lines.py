"""Your own examples, from a file with one JSON object per line. Every row is checked before
training, so that bad data is never used silently. A default run does not load this file."""

import codecs
import copy
import hashlib
import json
import math
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageOps

from config import InputError
from data import Example, first, image_keys, region_mask

TURNED = 5, 6, 7, 8  # EXIF orientations of images that are shown turned on their side
MAX_ASPECT_RATIO = 200  # the image processors of Qwen-VL raise an error above it
MAX_PIXELS = 2**26  # of an image, before it is decoded: a small file can hold gigabytes
IMAGE_FORMATS = "AVIF BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()  # none starts a program
KEYS = "image", "question", "answer", "boxes"  # of a row, and optionally id
UNITS = {  # a value of --boxes -> what such boxes are
    "0-1": "fractions of the image",
    "0-100": "percent of the image",
    "0-1000": "thousandths of the image, as Qwen writes them",
    "xywh": "x, y, width, height",
}
FORMATS = {  # how a file in another format starts -> what it is, and what to do
    rb"\x1f\x8b|PK\x03\x04|BZh|\xfd7zXZ": "compressed, or an Excel file: unpack it, or save text",
    b"PAR1": "Parquet: read it with pandas and write to_json(path, orient='records', lines=True)",
    rb"\d+( [\d.]+){4,}\s": "a label of YOLO: extras/convert.py yolo converts it",
    rb'\s*\{(?=.*"category_id"\s*:)(?=.*"images"\s*:)': "COCO: extras/convert.py coco converts it",
    rb'\s*[\[{](?!.*"question"\s*:)(?=.*"(conversations|messages)"\s*:)': (
        "a chat (LLaVA): write its turns as question and answer, and add boxes"
    ),
    rb"\s*\[": "a JSON array: write one object per line, without commas",
    rb"\s*\{([^\n]*[{[,])?[ \t\r]*\n": "pretty-printed JSON: write each object on one line",
    rb"[^{\s][^\n{]*[,;\t]": "CSV: write one JSON object per line",
}
SPACE = r"[\s\u200b-\u200f\u2060\ufeff]"  # also characters without a width
END = r"</s>|<eos>|<pad>|<end_of_turn>|<[|｜](?!image|video|vision)[^<>]+[|｜]>"  # of a text
IMAGE_TAG = r"</?(?:image|img)(?:here)?(?![a-z])[^<>]*>"
AROUND = {  # what is removed around a text
    "question": rf"^\s*{IMAGE_TAG}\s*",
    "answer": rf"^({SPACE}|<answer>|<s>|<bos>)+|({SPACE}|</answer>|{END})+$",
}
SPECIAL = {"question": rf"<[|｜][^<>]+[|｜]>|{IMAGE_TAG}"}  # what a text may not contain
SPECIAL["answer"] = rf"{SPECIAL['question']}|{END}|</?answer>"


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
        self.images = {}  # image -> (size, EXIF orientation, a hash of its file)
        # Some editors write a byte order mark.
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        for start, what in FORMATS.items():
            if re.match(start, content, re.DOTALL):
                raise InputError(f"{path} is {what}")
        # str.splitlines() also splits at characters that may occur inside JSON strings.
        lines = enumerate(content.split(b"\n"), 1)
        rows = {f"{path}:{number}": parse_row(line) for number, line in lines if line.strip()}
        self.unit = unit
        self.refuse_unit(rows.values())
        for where, row in rows.items():
            errors = list(self.row_errors(where, row))
            for error in errors:
                self.report(f"{where}: {error}")
            if errors:
                self.rejected += 1
            else:
                self.rows.append(row)
        if not self.rows:
            hint = f"; first problem: {problems[0]}" if problems else ""
            raise InputError(f"{path}: no usable examples{hint}")
        keys = "image_key", *KEYS[1:]  # a copy of an image is the same image
        contents = [json.dumps([row[key] for key in keys]) for row in self.rows]
        self.copies = len(contents) - len(set(contents))
        self.checksum = hashlib.sha256("\n".join(contents).encode()).hexdigest()

    def report(self, problem):
        if self.problems is None:
            raise InputError(f"{problem} (use --skip_bad_examples to skip unusable examples)")
        self.problems.append(problem)

    def refuse_unit(self, rows):
        """Raises: InputError if the boxes of the file are evidently not in `unit` (or pixels)."""
        regions = {}  # image -> (its boxes, its size)
        for row in rows:
            try:
                size, orientation, _ = self.read_header(row["image"])
                if are_boxes(row["boxes"]):
                    size = (max(size),) * 2 if orientation in TURNED else size  # see `check_boxes`
                    regions.setdefault(row["image"], ([], size))[0].extend(row["boxes"])
            except (LookupError, TypeError, InputError):  # `row_errors` says what is wrong
                pass
        regions = list(regions.values())
        unit = self.unit or likely_unit(regions)
        converted = [(to_pixels(boxes, unit, size), size) for boxes, size in regions]
        units = {unit, likely_unit(converted)} & UNITS.keys()
        if "xywh" in units and len(units) == 2:  # as in Label Studio
            (scale,) = units - {"xywh"}
            what = f"{UNITS['xywh']}, in {UNITS[scale]}: convert them to x1, y1, x2, y2"
            raise InputError(f"{self.path}: the boxes look like {what}")
        if unit and not self.unit:
            advice = f"use --boxes {unit}, or --boxes pixels if they are in pixels"
            raise InputError(f"{self.path}: the boxes look like {UNITS[unit]}: {advice}")

    def row_errors(self, where, row):
        """Yield what is wrong with a row, one line each; the boxes are checked if the image can be
        read. Adds `where`, `id` and `image_key` to it. Args: row, a dict, or what is wrong with its
        line."""
        if isinstance(row, str):
            yield row
            return
        unknown = [key for key in row if key not in (*KEYS, "id")]
        hint = f" (is it one of {unknown!r:.200}?)" if unknown else ""
        row["where"], size = where, None
        if row.get("id") in (None, ""):
            row["id"] = where
        if type(row["id"]) not in (str, int):
            yield "id must be text or an integer"
        elif (place := self.ids.setdefault(str(row["id"]), where)) != where:
            yield f"id {row['id']!r} is already used by {place}"
        for name in KEYS:
            try:
                if row.get(name) is None:
                    raise ValueError(f"{name!r} is missing{hint}")
                if name != "boxes":
                    row[name] = clean_text(name, row[name])
                if name == "image":
                    size, orientation, row["image_key"] = self.read_header(row[name])
                if name == "boxes" and size:
                    row[name] = to_pixels(row[name], self.unit, size)
                    check_boxes(row[name], size, self.unit, orientation in TURNED)
            except ValueError as error:  # an InputError is one
                yield str(error)

    def read_header(self, name):
        """(size as stored, EXIF orientation, a hash of the file) of an image.
        Reads it once, even if many questions share it. Raises: InputError."""
        if name not in self.images:
            with image_errors(name), self.open_image(name) as image:
                key = hashlib.sha256(self.image_path(name).read_bytes()).hexdigest()
                self.images[name] = stored_size(image), exif_orientation(image), key
        return self.images[name]

    def image_path(self, name):
        return (self.folder / name).resolve()

    def open_image(self, name):
        """Open an image, if it may be read. Raises: any exception; see `image_errors`."""
        if re.match(r"\w+://|data:|/9j/|iVBOR", name):
            raise ValueError("give the path of a file, not a URL or base64 data")
        path = self.image_path(name)
        # `..`, links and absolute paths can leave the folder.
        if not path.is_relative_to(self.folder) and not self.allow_absolute_paths:
            advice = "move it, or use --allow_absolute_paths"
            raise ValueError(f"it is outside the data set's folder: {advice}")
        if not path.is_file():  # opening a pipe would block forever
            raise ValueError("no such file" + ("; write / instead of \\" if "\\" in name else ""))
        return open_image(path)

    def notes(self):
        """What may be wrong with the file as a whole, a list of lines."""
        boxes = [(box, self.images[row["image"]][0]) for row in self.rows for box in row["boxes"]]
        beyond = sum(clip_box(box, size) is not box for box, size in boxes)
        swapped = 0
        for row in self.rows:
            answer = row["answer"] if isinstance(row["answer"], str) else row["answer"][0]
            swapped += answer.endswith("?") or len(answer) > len(row["question"])
        advice = "boxes must fit the stored image, as extras/annotate.html writes them"
        counts = {
            f"{len(self.images)} images are rotated by EXIF: {advice}": sum(
                orientation in range(2, 9) for _, orientation, _ in self.images.values()
            ),
            f"{len(boxes)} boxes extend beyond their image and are clipped": beyond,
            f"{len(self)} examples repeat an earlier one: same image, text and boxes": self.copies,
        }
        if 2 * swapped > len(self):
            what = "answers end in ? or are longer than their questions: are they swapped?"
            counts[f"{len(self)} {what}"] = swapped
        return [f"{count} of {what}" for what, count in counts.items() if count]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        """The Example at `index` or, if bad rows are skipped, the next readable one.

        Damaged pixels are detected only here, during a run. A replacement changes the training
        data, so it is printed. Raises: InputError if bad rows are not skipped.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
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
    return row


def clean_text(name, value):
    """A row's image, question or answer without what evidently does not belong to it.
    Raises: ValueError that says what is wrong with it."""
    if name == "answer" and isinstance(value, list) and value:
        answers = tuple(clean_text(name, answer) for answer in value)
        return answers if len(answers) > 1 else answers[0]
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, in quotes, but is {value!r:.60}")
    text = re.sub(AROUND[name], "", value, flags=re.IGNORECASE) if name in AROUND else value
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{name} {text!r} is not valid Unicode: it contains an unpaired surrogate")
    if name in SPECIAL and (special := re.search(SPECIAL[name], text, re.IGNORECASE)):
        raise ValueError(f"{name} contains {special.group()}, a special token: remove it")
    return text


def check_boxes(boxes, size, unit="", turned=False):
    """Raises: ValueError that says what is wrong with the boxes on an image. Args: size, its width
    and height; unit, if the user named it; turned, whether EXIF turns the image on its side."""
    if not are_boxes(boxes):
        form = "a list of boxes, [[x1, y1, x2, y2], ...], of numbers below 10^9"
        raise ValueError(f"boxes must be {form}, but are {boxes!r:.60}")
    width, height = size
    for box in boxes:
        if not unit and max(box) <= 1.5 and max(size) > 8:
            raise ValueError(f"box {box} looks like {UNITS['0-1']}, not pixels")
        beyond = box[2] > 1.02 * width or box[3] > 1.02 * height
        if turned and beyond and clip_box(box, (height, width)) is box:
            fits = f"fits only the image as displayed, {height} x {width}, after EXIF rotation"
            stored = f"give pixels of the stored image, {width} x {height}"
            raise ValueError(f"box {box} {fits}: {stored}")
    region_mask(boxes, size, (1, 1))


def are_boxes(boxes):
    """Whether this is a list of [x1, y1, x2, y2], four numbers of a plausible size."""

    def is_box(box):
        # `type`, because bool is an int for `isinstance`. NaN is not below anything.
        numbers = isinstance(box, (list, tuple)) and all(type(v) in (int, float) for v in box)
        return numbers and len(box) == 4 and all(abs(v) < 1e9 for v in box)

    return isinstance(boxes, list) and all(map(is_box, boxes))


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

    fits_xywh = (start >= 0).all(1) & (start + end <= 1.05 * sizes).all(1)
    if share((start >= end).any(1)) >= 0.25 and share(fits_xywh) >= 0.95:
        return "xywh"
    if share((boxes <= 1.5).all(1) & (sizes > 8).any(1)) >= 0.5:
        return "0-1"
    beyond = share((end > 1.05 * sizes).any(1))
    for unit, side in (("0-100", 100), ("0-1000", 1000)):
        # How likely is it that all boxes on larger images stay below `side`, if they are pixels?
        chance = math.prod(side / x for _, size in regions for x in size if 0.85 * x > side)
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


# --- images ---


@contextmanager
def image_errors(name):
    """Turn any exception in the block, as Pillow raises on damaged files, into an InputError that
    names the image. Pillow's warnings are about files that it can still read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            problem = f"cannot read the image {str(name)[:200]!r}: {' '.join(reason.split())}"
            raise InputError(problem) from None


def open_image(path):
    """Open an image file. Raises: any exception."""
    image = Image.open(path, formats=IMAGE_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels: at most {MAX_PIXELS}")
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(f"one side is more than {MAX_ASPECT_RATIO} times the other: crop it")
    if image.mode in ("I", "F"):  # their range is unknown
        raise ValueError("its pixels are 32-bit numbers: convert them to 8 or 16 bits")
    return image


def stored_size(image):
    """The (width, height) of an opened image before any EXIF rotation."""
    # Only for TIFF does Pillow report the rotated size.
    rotated = image.format == "TIFF" and exif_orientation(image) in TURNED
    return image.size[::-1] if rotated else image.size


def exif_orientation(image):
    """How EXIF says that an opened image is shown: 1, as stored, or rotated or mirrored, 2 to 8."""
    exif = Image.Image.getexif(image)  # image.getexif() would decode a PNG
    return exif.get(ExifTags.Base.Orientation, 1)


def clip_box(box, size):
    """The box clipped to an image of `size` (width, height). Boxes inside it are unchanged."""
    clipped = max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1])
    return box if clipped == tuple(box) else clipped


def apply_exif_orientation(image, boxes):
    """Turn an opened image and its boxes as EXIF says: cameras store pixels in sensor order, and
    boxes are in pixels of the stored image. Returns: (RGB image, boxes in its pixels)."""
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
    """Transparency becomes white, and 16 bits become 8."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
