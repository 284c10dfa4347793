"""`sayo_mini.py check mine.jsonl` validates a data set without loading a model."""

import textwrap
from pathlib import Path
from statistics import median
from unicodedata import east_asian_width

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from config import InputError
from data import answer_text, image_keys, region_mask
from extras.pictures import find_font, load_font, shorten, show_boxes
from json_lines import JsonLines

MAX_DRAWN, COLUMNS = 9, 3  # examples in the contact sheet, and in a row of it
THUMBNAIL, CAPTION, GAP = 224, 72, 8  # pixels
MADE_BY = "Software", "sayo-mini"  # in its file, so that only an earlier one is replaced


def check_dataset(dataset, allow_absolute_paths=False, boxes=""):
    """Print counts and all problems of a data file, and draw its first examples.

    Args: dataset, its path; allow_absolute_paths, whether images may be outside its folder; boxes,
    their unit.
    Returns: exit code 0, or 2 if there are problems. Raises: InputError if nothing can be read.
    """
    problems, areas, words, drawn = [], [], [], []
    try:
        data = JsonLines(dataset, allow_absolute_paths, problems, boxes)
    except InputError:
        if not problems:  # the file itself is unreadable or empty
            raise
        return print_problems(problems)
    readable = {}  # image -> whether it can be decoded, which is tried once
    for row in tqdm(data.rows, desc="check"):
        name, draw = row["image"], len(drawn) < MAX_DRAWN
        if name not in readable or readable[name] and draw:
            try:
                example = data.read_example(row)
            except InputError as error:
                problems.append(str(error))
                readable[name] = False
                continue
            readable[name] = True
            if draw:
                drawn.append(draw_example(example))
        if readable[name]:
            width, height = data.images[name][0]
            grid = min(height, 256), min(width, 256)  # one cell per pixel, coarser for large images
            region = region_mask(row["boxes"], (width, height), grid)
            areas.append(100 * region.float().mean().item())
            words.append(len(row["question"].split()))
    images = len(image_keys(data))
    count = sum(len(row["boxes"]) for row in data.rows)
    print(f"{dataset}: {len(areas)} valid examples; {images} images, {count} boxes")
    for title, values in (("area of the boxes, %", areas), ("words of the question", words)):
        if values:
            print(f"{title}: {min(values):.3g} to {max(values):.3g}, median {median(values):.3g}")
    for note in data.notes():
        print(f"note: {note}")
    code = print_problems(problems)
    if drawn:
        picture = Path(dataset).with_suffix(".check.png")
        try:
            save_contact_sheet(drawn, picture)
            print(f"wrote the first {len(drawn)} examples with their boxes to {picture}")
        except OSError as error:
            print(f"note: cannot write {picture}: {error.strerror or error}")
    return code


def print_problems(problems):
    """Print the problems and their number. Returns: the exit code."""
    for problem in problems:
        print(problem)
    plural = "" if len(problems) == 1 else "s"
    print(f"{len(problems) or 'no'} problem{plural}")
    return 2 if problems else 0


def draw_example(example):
    """The image with its boxes, and its question and answer below, as a small image."""
    tile = Image.new("RGB", (THUMBNAIL, THUMBNAIL + CAPTION), "white")
    photo = show_boxes(example.image, example.boxes, (THUMBNAIL, THUMBNAIL))
    tile.paste(photo)
    question, answer = example.question, f"= {answer_text(example.answer)}"
    font = find_font(12, question + answer)
    if not font:
        print(f"note: no font has all letters of {example.id}: its picture shows this name instead")
        font, question, answer = load_font(12), Path(example.id).name, ""
    width = 18 if any(east_asian_width(c) in "WF" for c in question + answer) else 34  # letters
    lines = textwrap.wrap(question, width)[:3]  # so that the answer fits in
    lines.append(shorten(answer, font, THUMBNAIL))
    draw = ImageDraw.Draw(tile)
    draw.multiline_text((0, photo.height + 2), "\n".join(lines), "black", font, spacing=2)
    return tile


def save_contact_sheet(tiles, path):
    """Save images of one size as one image. Raises: OSError if another file has this name."""
    if path.is_symlink() or path.exists() and not is_contact_sheet(path):
        raise OSError("it is another file; rename it")
    width, height = THUMBNAIL + GAP, THUMBNAIL + CAPTION + GAP
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, rows * height + GAP), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (GAP + i % COLUMNS * width, GAP + i // COLUMNS * height))
    made_by = PngInfo()
    made_by.add_text(*MADE_BY)
    sheet.save(path, pnginfo=made_by)


def is_contact_sheet(path):
    with Image.open(path, formats=["PNG"]) as image:
        return MADE_BY in image.info.items()
