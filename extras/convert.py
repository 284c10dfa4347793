"""Convert published data sets to .jsonl files, and mix such files.

    python extras/convert.py gqa GQA
    python extras/convert.py refocus ReFocus
    python extras/convert.py coco photos/instances.json photos/images
    python extras/convert.py yolo photos/images photos/labels photos/classes.txt
    python extras/convert.py mix paper.jsonl GQA/gqa.jsonl=0.8 ReFocus/refocus.jsonl=0.2

The first writes GQA/gqa.jsonl next to the downloaded files, the second downloads ReFocus. The next
two write photos/images.jsonl. See docs/data.md.
"""

import argparse
import hashlib
import io
import json
import math
import random
import sys
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from config import InputError, one_line
from json_lines import UNITS, JsonLines, image_errors, open_image, stored_size

# GQA's files are large. These parts are not used, and are dropped during parsing to save memory.
UNUSED = frozenset(
    "semantic semanticStr entailed equivalent types groups isBalanced relations attributes "
    "location weather".split()
)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, convert, arguments in (
        ("gqa", convert_gqa, ["folder"]),
        ("refocus", convert_refocus, ["folder"]),
        ("coco", convert_coco, ["annotations", "images"]),
        ("yolo", convert_yolo, ["images", "labels", "classes"]),
        ("mix", mix_files, ["output"]),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=convert)
        for argument in arguments:
            command.add_argument(argument, type=Path)
    command.add_argument("sources", nargs="+", type=file_and_share, metavar="file.jsonl=share")
    units = ["pixels", *UNITS]
    unit_help = "the unit of each source's boxes (default: pixels); see docs/data.md"
    command.add_argument("--boxes", nargs="+", choices=units, default=[], help=unit_help)
    command.add_argument("--count", type=int, default=20_000, help="rows to draw (default: 20000)")
    command.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args(argv))
    run = given.pop("run")
    try:
        run(**given)
    except Exception as error:
        print(f"convert.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def file_and_share(text):
    """("a.jsonl", 0.8) from "a.jsonl=0.8"."""
    path, _, share = text.rpartition("=")
    if not float(share) > 0:
        raise ValueError
    return path, float(share)


def write_rows(path, rows):
    """Write the rows of a data set. Raises: InputError if there are none, or the file exists."""
    if not rows:
        raise InputError(f"no rows to write to {path}")
    if path.exists():  # perhaps it was written by hand
        raise InputError(f"{path} exists already: move or delete it")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"wrote {path}: {len(rows)} rows; next: python sayo_mini.py check {path}")


# --- GQA, the larger of the paper's two data sets ---


def convert_gqa(folder):
    """Write `gqa.jsonl` into a folder with GQA's images/, `train_balanced_questions.json` and
    `train_sceneGraphs.json`; both files may be in subfolders."""
    if not (folder / "images").is_dir():
        raise InputError(f"{folder} has no folder images/")
    questions = read_gqa(folder, "train_balanced_questions.json")
    graphs = read_gqa(folder, "train_sceneGraphs.json")
    rows = [gqa_row(number, question, graphs) for number, question in questions.items()]
    rows = [row for row in rows if row["boxes"]]
    skipped = len(questions) - len(rows)
    print(f"GQA: skipped {skipped} of {len(questions)} questions: no annotated objects")
    write_rows(folder / "gqa.jsonl", rows)


def read_gqa(folder, name):
    """The content of a JSON file without the keys in UNUSED."""
    path = next(folder.rglob(name), None)
    if path is None:
        raise InputError(f"{folder} has no {name}")

    def drop_unused(pairs):
        return {key: value for key, value in pairs if key not in UNUSED}

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=drop_unused)
    except ValueError as error:
        raise InputError(f"{path}: not JSON in UTF-8 ({error})") from None


def gqa_row(number, question, graphs):
    """The row of a question. The region is the union of the boxes of the annotated objects: those
    of the answer if it has any, otherwise those of the full answer, otherwise those of the
    question. Without annotated objects, `boxes` is empty."""
    annotations, ids = question["annotations"], []
    for part in ("answer", "fullAnswer", "question"):
        if annotations.get(part):
            ids = dict.fromkeys(annotations[part].values())  # each once, in order
            break
    objects = [graphs[question["imageId"]]["objects"][i] for i in ids]
    return {
        "image": f"images/{question['imageId']}.jpg",
        "question": question["question"],
        "answer": question["answer"],
        "boxes": [[o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]] for o in objects],
        "id": number,
    }


# --- ReFocus, the smaller one: questions about charts ---


def convert_refocus(folder):
    """Write the training split of `ReFocus/ReFocus_Data` as `refocus.jsonl` and `images/`. Rows
    that share a chart share its file, which is named by a hash of its bytes."""
    import datasets  # here, because nothing else needs it

    table, rows = datasets.load_dataset("ReFocus/ReFocus_Data", split="train"), []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(table.cast_column("image", datasets.Image(decode=False))):
        areas = row["focus_areas_bbox"]  # one list per side: [x1 of every box], ...
        sides = [areas[side] for side in ("x1", "y1", "x2", "y2")] if areas else []
        if boxes := [list(box) for box in zip(*sides, strict=True)]:
            content = row["image"]["bytes"]
            image = f"images/{hashlib.sha256(content).hexdigest()[:16]}.png"
            with image_errors(f"ReFocus row {number}"):
                open_image(io.BytesIO(content)).save(folder / image)
            text = {"question": row["question"], "answer": row["answer"]}
            rows.append({"image": image, **text, "boxes": boxes, "id": f"refocus-{number}"})
    print(f"ReFocus: skipped {len(table) - len(rows)} of {len(table)} rows: no boxes")
    write_rows(folder / "refocus.jsonl", rows)


