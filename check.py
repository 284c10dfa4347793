"""`--check_dataset mine.jsonl`: look a data set over before anything is trained on it. No model is loaded."""

from bisect import bisect_right
from pathlib import Path

from PIL import Image

from data import InputError, JsonLines, region_mask
from look import overlay

FIRST = 9  # examples in the picture


def check_dataset(argv):
    """Print counts, histograms and every problem of a .jsonl with its line, and draw its first boxes.
    Returns: exit code 0, or 2 if there are problems. Raises: InputError if it cannot be read at all."""
    if not argv or argv[1:] not in ([], ["--allow_absolute_paths"]):
        raise InputError("--check_dataset takes the path of one .jsonl, and --allow_absolute_paths after it if need be")
    path, problems = Path(argv[0]), []
    try:
        data = JsonLines(path, bool(argv[1:]), problems)
    except InputError as error:
        if not problems:  # no line of it can be read
            raise
        return report(problems, str(error))
    areas, words, first = [], [], []
    for row in data.rows:
        try:
            example = data.read(row)  # to its last pixel, one image at a time
        except InputError as error:
            problems.append(str(error))
            continue
        # a grid as fine as the pixels, but for large images
        grid = min(example.image.height, 256), min(example.image.width, 256)
        areas.append(100 * region_mask(example.boxes, example.image.size, grid).float().mean().item())
        words.append(len(example.question.split()))
        if len(first) < FIRST:
            first.append(overlay(example.image, [0], (1, 1), example.boxes, size=224))
    images, boxes = len({row["key"] for row in data.rows}), sum(len(row["boxes"]) for row in data.rows)
    print(f"{path}: {len(areas)} good examples of {images} images with {boxes} boxes")
    print(histogram("area of the boxes, % of the image", areas, (0, 1, 2, 5, 10, 20, 50)))
    print(histogram("length of the question, words", words, (0, 5, 10, 15, 20, 40, 80)))
    if first:
        picture = path.with_suffix(".check.png")
        draw(first, picture)
        print(f"the first {len(first)} with their boxes: {picture}")
    return report(problems, "no problems")


def report(problems, otherwise):
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else otherwise)
    return 2 if problems else 0


def histogram(title, values, edges):
    """Lines of text: how many values lie from each edge on, up to the next."""
    counts = [0] * len(edges)
    for value in values:
        counts[bisect_right(edges, value) - 1] += 1
    names = [f"{low} to {high}" for low, high in zip(edges, edges[1:])] + [f"{edges[-1]} or more"]
    bars = ["#" * round(40 * count / max(counts + [1])) for count in counts]
    return "\n".join([title, *(f"  {n:>12} {c:6} {bar}".rstrip() for n, c, bar in zip(names, counts, bars))])


def draw(pictures, path):
    """Write the pictures side by side, three in a row."""
    size, gap = 224, 8
    rows = -(-len(pictures) // 3)
    sheet = Image.new("RGB", (3 * size + 4 * gap, rows * size + (rows + 1) * gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % 3 * (size + gap), gap + i // 3 * (size + gap)))
    try:
        sheet.save(path)
    except OSError as error:
        raise InputError(f"cannot write the picture {path}: {error.strerror}") from None
