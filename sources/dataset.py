"""Shared base for annotated data sets: validation, reading images, and the held-out split."""

import codecs
import copy
import re
import zlib
from difflib import get_close_matches
from pathlib import Path

from PIL import Image

from config import InputError
from data import Example, region_mask
from sources.images import (
    MAX_ASPECT_RATIO,
    apply_exif_orientation,
    clip_box,
    image_errors,
    stored_size,
)

KEYS = "image", "question", "answer", "boxes", "id"
OTHER_NAMES = {  # names of these keys in other formats; difflib finds misspellings
    "image": "img images path file file_path file_name filename image_path image_file".split(),
    "question": "prompt query text problem instruction input".split(),
    "answer": "label target solution response output ground_truth gt".split(),
    "boxes": "bbox bboxes bbox_2d bounding_box bounding_boxes region regions rect rects".split(),
}


class AnnotatedDataset:
    """Questions about images, with boxes around the evidence.

    `add` validates a row and reads the size of its image. The pixels are decoded each time `[i]`
    returns the Example.

    Args: name, for messages; problems, None or a list. With None, the first bad row raises
    InputError. With a list, bad rows are skipped, and a line for each problem is appended to it.

    To add a format, write a subclass and add it to `sources.open_dataset`. Its `__init__` calls
    `add` for each row, or `reject` if the row cannot be parsed, and finally `finish`. Use
    `FileDataset` as the base class if images are files, otherwise define `open_image` as well.
    docs/extending.md has a complete CSV reader.
    """

    def __init__(self, name, problems=None):
        self.name, self.problems = name, problems
        self.rows = []  # dicts: image, question, answer, boxes, id, image_key, where
        self.notes = []  # lines to print before a run
        self.rejected = 0  # rows
        self._first_use = {}  # id -> place of its first use
        self._headers = {}  # image -> (its size, its image_key)

    def open_image(self, row):
        """Open a row's image with Pillow, and set `row["image_key"]` unless it was passed to `add`.

        The key is a string that identifies the image. `split` uses it to keep all questions about
        an image together. Raises: any exception; its text becomes part of the message.
        """
        raise NotImplementedError

    def add(self, where, row, **extra):
        """Validate a row and keep it if it is valid.

        Args: where, the row's place for messages, e.g. "mine.jsonl:3"; row, a dict with image,
        question, answer, boxes ([[x1, y1, x2, y2], ...] in pixels of the stored image) and an
        optional id (default: `where`); extra, further entries of the row for `open_image`.
        """
        unknown = [str(key) for key in row if key not in KEYS]
        row = {key: row.get(key) for key in KEYS} | extra
        row["where"] = where
        if row["id"] in (None, ""):
            row["id"] = where
        errors = list(self.validation_errors(row, unknown))
        if errors:
            self.reject(where, *errors)
        else:
            self.rows.append(row)

    def reject(self, where, *errors):
        """Skip a row and report its errors. Raises: InputError if bad rows are not skipped."""
        for error in errors:
            self.report_error(f"{where}: {error}")
        self.rejected += 1

    def finish(self):
        """Call after the last row. Adds the number of skipped rows to `notes`.
        Raises: InputError if there are no usable rows."""
        if self.rejected:
            total = self.rejected + len(self.rows)
            self.notes.append(
                f"{self.name}: skipped {self.rejected} of {total} examples; "
                f"first problem: {self.problems[0]}"
            )
        if not self.rows:
            raise InputError("; ".join([f"{self.name}: no usable examples", *self.notes[-1:]]))
        self._first_use = self._headers = None  # large, and used only by `add`

    def report_error(self, problem):
        """Add a line to `problems`. Raises: InputError with it if bad rows are not skipped."""
        if self.problems is None:
            raise InputError(f"{problem} (use --skip_bad_examples to skip unusable examples)")
        self.problems.append(problem)

    def validation_errors(self, row, unknown=()):
        """Yield everything that is wrong with a row, one line each.

        Args: unknown, the other keys of the row, one of which may be a misnamed key.
        """
        for name in ("image", "question", "answer"):
            if row[name] is None:
                yield f"{name} is missing{suggest_key(name, unknown)}"
            else:
                yield from text_errors(name, row[name])
        if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
            yield "id must be text or an integer"
        elif (first := self._first_use.setdefault(str(row["id"]), row["where"])) != row["where"]:
            yield f"id {row['id']!r} is already used by {first}"
        if row["boxes"] is None:
            yield f"boxes are missing{suggest_key('boxes', unknown)}"
        if isinstance(row["image"], str) and row["image"].strip():
            yield from self._image_and_region_errors(row)

    def _image_and_region_errors(self, row):
        if row["image"] not in self._headers:  # open an image once, even if many questions share it
            try:
                with image_errors(row["image"]), self.open_image(row) as image:
                    self._headers[row["image"]] = stored_size(image), row["image_key"]
            except InputError as error:
                yield str(error)
                return
        size, row["image_key"] = self._headers[row["image"]]
        yield from region_errors(row["boxes"], size)

    def read_example(self, row):
        """Decode a row's image. Returns: the Example. Raises: InputError naming the row if the
        image cannot be read."""
        try:
            with image_errors(row["image"]), self.open_image(row) as image:
                size = stored_size(image)
                for error in region_errors(row["boxes"], size):  # the file may have changed
                    raise ValueError(error)
                boxes = [clip_box(box, size) for box in row["boxes"]]
                image, boxes = apply_exif_orientation(image, boxes)
        except InputError as error:
            raise InputError(f"{row['where']}: {error}") from None
        return Example(image, row["question"], row["answer"], boxes, str(row["id"]))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples: index {index} is out of range")
        return self.next_readable(index)

    def next_readable(self, index):
        """The Example at `index` or, if bad rows are skipped, the next readable one.

        Damaged pixels are detected only here, during a run. Every replacement changes the training
        data, so it is printed, once per damaged example.
        Raises: InputError if bad rows are not skipped or no image can be read.
        """
        for offset in range(len(self)):
            try:
                return self.read_example(self.rows[(index + offset) % len(self)])
            except InputError as error:
                self._report_unreadable(str(error))
        raise InputError(f"{self.name}: no image can be read; last problem: {self.problems[-1]}")

    def _report_unreadable(self, problem):
        if self.problems is not None and problem in self.problems:
            return  # already printed
        self.report_error(problem)
        total = len(self.problems)
        print(f"skipped ({total} so far), using the next example: {problem}")

    def split(self, held_out):
        """Split by image into a training and a held-out data set.

        A hash of the image keys selects a fifth of the images, at least one. These are held out,
        with at most `held_out` questions about them. No image is in both parts. With `held_out` 0,
        nothing is held out. Returns: (training, held-out). Raises: InputError if an image has to
        be held out and there is only one.
        """
        keys = {row["image_key"] for row in self.rows}
        keys = sorted(keys, key=lambda key: zlib.crc32(key.encode()))
        if held_out and len(keys) < 2:
            raise InputError(
                f"{self.name}: the only image cannot be held out for evaluation; add images, "
                "or use --eval_examples 0"
            )
        chosen = set(keys[: max(1, len(keys) // 5)]) if held_out else set()
        train_set, eval_set = copy.copy(self), copy.copy(self)
        train_set.rows = [row for row in self.rows if row["image_key"] not in chosen]
        eval_set.rows = [row for row in self.rows if row["image_key"] in chosen][:held_out]
        return train_set, eval_set


class FileDataset(AnnotatedDataset):
    """An AnnotatedDataset whose images are files. Their paths are relative to `folder`.

    With `allow_absolute_paths`, images may be outside `folder`.
    """

    def __init__(self, name, folder, allow_absolute_paths=False, problems=None):
        super().__init__(name, problems)
        self.folder, self.allow_absolute_paths = Path(folder), allow_absolute_paths

    def open_image(self, row):
        folder = self.folder.resolve()
        path = (folder / row["image"]).resolve()
        inside = path.is_relative_to(folder)  # `..`, links and absolute paths can leave it
        if not inside and not self.allow_absolute_paths:
            raise ValueError(
                "it is outside the data set's folder: move it, or use --allow_absolute_paths"
            )
        if not path.is_file():  # opening a pipe would block forever
            raise ValueError("it is a folder" if path.is_dir() else "no such file")
        row["image_key"] = str(path.relative_to(folder) if inside else path)
        return Image.open(path)


def read_file(path):
    """The bytes of an annotation file, without a byte order mark.
    Raises: InputError if it cannot be read."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors write one
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the data set {path}: {reason}") from None


def region_errors(boxes, size):
    """Yield what is wrong with an image's `size` (width, height), or with the boxes on it."""
    if max(size) > MAX_ASPECT_RATIO * min(size):
        yield (
            f"the image is {size[0]} x {size[1]}: one side is more than {MAX_ASPECT_RATIO} times "
            "the other; crop it"
        )
    if boxes is None:
        return  # reported by `validation_errors`, which knows the other keys
    if not isinstance(boxes, list) or not all(map(_is_numeric, boxes)):
        yield f"boxes must be a list of [x1, y1, x2, y2], all numbers, but are {shorten(boxes)}"
        return
    values = [value for box in boxes for value in box]
    if min(size) > 1 and all(-1 <= v <= 1 for v in values) and any(v % 1 for v in values):
        yield (
            f"boxes: {shorten(boxes)} are probably fractions of the image, not pixels: "
            f"multiply x by the width, {size[0]}, and y by the height, {size[1]}"
        )
        return
    try:
        region_mask(boxes, size, (1, 1))
    except ValueError as error:
        yield f"boxes: {error}"


def _is_numeric(box):
    # `type`, because bool is an int for `isinstance`
    return isinstance(box, (list, tuple)) and all(type(v) in (int, float) for v in box)


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


def suggest_key(name, unknown):
    """A hint if one of the keys in `unknown` is probably meant to be `name`, otherwise ""."""
    lower = {key.lower(): key for key in unknown}
    known = [key for key in lower if key in OTHER_NAMES[name] or key == name]
    matches = known or get_close_matches(name, lower, n=1, cutoff=0.7)
    return f" (rename the key {shorten(lower[matches[0]])} to {name!r}?)" if matches else ""


def shorten(value):
    """The repr of a value for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
