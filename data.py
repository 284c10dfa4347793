"""An `Example` is a question about an image, with boxes around what is asked about; `region_mask`
finds the image tokens under them. A run trains on generated scenes or on your file."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from PIL import Image

from config import InputError, is_tiny


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


def answer_text(answer):
    """The accepted answers as one text."""
    return answer if isinstance(answer, str) else " or ".join(answer)


# --- the data sets of a run ---


def load_datasets(cfg):
    """The (training, held-out) data sets of a run; each has `len()`, and `[i]` returns an Example.
    Prints warnings about them. Raises: InputError."""
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
        eval_set.checksum += getattr(train_set, "checksum", "")  # resuming compares it
        if shared := len(image_keys(train_set) & image_keys(eval_set)):
            print(f"note: images of {eval_set.path} that are also in the training data: {shared}")
    return train_set, eval_set


def read_file(path, cfg):
    """The JsonLines of a file. Prints warnings about it. Raises: InputError."""
    from json_lines import JsonLines  # here, because a default run reads no file

    problems = [] if cfg.skip_bad_examples else None
    data = JsonLines(path, cfg.allow_absolute_paths, problems, cfg.boxes)
    if problems:
        print(f"skipped {data.rejected} rows of {data.path}; first problem: {problems[0]}")
    for note in data.notes():
        print(f"note: {note}")
    warn_tiny(cfg, [size for size, *_ in data.images.values()])
    return data


def warn_tiny(cfg, sizes):
    """Warn if the `sizes` of images differ from those that the tiny model was trained on."""
    if is_tiny(cfg.model_name_or_path) and set(sizes) - {(112, 112)}:
        advice = "for anything else, use --model_name_or_path"
        print(f"the tiny model only knows cards such as those in example/: {advice}")


def image_keys(dataset):
    """The set of keys of a data set's images. Generated scenes never share an image."""
    rows = getattr(dataset, "rows", None)
    return set(range(len(dataset))) if rows is None else {row["image_key"] for row in rows}


def next_image(dataset, index):
    """The index of the next example about another image; without one, of the next example."""
    rows, n = getattr(dataset, "rows", None), len(dataset)
    for i in range(index + 1, index + n):
        if rows is None or rows[i % n]["image_key"] != rows[index]["image_key"]:
            return i % n
    return (index + 1) % n


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
