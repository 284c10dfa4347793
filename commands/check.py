"""`sayo_mini.py check mine.jsonl` validates a data set without loading a model."""

import textwrap
from bisect import bisect_right
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from analysis.plots import show_boxes
from config import Config, InputError
from data import region_mask
from sources import open_dataset
from sources.dataset import read_file

MAX_DRAWN = 9  # examples in the contact sheet
THUMBNAIL, CAPTION, GAP, COLUMNS = 224, 72, 8, 3  # pixels, pixels, pixels, examples per row
CAPTION_LETTERS, CAPTION_LINES = 34, 4


def check_dataset(dataset, allow_absolute_paths=False):
    """Print counts, histograms and all problems of a data file, and draw its first examples.

    Args: dataset, its path; allow_absolute_paths, whether images may be outside its folder.
    Returns: exit code 0, or 2 if there are problems. Raises: InputError if nothing can be read.
    """
    path, problems = Path(dataset), []
    try:
        read_file(path)  # raises if it is not a readable file
        data = open_dataset(str(path), Config(allow_absolute_paths=allow_absolute_paths), problems)
    except InputError as error:
        if not problems:  # the file itself is unreadable or empty
            raise
        return print_problems(problems, str(error))
    areas, words, thumbnails = measure_examples(data, problems)
    images = len({row["image_key"] for row in data.rows})
    boxes = sum(len(row["boxes"]) for row in data.rows)
    print(f"{path}: {len(areas)} valid examples; {images} images, {boxes} boxes")
    print(histogram("area of the boxes, % of the image", areas, (0, 1, 2, 5, 10, 20, 50)))
    print(histogram("length of the question, words", words, (0, 5, 10, 15, 20, 40, 80)))
    if thumbnails:
        picture = path.with_suffix(".check.png")
        save_contact_sheet(thumbnails, picture)
        print(f"wrote the first {len(thumbnails)} examples with their boxes to {picture}")
    return print_problems(problems, "no problems")


def measure_examples(data, problems):
    """Decode every image, one at a time, and append failures to `problems`.
    Returns: three lists: areas of the regions in %, question lengths in words, and (thumbnail,
    caption) of the first examples."""
    areas, words, thumbnails = [], [], []
    for row in data.rows:
        try:
            example = data.read_example(row)
        except InputError as error:
            problems.append(str(error))
            continue
        width, height = example.image.size
        grid = min(height, 256), min(width, 256)  # one cell per pixel, coarser for large images
        region = region_mask(example.boxes, (width, height), grid)
        areas.append(100 * region.float().mean().item())
        words.append(len(example.question.split()))
        if len(thumbnails) < MAX_DRAWN:
            picture = show_boxes(example.image, example.boxes, (THUMBNAIL, THUMBNAIL))
            thumbnails.append((picture, caption(example)))
    return areas, words, thumbnails


def print_problems(problems, otherwise):
    """Print the problems and their number, or `otherwise` if there are none. Returns: exit code."""
    for problem in problems:
        print(problem)
    plural = "s" if len(problems) > 1 else ""
    print(f"{len(problems)} problem{plural}" if problems else otherwise)
    return 2 if problems else 0


def histogram(title, values, edges):
    """A histogram as text, with one line per bin [edge, next edge). The last bin is open."""
    counts = [0] * len(edges)
    for value in values:
        counts[bisect_right(edges, value) - 1] += 1
    bins = [f"{low} to {high}" for low, high in zip(edges, edges[1:])] + [f"{edges[-1]} or more"]
    lines = [title]
    for name, count in zip(bins, counts):
        bar = "#" * round(40 * count / max(counts + [1]))
        lines.append(f"  {name:>12} {count:6} {bar}".rstrip())
    return "\n".join(lines)


def caption(example):
    """Question and answer, shortened to CAPTION_LINES lines. The last line is the answer."""
    question = textwrap.wrap(example.question, CAPTION_LETTERS)[: CAPTION_LINES - 1]
    answer = textwrap.shorten(f"= {example.answer}", CAPTION_LETTERS, placeholder=" ...")
    return "\n".join([*question, answer])


def save_contact_sheet(thumbnails, path):
    """Save (thumbnail, caption) pairs as one image. Raises: InputError if it cannot be written."""
    width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION + GAP
    rows = -(-len(thumbnails) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for i, (thumbnail, text) in enumerate(thumbnails):
        x, y = GAP + i % COLUMNS * width, GAP + i // COLUMNS * height
        sheet.paste(thumbnail, (x, y))
        draw.multiline_text((x, y + thumbnail.height + 2), text, "black", font, spacing=2)
    try:
        sheet.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