# --- COCO and YOLO: labeled boxes, about which the converter asks how many there are ---


def convert_coco(annotations, images):
    """Write a row per image and category of a COCO file next to the folder `images`."""
    try:
        coco = json.loads(annotations.read_bytes())
        names = {category["id"]: category["name"] for category in coco["categories"]}
        files = {image["id"]: image["file_name"] for image in coco["images"]}
        sizes = {i["file_name"]: (i.get("width"), i.get("height")) for i in coco["images"]}
        found = {}  # (file, category) -> boxes
        for item in coco["annotations"]:
            x, y, width, height = item["bbox"]
            key = files[item["image_id"]], names[item["category_id"]]
            found.setdefault(key, []).append([x, y, x + width, y + height])
            if item.get("iscrowd"):
                found[key].append(None)  # an unknown number
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{annotations} is not in COCO's format ({error!r})") from None
    missing = {file for file, _ in found if not (images / file).is_file()}
    if missing:
        print(f"COCO: left out {len(missing)} images that are not in {images}")
    found = {key: boxes for key, boxes in found.items() if key[0] not in missing}
    for file in dict.fromkeys(file for file, _ in found):
        with image_errors(images / file), open_image(images / file) as image:
            size = stored_size(image)
        labeled, (width, height) = sizes[file], size
        if None not in labeled and labeled != size:  # scaled, or labeled as displayed
            problem = f"its boxes fit {labeled[0]} x {labeled[1]} pixels, but the stored image has"
            advice = ""
            if labeled == (height, width):  # a photo that EXIF turns
                advice = ": apply the rotation to the files first (ImageOps.exif_transpose)"
            raise InputError(f"{images / file}: {problem} {width} x {height}{advice}")
    write_counts(images, found)


def convert_yolo(images, labels, classes):
    """Write a row per image and class of YOLO's label files. Args: images and labels, folders with
    files of the same names; classes, a text file with the name of a class per line."""
    if classes.suffix in (".yaml", ".yml"):
        raise InputError(f"{classes}: write the names of its classes to a text file, one per line")
    # Some editors write a byte order mark, which utf-8-sig drops.
    names, found = dict(enumerate(classes.read_text("utf-8-sig").splitlines())), {}
    for path in sorted(path for path in images.rglob("*") if path.is_file()):
        label = labels / path.relative_to(images).with_suffix(".txt")
        # Labels may be in the same folder.
        if not label.exists() or path.suffix.lower() in (".txt", ".xml", ".json"):
            continue
        with image_errors(path), open_image(path) as image:
            size, file = stored_size(image), path.relative_to(images).as_posix()
        for number, line in enumerate(label.read_text("utf-8-sig").splitlines(), 1):
            try:
                index, *box = line.split()
                x, y, w, h = map(float, box)  # center and size, in fractions of the image
                name = names[int(index)].strip()
            except (ValueError, LookupError):
                problem = "expected the number of a class and four fractions x y width height"
                raise InputError(f"{label}:{number}: {problem}") from None
            corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
            box = [round(v * side, 2) for v, side in zip(corners, size * 2)]
            found.setdefault((file, name), []).append(box)
    write_counts(images, found)


def write_counts(images, found):
    """Write rows that ask how many objects of a category are in an image. Args: images, their
    folder; found, {(file, category): boxes}, where a box of None is an unknown number."""
    images, rows = images.resolve(), []
    for (file, name), boxes in found.items():
        if None not in boxes:
            question = f"How many objects of the kind {name!r} are in the image?"
            row = {"image": f"{images.name}/{file}", "question": question}
            rows.append(row | {"answer": str(len(boxes)), "boxes": boxes})
    write_rows(images.with_name(f"{images.name}.jsonl"), rows)


# --- mixtures, such as the paper's: 80 % GQA, 20 % ReFocus ---


def mix_files(output, sources, boxes, count, seed):
    """Draw `count` rows from several .jsonl files, without replacement and in random order.

    The id of a row becomes its file and line. Paths of images become relative to the folder of
    `output`, or absolute if they lead outside. Boxes become pixels.
    Args: sources, pairs of a file and its share; shares are scaled to add up to 1; boxes, the units
    of the sources, or [].
    """
    if boxes and len(boxes) != len(sources):
        raise InputError(f"--boxes: give {len(sources)} units, one for each source, in their order")
    generator, folder = random.Random(seed), output.parent.resolve()
    mixed, outside, total = [], 0, sum(share for _, share in sources)
    ends = accumulate(share / total for _, share in sources)
    for (path, share), end, unit in zip(sources, ends, boxes or [""] * len(sources)):
        problems, wanted = [], round(count * end) - len(mixed)
        data = JsonLines(path, allow_absolute_paths=True, problems=problems, unit=unit)
        if problems:
            print(f"{path}: skipped {data.rejected} rows; first problem: {problems[0]}")
        if wanted > len(data):
            most = math.floor(len(data) * total / share)
            raise InputError(f"{path} has {len(data)} rows, not {wanted}: use --count {most}")
        for row in generator.sample(data.rows, wanted):
            image = data.image_path(row["image"])
            if image.is_relative_to(folder):
                image = image.relative_to(folder)
            else:
                outside += 1
            new = {"image": image.as_posix(), "id": row["where"]}
            mixed.append(new | {name: row[name] for name in ("question", "answer", "boxes")})
    generator.shuffle(mixed)
    write_rows(output, mixed)
    if outside:
        rows = f"{outside} rows have images outside {output.parent}"
        print(f"{rows}: check and train with --allow_absolute_paths")


if __name__ == "__main__":
    sys.exit(main())
