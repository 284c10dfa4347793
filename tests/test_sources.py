"""Tests of the readers in sources/ and the check command: all kinds of images, bad data in every
form, GQA and ReFocus in their published layouts, mixtures, and runs on the data."""

import csv
import io
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, load
from PIL import Image, ImageChops, ImageColor, ImageDraw

import sayo_mini
from commands.check import check_dataset
from config import InputError
from data import region_mask
from sources.gqa import Gqa
from sources.images import apply_exif_orientation
from sources.jsonl import JsonLines
from sources.mixture import Mixture
from sources.refocus import ReFocus
from sources.scenes import Scenes

HERE = Path(__file__).parent.parent
FAST = [
    *"--device cpu --no-load_in_4bit --prompts_per_step 2 --num_generations 4".split(),
    *"--eval_examples 2 --max_steps 2 --model_name_or_path".split(),
    str(TINY),
]
GOOD = dict(image="photo.jpg", question="What is it?", answer="a cat", boxes=[[1, 2, 30, 20.5]])


def main(*flags):
    return sayo_mini.main([*FAST, *map(str, flags)])


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- images of all kinds


def white_box(size=(60, 40), box=(6, 4, 18, 14)):
    """A black image with a white rectangle."""
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="white")
    return image


def reopened(image, format, **options):
    """Save the image in a format and open it again."""
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return Image.open(file)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are defined
def test_boxes_turn_with_the_image(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image, boxes = apply_exif_orientation(
        reopened(white_box(), format, exif=exif, **options), [(6, 4, 18, 14)]
    )
    assert image.size == ((40, 60) if orientation in (5, 6, 7, 8) else (60, 40))
    assert [tuple(box) for box in boxes] == [image.getbbox()]  # the white rectangle


def test_the_eight_orientations_all_differ():
    """Without this check, the test above could pass for orientations that are ignored."""
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image, boxes = apply_exif_orientation(
            reopened(white_box(), "PNG", exif=exif), [(6, 4, 18, 14)]
        )
        seen.add((image.size, *map(tuple, boxes)))
    assert len(seen) == 8


KINDS = {  # case -> (how an orange image is stored, the color that it shows)
    "RGB": (lambda image: reopened(image, "PNG"), (240, 120, 30)),
    "JPEG": (lambda image: reopened(image, "JPEG", quality=95), (240, 120, 30)),
    "grayscale": (lambda image: reopened(image.convert("L"), "PNG"), (146, 146, 146)),
    "bilevel": (lambda image: reopened(Image.new("1", image.size, 1), "PNG"), (255, 255, 255)),
    "palette": (lambda image: reopened(image.quantize(), "PNG"), (240, 120, 30)),
    "GIF": (lambda image: reopened(image, "GIF"), (240, 120, 30)),
    "CMYK": (lambda image: reopened(image.convert("CMYK"), "JPEG", quality=95), (240, 120, 30)),
    "CMYK TIFF": (lambda image: reopened(image.convert("CMYK"), "TIFF"), (240, 120, 30)),
    "transparent": (
        lambda image: reopened(Image.new("RGBA", image.size, (240, 120, 30, 0)), "PNG"),
        (255, 255, 255),
    ),
    "half transparent": (
        lambda image: reopened(Image.new("RGBA", image.size, (240, 120, 30, 128)), "PNG"),
        (247, 187, 142),
    ),
    "transparent gray": (
        lambda image: reopened(Image.new("LA", image.size, (9, 0)), "PNG"),
        (255, 255, 255),
    ),
    "transparent palette": (
        lambda image: reopened(Image.new("P", image.size, 0), "PNG", transparency=0),
        (255,) * 3,
    ),
    "transparent color": (
        lambda image: reopened(image, "PNG", transparency=(240, 120, 30)),
        (255, 255, 255),
    ),
    "16 bits": (
        lambda image: reopened(Image.new("I;16", image.size, 40000), "PNG"),
        (156, 156, 156),
    ),
    "16 bits TIFF": (
        lambda image: reopened(Image.new("I;16", image.size, 40000), "TIFF"),
        (156, 156, 156),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_all_kinds_become_rgb_as_displayed(kind):
    store, color = KINDS[kind]
    image, boxes = apply_exif_orientation(
        store(Image.new("RGB", (32, 24), (240, 120, 30))), [(1, 2, 3, 4)]
    )
    assert image.mode == "RGB" and image.size == (32, 24) and boxes == [(1, 2, 3, 4)]
    difference = ImageChops.difference(image, Image.new("RGB", (32, 24), color))
    assert max(high for _, high in difference.getextrema()) <= 3


@pytest.fixture(scope="module")
def vlm():
    return load(max_pixels=112 * 112)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 400), (400, 2), (200, 1), (5000, 4000), (9000, 90)]
)
def test_images_of_all_sizes_are_encoded_whole_and_within_max_pixels(tmp_path, vlm, size):
    Image.new("RGB", size, (240, 120, 30)).save(tmp_path / "a.png")
    row = GOOD | {"image": "a.png", "boxes": [[0, 0, size[0] / 2, size[1]]]}
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    example = JsonLines(tmp_path / "set.jsonl")[0]
    prompt = vlm.encode(example.image, example.question)
    cell = 16 * 16  # pixels; even the thinnest image has one row of cells
    assert prompt.grid[0] * prompt.grid[1] == len(prompt.image_positions)
    assert len(prompt.image_positions) * cell <= 112 * 112 or 1 in prompt.grid
    red, green, blue = prompt.pixel_values.view(len(prompt.pixel_values), 3, -1).mean((0, 2))
    assert red > green > blue and red - blue > 1
    region = region_mask(example.boxes, example.image.size, prompt.grid).view(prompt.grid)
    half = math.ceil(prompt.grid[1] / 2)
    assert region[:, :half].all() and not region[:, half:].any()


def test_max_pixels_limits_the_image_tokens_but_not_the_text():
    image = Image.new("RGB", (2000, 1500))
    question = "what color is the dot on the red card ? " * 50
    prompts = [load(max_pixels=side * side).encode(image, question) for side in (64, 112)]
    small, large = (len(prompt.image_positions) for prompt in prompts)
    assert small <= 64 * 64 / 256 < large <= 112 * 112 / 256
    texts = [len(p.input_ids) - len(p.image_positions) for p in prompts]
    assert texts[0] == texts[1] > 50 * 9


# --- bad lines of a .jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for data sets that contains good and damaged images; one image is outside of it."""
    folder = tmp_path_factory.mktemp("outer") / "data"
    (folder / "more").mkdir(parents=True)
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    noise.save(folder / "../outside.png")
    for format in ("jpg", "png", "webp", "gif", "tiff", "bmp"):
        noise.save(folder / f"photo.{format}")
        whole = (folder / f"photo.{format}").read_bytes()
        for share in (0, 0.01, 0.5, 0.9):
            (folder / f"cut{share}.{format}").write_bytes(whole[: int(share * len(whole))])
        flipped = bytearray(whole)
        flipped[:8] = bytes(b ^ 255 for b in whole[:8])  # so that no format is recognized
        (folder / f"flipped.{format}").write_bytes(flipped)
    flipped = bytearray((folder / "photo.png").read_bytes())
    flipped[18] ^= 255  # the width in the header, which has a checksum
    (folder / "width.png").write_bytes(flipped)
    flipped = bytearray((folder / "photo.png").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "pixels.png").write_bytes(flipped)
    Image.new("RGB", (800, 3)).save(folder / "ribbon.png")
    Image.new("1", (20000, 20000)).save(folder / "bomb.png")
    (folder / "link.png").symlink_to(folder / "../outside.png")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "text.png").write_text("not an image")
    (folder / "script.svg").write_text("<svg/>")
    return folder


def good(**change):
    return GOOD | change


def without(key):
    return {k: v for k, v in GOOD.items() if k != key}


WRONG_BOXES = {
    "none": [],
    "null": None,
    "text": "1, 2, 3, 4",
    "number": 7,
    "true": True,
    "object": {"x1": 1},
    "a flat box": [1, 2, 3, 4],
    "an empty box": [[]],
    "three numbers": [[1, 2, 3]],
    "five numbers": [[1, 2, 3, 4, 5]],
    "nested": [[[1, 2, 30, 20]]],
    "text in it": [["1", "2", "30", "20"]],
    "null in it": [[1, 2, None, 20]],
    "true in it": [[True, 2, 30, 20]],
    "object in it": [[1, 2, {}, 20]],
    "letters": ["abcd"],
    "objects": [{"x1": 1, "y1": 2, "x2": 3, "y2": 4}],
    "inverted in x": [[30, 2, 1, 20]],
    "inverted in y": [[1, 20, 30, 2]],
    "no width": [[1, 2, 1, 20]],
    "no height": [[1, 2, 30, 2]],
    "a point": [[1, 2, 1, 2]],
    "NaN": [[1, 2, math.nan, 20]],
    "infinite": [[1, 2, math.inf, 20]],
    "minus infinite": [[-math.inf, 2, 30, 20]],
    "outside right": [[64, 2, 70, 20]],
    "outside below": [[1, 48, 30, 60]],
    "outside left": [[-9, 2, 0, 20]],
    "outside above": [[1, -9, 30, 0]],
    "huge": [[1e300, 2, 1e301, 20]],
    "huge whole": [[10**40, 2, 10**41, 20]],
    "the second inverted": [[1, 2, 3, 4], [3, 2, 1, 4]],
    "the second null": [[1, 2, 3, 4], None],
    "width and height zero": [[10, 10, 0, 0]],
}
FORMATS = ("jpg", "png", "webp", "gif", "tiff")
MALFORMED = {
    "not JSON": "image: photo.jpg",
    "half an object": '{"image": "photo.jpg",',
    "half a string": '{"image": "pho',
    "two objects": json.dumps(GOOD) + json.dumps(GOOD),
    "single quotes": str(GOOD),
    "a comment": "# " + json.dumps(GOOD),
    "a trailing comma": json.dumps(GOOD)[:-1] + ",}",
    "a list": [GOOD],
    "a number": "3",
    "text": '"photo.jpg"',
    "null": "null",
    "true": "true",
    "an empty object": {},
    "nested too deeply": "[" * 100_000,
    "a number of 9,000 digits": '{"image": ' + "9" * 9000 + "}",
    "NUL": "\0",
    "not UTF-8": json.dumps(GOOD).encode() + b"\xff",
    "Latin-1": json.dumps(good(answer="é"), ensure_ascii=False).encode("latin-1"),
    "UTF-16": json.dumps(GOOD).encode("utf-16")[:-1],
    "a bit flipped in a brace": json.dumps(GOOD).replace("{", "[", 1),
    "a bit flipped in a key": json.dumps(GOOD).replace('"image"', '"imagd"'),
    "a bit flipped in a quote": json.dumps(GOOD).replace('"image"', '#image"'),
    "a bit flipped in a colon": json.dumps(GOOD).replace(":", ";", 1),
    **{f"no {key}": without(key) for key in GOOD},
    **{
        f"{name} {key}": good(**{key: value})
        for key in ("image", "question", "answer")
        for name, value in {
            "empty": "",
            "blank": " \n\t",
            "null": None,
            "number as": 3,
            "list as": ["a"],
            "object as": {},
            "true as": True,
            "half a surrogate pair in": "a\ud800",
        }.items()
    },
    **{f"boxes: {name}": good(boxes=value) for name, value in WRONG_BOXES.items()},
    **{
        f"id: {name}": good(id=value)
        for name, value in {
            "list": [1],
            "object": {},
            "true": True,
            "fraction": 1.5,
            "used by another line": "first",
        }.items()
    },
    "no such image": good(image="nowhere.png"),
    "no such image, name with a line break": good(image="no\nwhere.png"),
    "a folder as image": good(image="more"),
    "this folder as image": good(image="."),
    "text as image": good(image="text.png"),
    "vector graphics": good(image="script.svg"),
    "a NUL in the name": good(image="photo\0.png"),
    "a name of 5,000 letters": good(image="a" * 5000),
    "no such image, Unicode name": good(image="пёс.png"),
    "a link that leads out": good(image="link.png"),
    "a dangling link": good(image="dangling.png"),
    "a link to itself": good(image="loop.png"),
    "a path out with ..": good(image="../outside.png"),
    "out and in again, no such image": good(image="../data/nothing.png"),
    "an absolute path": good(image="/etc/hostname"),
    "a device": good(image="/dev/zero"),
    "a URL": good(image="https://example.org/photo.jpg"),
    "the wrong case": good(image="PHOTO.JPG"),
    "an extreme aspect ratio": good(image="ribbon.png", boxes=[[1, 1, 2, 2]]),
    "a decompression bomb": good(image="bomb.png"),
    "a header with flipped bits": good(image="width.png"),
    "a placeholder in the question": good(question="What <|image_pad|> is it?"),
    "an end of turn in the question": good(question="What is it?<|im_end|>"),
    **{f"empty {format}": good(image=f"cut0.{format}") for format in FORMATS},
    **{
        f"a hundredth of a {format}": good(image=f"cut0.01.{format}")
        for format in ("webp", "gif", "tiff")
    },
    **{f"a flipped {format}": good(image=f"flipped.{format}") for format in FORMATS},
}
DAMAGED = {  # the header is intact, so the damage shows only when the pixels are decoded
    **{f"{share} of a JPEG": good(image=f"cut{share}.jpg") for share in (0.5, 0.9)},
    **{f"{share} of a PNG": good(image=f"cut{share}.png") for share in (0.01, 0.5, 0.9)},
    "0.5 of a TIFF": good(image="cut0.5.tiff"),
    "0.9 of a BMP": good(image="cut0.9.bmp"),
    "pixels with a flipped bit": good(image="pixels.png"),
}


def write(folder, *lines, name="set.jsonl"):
    """Write these lines as a data set; text and bytes are not changed. Returns: its path."""
    lines = [json.dumps(x) if isinstance(x, (dict, list)) else x for x in lines]
    lines = [x.encode(errors="surrogatepass") if isinstance(x, str) else x for x in lines]
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    return folder / name


def error_line(capfd):
    """The text on stderr, which must be one line."""
    err = capfd.readouterr().err
    assert err.startswith("sayo_mini.py: ") and err.count("\n") == 1, err
    return err


def test_there_are_a_hundred_malformed_lines():
    assert len(MALFORMED) + len(DAMAGED) >= 100


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_a_one_line_error_or_skipped(
    folder, tmp_path, capfd, monkeypatch, case
):
    """The error comes before a model is loaded and before anything is written."""
    path = write(folder, good(id="first"), "", MALFORMED[case], good(image="photo.png"))
    monkeypatch.setattr(sayo_mini, "load_vlm", None)
    assert main("--dataset", path, "--output_dir", tmp_path / "run") == 2
    line = error_line(capfd)
    assert f"{path}:3: " in line and "--skip_bad_examples" in line
    if case == "id: used by another line":
        assert f"{path}:1" in line  # both lines are named
    assert not (tmp_path / "run").exists()
    data = JsonLines(path, problems=[])
    assert [row["where"] for row in data.rows] == [f"{path}:1", f"{path}:4"] and data.rejected == 1
    assert f"skipped 1 of 3 examples; first problem: {path}:3: " in data.notes[0]


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_pixels_are_a_one_line_error_or_the_next_example_is_used(folder, capfd, case):
    path = write(folder, GOOD, DAMAGED[case], good(image="photo.png"))
    with pytest.raises(InputError, match=DAMAGED[case]["image"]) as error:
        JsonLines(path)[1]
    assert f"{path}:2: " in str(error.value) and len(str(error.value).splitlines()) == 1
    data = JsonLines(path, problems=[])
    assert data[1].id == data[1].id == f"{path}:3" and len(data) == 3
    said = capfd.readouterr()
    assert said.out.count("skipped") == 1 and "(1 so far)" in said.out and not said.err


@pytest.mark.parametrize(
    "name, word", [("more", "a folder"), ("nowhere.png", "no such file"), ("pipe", "no such file")]
)
def test_an_image_path_that_is_not_a_file_is_never_opened(folder, name, word, monkeypatch):
    """Opening a pipe would block forever."""
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    path = write(folder, good(image=name))
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(InputError, match=word):
        JsonLines(path)


def test_skipping_wraps_around_and_no_readable_example_is_an_error(folder):
    data = JsonLines(write(folder, GOOD, good(image="pixels.png")), problems=[])
    assert data[1].id.endswith(":1")
    data = JsonLines(write(folder, *[good(image="pixels.png")] * 2), problems=[])
    with pytest.raises(InputError, match="set.jsonl"):
        data[0]


def test_an_index_beyond_the_data_set_is_an_index_error(folder):
    data = JsonLines(write(folder, GOOD, GOOD))
    assert len(list(data)) == 2 and data[-1].id.endswith(":2")
    for index in (2, -3):
        with pytest.raises(IndexError):
            data[index]


def test_only_bad_lines_are_an_error_even_if_skipped(folder, tmp_path, capfd):
    path = write(folder, *[MALFORMED["no boxes"]] * 3)
    assert main("--dataset", path, "--skip_bad_examples", "--output_dir", tmp_path / "run") == 2
    line = error_line(capfd)
    assert "skipped 3 of 3 examples" in line and f"{path}:1: " in line


@pytest.mark.parametrize("image", ["../outside.png", "link.png", "{absolute}"])
def test_a_flag_allows_images_outside_the_folder(folder, image):
    path = write(folder, good(image=image.format(absolute=folder / "../outside.png")))
    with pytest.raises(InputError, match="--allow_absolute_paths"):
        JsonLines(path)
    assert JsonLines(path, allow_absolute_paths=True)[0].image.size == (64, 48)


def test_paths_that_stay_within_the_folder_need_no_flag(folder):
    names = "photo.jpg", "more/../photo.jpg", "./photo.jpg"
    rows = JsonLines(write(folder, *[good(image=name) for name in names])).rows
    assert {row["image_key"] for row in rows} == {"photo.jpg"}  # the split sees one image


def test_byte_order_marks_and_other_scripts_are_read(folder):
    row = good(question="Что это? 🐈", answer="кот")
    path = write(folder, b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode())
    assert (JsonLines(path)[0].question, JsonLines(path)[0].answer) == ("Что это? 🐈", "кот")


def test_an_error_of_the_image_processor_names_the_example(tmp_path, capfd, monkeypatch):
    """A problem that no reader has caught is still a one-line error."""

    def encode(*args):
        raise ValueError("no room")

    monkeypatch.setattr("model.Vlm.encode", encode)
    assert main("--eval_examples", 0, "--output_dir", tmp_path / "run") == 2
    assert "example train-0-" in capfd.readouterr().err.splitlines()[-1]


# --- a new format


def test_the_csv_reader_in_extending_rejects_bad_rows_and_files(folder):
    text = (HERE / "docs" / "extending.md").read_text()
    names = {}
    exec(text[text.index("# sources/csv_file.py") :].split("```")[0], names)
    path = folder / "set.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*GOOD, "source"], restval="extra column")
        writer.writeheader()
        writer.writerow(GOOD | {"question": "What is it?\nSay it in one word."})
        writer.writerow(GOOD | {"boxes": "1, 2, 3, 4"})
        writer.writerow(GOOD | {"image": "nowhere.png"})
        writer.writerow(GOOD)
    with pytest.raises(InputError, match=f"{path}: row 2: boxes"):
        names["Csv"](path)
    data = names["Csv"](path, problems=[])
    assert len(data) == 2 and data.rejected == 2 and "row 3" in data.problems[1]
    assert data[0].question.endswith("\nSay it in one word.") and data[1].id == f"{path}: row 4"
    assert data[1].boxes == GOOD["boxes"] and data[1].image.size == (64, 48)
    with pytest.raises(InputError, match="nowhere.csv"):
        names["Csv"](folder / "nowhere.csv")
    path.write_bytes("image,question\ncafé.png,what?".encode("latin-1"))
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        names["Csv"](path)
    path.write_text('image,question\n"' + "x" * 200_000)  # a quote that is never closed
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        names["Csv"](path)


# --- the check command


def test_the_shipped_example_is_valid_and_in_the_docs(capfd, tmp_path):
    for path in (HERE / "example").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert sayo_mini.main(["check", str(tmp_path / "example.jsonl")]) == 0
    out = capfd.readouterr().out
    assert "3 valid examples; 3 images, 4 boxes" in out and "no problems" in out
    assert Image.open(tmp_path / "example.check.png").size == (704, 312)
    text = (HERE / "example" / "example.jsonl").read_text()
    assert len(text.splitlines()) == 3 and text in (HERE / "docs" / "data.md").read_text()
    assert out.replace(str(tmp_path), "example") in (HERE / "docs" / "data.md").read_text()


def test_the_shipped_examples_are_the_first_validation_scenes():
    """The tiny model can solve them, and no training scene is among them."""
    data = JsonLines(HERE / "example" / "example.jsonl")
    for example, scene in zip(data, Scenes("validation", 3), strict=True):
        assert example.image.tobytes() == scene.image.tobytes()
        assert (example.question, example.answer) == (scene.question, scene.answer)
        assert [tuple(example.boxes[0])] == scene.boxes
    assert len(data[2].boxes) == 2 and data[2].id == "card-and-dot"


# --- what check finds ---

NEAR_MISSES = [  # (a key that is not read, the key that is missing)
    ("img", "image"),
    ("image_path", "image"),
    ("Image", "image"),
    ("prompt", "question"),
    ("Questions", "question"),
    ("anwser", "answer"),
    ("label", "answer"),
    ("bbox", "boxes"),
    ("bboxes", "boxes"),
    ("box", "boxes"),
]


@pytest.mark.parametrize("key, meant", NEAR_MISSES)
def test_a_near_miss_of_a_key_gets_a_suggestion(folder, key, meant):
    row = {k: v for k, v in GOOD.items() if k != meant} | {key: GOOD[meant]}
    with pytest.raises(InputError) as error:
        JsonLines(write(folder, row))
    assert f"(rename the key {key!r} to {meant!r}?)" in str(error.value)
    row = {k: v for k, v in GOOD.items() if k != meant} | {"remark": 1}
    with pytest.raises(InputError) as error:
        JsonLines(write(folder, row))
    assert "missing (use --skip" in str(error.value)  # no similar key, so no suggestion


def test_a_number_as_answer_is_not_called_missing(folder):
    with pytest.raises(InputError, match="answer must be text, in quotes, but is 5 "):
        JsonLines(write(folder, good(answer=5)))
    with pytest.raises(InputError, match="answer is empty"):
        JsonLines(write(folder, good(answer=" ")))


@pytest.mark.parametrize("boxes", [[[0.1, 0.2, 0.5, 0.6]], [[0, 0, 1, 1], [-0.01, 0.5, 1.0, 1]]])
def test_boxes_in_shares_of_the_image_are_a_problem(folder, capfd, boxes):
    path = write(folder, good(boxes=boxes))
    assert sayo_mini.main(["check", str(path)]) == 2
    out = capfd.readouterr().out
    assert f"{path}:1: boxes: " in out and "multiply x by the width, 64" in out


@pytest.mark.parametrize("boxes", [[[0, 0, 1, 1]], [[0.5, 0.5, 1.5, 2]], [[0.1, 0.2, 30, 20]]])
def test_small_boxes_in_pixels_are_fine(folder, boxes):
    assert len(JsonLines(write(folder, good(boxes=boxes)))) == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_one_problem(folder, capfd, indent):
    path = folder / "array.jsonl"
    path.write_text(json.dumps([GOOD] * 80, indent=indent))
    assert sayo_mini.main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    assert not out and err.count("\n") == 1 and "is a JSON array" in err


def test_the_picture_shows_question_and_answer(folder):
    """Both are below the image, and a long question does not hide the answer."""

    def letters(**change):
        path = write(folder, good(**change))
        assert check_dataset(path) == 0
        picture = Image.open(path.with_suffix(".check.png")).convert("L").crop((8, 180, 232, 260))
        return picture.point(lambda v: 255 * (v < 128)).getbbox(), picture.tobytes()

    short, _ = letters(question="Why?", answer="so")
    box, long = letters(question="Why ever? " * 40, answer="so")
    assert box[2] > 150 and box[3] > short[3] + 20
    assert long != letters(question="Why ever? " * 40, answer="no")[1]


def test_the_check_names_every_problem_and_summarizes_the_valid_examples(
    folder, capfd, monkeypatch
):
    monkeypatch.setattr(sayo_mini, "load_vlm", None)
    path = write(
        folder,
        good(question="", boxes=[[3, 2, 1, 4]]),
        "{",
        DAMAGED["pixels with a flipped bit"],
        good(boxes=[[0, 0, 64, 48]]),
        good(boxes=[[0, 0, 8, 6]]),
        good(image="nowhere.png"),
        good(
            question="one two three four five six",
            image="photo.png",
            boxes=[[0, 0, 8, 6], [4, 0, 16, 6]],
        ),
    )
    assert sayo_mini.main(["check", str(path)]) == 2
    out, err = capfd.readouterr()
    assert not err and "3 valid examples;" in out and "5 problems" in out
    for start in (
        ":1: question",
        ":1: boxes",
        ":2: not JSON",
        ":3: cannot read the image 'pixels.png'",
        ":6: cannot",
    ):
        assert out.count(f"{path}{start}") == 1
    areas, words = out.split("length of the question")
    counted = [
        re.findall(r"^ +(\w+ (?:to|or) \w+) +([1-9]\d*) ", part, re.MULTILINE)
        for part in (areas, words)
    ]
    assert counted[0] == [("1 to 2", "1"), ("2 to 5", "1"), ("50 or more", "1")]
    assert counted[1] == [("0 to 5", "2"), ("5 to 10", "1")]
    picture = Image.open(path.with_suffix(".check.png"))
    first = picture.convert("L").crop((8, 8, 232, 176))
    assert len(set(first.get_flattened_data())) > 50  # shades of gray, so it is not blank


def test_the_largest_boxes_can_be_drawn_on_the_smallest_image(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    path = write(tmp_path, good(image="dot.png", boxes=[[-(10**400), -1e300, 1e300, 10**400]]))
    assert sayo_mini.main(["check", str(path)]) == 0
    assert JsonLines(path)[0].boxes == [(0, 0, 1, 1)]  # clipped, like the region


@pytest.mark.parametrize("arguments", [[], ["a.jsonl", "b.jsonl"], ["nowhere.jsonl"], ["."]])
def test_a_check_without_a_readable_file_is_a_one_line_error(
    capfd, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    assert sayo_mini.main(["check", *arguments]) == 2
    error_line(capfd)
    assert not list(tmp_path.iterdir())


def test_the_check_allows_images_outside_the_folder_with_the_flag(folder, capfd):
    path = write(folder, good(image="../outside.png"))
    assert check_dataset(path) == sayo_mini.main(["check", str(path)]) == 2
    assert "--allow_absolute_paths" in capfd.readouterr().out
    assert check_dataset(path, allow_absolute_paths=True) == 0
    assert sayo_mini.main(["check", str(path), "--allow_absolute_paths"]) == 0


def test_the_flag_of_the_last_release_still_works_and_names_the_command(folder, capfd):
    path = write(folder, GOOD)
    assert sayo_mini.main(["--check_dataset", str(path)]) == 0
    notice, *rest = capfd.readouterr().out.splitlines()
    assert "--check_dataset" in notice and "sayo_mini.py check" in notice
    assert sayo_mini.main(["check", str(path)]) == 0
    assert capfd.readouterr().out.splitlines() == rest


# --- GQA


def gqa_question(image, answer=(), full=(), asked=(), **change):
    """A question as in the published files, whose annotations map spans of words to objects."""
    spans = {"answer": answer, "fullAnswer": full, "question": asked}
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (722332)"}],
        "entailed": ["1"],
        "equivalent": ["1"],
        "question": "What is on the white wall?",
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": "", "local": "14-wall_on,s"},
        "answer": "pipe",
        "semanticStr": "select: wall (722332)",
        "annotations": {k: {str(i): o for i, o in enumerate(v)} for k, v in spans.items()},
        "types": {"detailed": "relS", "semantic": "rel", "structural": "query"},
        "fullAnswer": "The pipe is on the wall.",
    } | change


def scene(**objects):
    objects = {
        i: {"name": i, "x": x, "y": y, "w": w, "h": h, "attributes": [], "relations": []}
        for i, (x, y, w, h) in objects.items()
    }
    return {"width": 60, "height": 40, "location": "indoors", "objects": objects}


@pytest.fixture
def gqa(tmp_path):
    """A folder with the files of GQA's three archives."""
    folder = tmp_path / "gqa"
    for name in ("images", "questions", "sceneGraphs"):
        (folder / name).mkdir(parents=True)
    graphs = {}
    for i in range(1, 6):
        white_box().save(folder / "images" / f"{i}.jpg")
        graphs[str(i)] = scene(pipe=(6, 4, 12, 10), wall=(0, 0, 60, 40), door=(30, 10, 10, 20))
    questions = {
        "q1": gqa_question("1", ["pipe"], ["pipe", "wall"], ["wall"]),
        "q2": gqa_question("2", [], ["pipe", "door", "pipe"], ["wall"]),
        "q3": gqa_question("3", [], [], ["wall"]),
        "q4": gqa_question("4"),
        "q5": gqa_question("5", ["door"]),
    }
    (folder / "sceneGraphs" / "train_sceneGraphs.json").write_text(json.dumps(graphs))
    (folder / "questions" / "train_balanced_questions.json").write_text(json.dumps(questions))
    return folder


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_gqa_takes_the_objects_of_the_answer_or_the_full_answer_or_the_question(gqa):
    data = Gqa(gqa)
    assert [(e.id, e.boxes) for e in data] == [
        ("q1", [(6, 4, 18, 14)]),
        ("q2", [(6, 4, 18, 14), (30, 10, 40, 30)]),
        ("q3", [(0, 0, 60, 40)]),
        ("q5", [(30, 10, 40, 30)]),
    ]
    assert data[0].question == "What is on the white wall?" and data[0].answer == "pipe"
    assert data[0].image.size == (60, 40) and data[0].image.mode == "RGB"
    assert data.notes == ["GQA: skipped 1 of 5 questions: no annotated objects"]
    kept = {key for row in data.rows for key in row}
    assert "semantic" not in kept
    assert not any(isinstance(v, Image.Image) for row in data.rows for v in row.values())


def test_gqa_with_all_questions_and_files_in_other_places(gqa):
    """The complete training set has ten files, and files may be directly in the data folder."""
    content = json.loads((gqa / "questions" / "train_balanced_questions.json").read_text())
    (gqa / "questions" / "train_balanced_questions.json").unlink()
    (gqa / "questions" / "train_all_questions").mkdir()
    for i, (number, question) in enumerate(content.items()):
        path = gqa / "questions" / "train_all_questions" / f"train_all_questions_{i}.json"
        path.write_text(json.dumps({number: question}))
    (gqa / "sceneGraphs" / "train_sceneGraphs.json").rename(gqa / "train_sceneGraphs.json")
    assert [row["id"] for row in Gqa(gqa).rows] == ["q1", "q2", "q3", "q5"]


def test_no_image_of_gqa_is_on_both_sides_of_the_split(gqa):
    def repeat(questions):
        for i in range(40):
            questions[f"r{i}"] = gqa_question(str(1 + i % 5), ["pipe"])

    change_json(gqa / "questions" / "train_balanced_questions.json", repeat)
    train, held_out = Gqa(gqa).split(100)
    assert len(train) and len(held_out)
    assert not {row["image_key"] for row in train.rows} & {
        row["image_key"] for row in held_out.rows
    }


GQA_ERRORS = {
    "no annotations": dict(annotations=None),
    "annotations that are a list": dict(annotations=["pipe"]),
    "an object that is not in the graph": dict(annotations={"answer": {"0": "roof"}}),
    "an object that is a list": dict(annotations={"answer": {"0": ["pipe"]}}),
    "an image without a graph": dict(imageId="77"),
    "an image that is a number": dict(imageId=2),
    "an image outside the folder": dict(imageId="../../x"),
    "no answer": dict(answer=None),
    "a blank question": dict(question=" "),
}


@pytest.mark.parametrize("case", GQA_ERRORS)
def test_a_bad_question_of_gqa_is_a_one_line_error_or_skipped(gqa, tmp_path, capfd, case):
    path = gqa / "questions" / "train_balanced_questions.json"
    change_json(path, lambda questions: questions["q2"].update(GQA_ERRORS[case]))
    flags = ["--dataset", "gqa", "--data_dir", gqa, "--output_dir", tmp_path / "run"]
    assert main(*flags) == 2
    assert f"{path}: question q2: " in error_line(capfd) and not (tmp_path / "run").exists()
    data = Gqa(gqa, problems=[])
    assert [row["id"] for row in data.rows] == ["q1", "q3", "q5"]
    assert "skipped 1 of 4 examples" in data.notes[-1]


GRAPH_ERRORS = {"text": "6", "null": None, "no width": 0, "outside": 100}


@pytest.mark.parametrize("case", GRAPH_ERRORS)
def test_a_bad_box_in_a_scene_graph_names_the_question(gqa, case):
    key = "w" if case == "no width" else "x"
    change_json(
        gqa / "sceneGraphs" / "train_sceneGraphs.json",
        lambda graphs: graphs["2"]["objects"]["pipe"].update({key: GRAPH_ERRORS[case]}),
    )
    with pytest.raises(InputError, match="question q2: "):
        Gqa(gqa)


QUESTIONS, GRAPHS = "questions/train_balanced_questions.json", "sceneGraphs/train_sceneGraphs.json"


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda gqa: (gqa / QUESTIONS).unlink(), "train_balanced_questions.json"),
        (lambda gqa: (gqa / GRAPHS).unlink(), "train_sceneGraphs.json"),
        (lambda gqa: (gqa / GRAPHS).write_text("{"), "train_sceneGraphs.json"),
        (lambda gqa: (gqa / GRAPHS).write_bytes(b"\xff{"), "train_sceneGraphs.json"),
        (lambda gqa: (gqa / QUESTIONS).write_text("[]"), "train_balanced_questions.json"),
        (lambda gqa: (gqa / QUESTIONS).write_text('{"q": 1}'), "question q"),
        (lambda gqa: (gqa / QUESTIONS).write_text("{}"), "no usable examples"),
        (lambda gqa: (gqa / "images" / "2.jpg").unlink(), "images/2.jpg"),
        (lambda gqa: (gqa / "images" / "2.jpg").write_bytes(b""), "images/2.jpg"),
        (lambda gqa: gqa.rename(gqa.parent / "elsewhere"), "--data_dir"),
    ],
)
def test_a_damaged_folder_of_gqa_is_a_one_line_error(gqa, tmp_path, capfd, damage, word):
    damage(gqa)
    assert main("--dataset", "gqa", "--data_dir", gqa, "--output_dir", tmp_path / "run") == 2
    assert word in error_line(capfd) and not (tmp_path / "run").exists()


def test_gqa_without_a_folder_names_the_flag(capfd, tmp_path):
    assert main("--dataset", "gqa", "--output_dir", tmp_path / "run") == 2
    assert "--data_dir" in error_line(capfd)


# --- ReFocus


class Table(list):
    """A stand-in for `datasets.Dataset` with the methods that are used."""

    def cast_column(self, name, feature):
        assert name == "image" and feature == "undecoded"
        return self

    def remove_columns(self, name):
        return Table({k: v for k, v in row.items() if k != name} for row in self)


def chart(i, areas, **change):
    file = io.BytesIO()
    white_box().save(file, "PNG")
    return {
        "id": f"chart-{i}",
        "image": {"bytes": file.getvalue(), "path": f"chart-{i}.png"},
        "question": "How tall?",
        "answer": str(i),
        "thoughts": ["..."],
        "source": "chartqa_v_bar",
        "split": "train",
        "focus_areas_bbox": areas,
    } | change


def areas(*boxes):
    return {side: [box[i] for box in boxes] for i, side in enumerate(("x1", "y1", "x2", "y2"))}


def fake_hub(monkeypatch, *charts):
    """Replace the `datasets` library with a fake whose hub has these charts. Returns: its calls."""
    module = types.ModuleType("datasets")
    module.Image = lambda decode: "undecoded" if decode is False else None
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if not charts:
            raise ConnectionError("no network\nat all")
        return Table(charts)

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_refocus_reads_every_box_and_skips_rows_without_boxes(monkeypatch):
    asked = fake_hub(
        monkeypatch,
        chart(0, areas((6, 4, 18, 14))),
        chart(1, areas()),
        chart(2, None),
        chart(0, areas((6, 4, 18, 14), (30, 10, 40.5, 30)), question="How wide?"),
    )
    data = ReFocus()
    assert asked == [(("ReFocus/ReFocus_Data",), {"split": "train"})]  # and no trust_remote_code
    assert [(e.id, e.question, e.answer, e.boxes) for e in data] == [
        ("refocus-0", "How tall?", "0", [(6, 4, 18, 14)]),
        ("refocus-3", "How wide?", "0", [(6, 4, 18, 14), (30, 10, 40.5, 30)]),
    ]
    assert data.notes == ["ReFocus: skipped 2 of 4 rows: no boxes"]
    assert (
        len({row["image_key"] for row in data.rows}) == 1
    )  # so that the split keeps them together
    assert not any(isinstance(v, (Image.Image, bytes)) for row in data.rows for v in row.values())


REFOCUS_ERRORS = {
    "lists of different lengths": chart(1, {"x1": [1, 2], "y1": [1], "x2": [9], "y2": [9]}),
    "a side missing": chart(1, {"x1": [1], "y1": [1], "x2": [9]}),
    "numbers instead of lists": chart(1, {"x1": 1, "y1": 1, "x2": 9, "y2": 9}),
    "null in a box": chart(1, areas((1, 1, None, 9))),
    "a box outside": chart(1, areas((61, 1, 70, 9))),
    "an inverted box": chart(1, areas((9, 1, 1, 9))),
    "no answer": chart(1, areas((1, 1, 9, 9)), answer=None),
    "no image": chart(1, areas((1, 1, 9, 9)), image=None),
    "bytes that are not an image": chart(
        1, areas((1, 1, 9, 9)), image={"bytes": b"x", "path": None}
    ),
    "no bytes": chart(1, areas((1, 1, 9, 9)), image={"bytes": None, "path": "chart.png"}),
}


@pytest.mark.parametrize("case", REFOCUS_ERRORS)
def test_a_bad_row_of_refocus_is_a_one_line_error_or_skipped(monkeypatch, tmp_path, capfd, case):
    fake_hub(
        monkeypatch,
        chart(0, areas((1, 1, 9, 9))),
        REFOCUS_ERRORS[case],
        chart(2, areas((1, 1, 9, 9))),
    )
    assert main("--dataset", "refocus", "--output_dir", tmp_path / "run") == 2
    assert "ReFocus row 1: " in error_line(capfd) and not (tmp_path / "run").exists()
    data = ReFocus(problems=[])
    assert [row["id"] for row in data.rows] == ["refocus-0", "refocus-2"] and data.rejected == 1


def test_refocus_without_its_library_or_the_hub_is_a_one_line_error(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "datasets", None)  # its import raises ImportError
    assert main("--dataset", "refocus", "--output_dir", tmp_path / "run") == 2
    assert "pip install datasets" in error_line(capfd)
    fake_hub(monkeypatch)
    assert main("--dataset", "refocus", "--output_dir", tmp_path / "run") == 2
    assert "no network" in error_line(capfd)


# --- mixtures


def test_a_mixture_has_its_shares_and_shows_every_example():
    parts = [list(range(100)), list(range(1000, 1010))]
    mixture = Mixture(parts, [0.8, 0.2])
    seen = [mixture[i] for i in range(len(mixture))]
    assert set(seen) == {*parts[0], *parts[1]}
    assert sum(x >= 1000 for x in seen) / len(seen) == pytest.approx(0.2)
    assert seen.count(1003) - seen.count(1007) in (-1, 0, 1)
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_the_papers_mixture_trains_and_resumes_bit_for_bit(gqa, monkeypatch, tmp_path, capfd):
    """Examples depend only on the position and the seed, so a resumed run sees the same ones."""
    fake_hub(monkeypatch, *(chart(i, areas((6, 4, 18, 14))) for i in range(10)))
    flags = "--dataset gqa+refocus --mix 4,1 --max_steps 8 --save_steps 1 --data_dir".split()
    flags.append(gqa)
    assert main(*flags, "--output_dir", tmp_path / "whole", "--eval_examples", 5) == 0
    out = capfd.readouterr().out
    assert "GQA: skipped 1 of 5 questions" in out and "ReFocus: skipped 0 of 10 rows" in out
    held_out = {row["id"] for row in json.loads((tmp_path / "whole" / "before.json").read_text())}
    trained = [row["id"] for row in rows(tmp_path / "whole", "samples.jsonl")][::4]
    assert not held_out & set(trained)
    assert {name[0] for name in held_out} == {"q", "r"}  # from both data sets
    charts = sum(name.startswith("refocus") for name in trained)
    assert len(trained) == 16 and 1 <= charts <= 7
    original, calls = sayo_mini.train_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(sayo_mini, "train_step", killed)
    with pytest.raises(RuntimeError):
        main(*flags, "--output_dir", tmp_path / "cut", "--eval_examples", 5)
    assert sayo_mini.main(["--resume", "--output_dir", str(tmp_path / "cut")]) == 0
    for name in ("samples.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "mix", ["", "1", "0.5,0.3,0.2", "0.8,", "0.8,x", "1,0", "1,-1", "nan,1", "inf,1", "1,1e-9"]
)
def test_a_mixture_without_valid_shares_is_a_one_line_error(capfd, tmp_path, mix):
    assert main("--dataset", "gqa+refocus", f"--mix={mix}", "--output_dir", tmp_path / "run") == 2
    assert "--mix" in error_line(capfd)


# --- end to end


def write_charts(folder, count=30):
    """Write a data set of bar charts, each with a question about one bar and its box, and a photo
    from matplotlib. Returns: its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import cbook, pyplot

    lines, generator = [], torch.Generator().manual_seed(0)
    for i in range(count):
        heights = torch.randint(1, 10, (4,), generator=generator).tolist()
        figure, axes = pyplot.subplots(figsize=(3, 2 + i % 3), dpi=80)
        bars = axes.bar(
            ["red", "green", "blue", "pink"], heights, color=["red", "green", "blue", "pink"]
        )
        figure.canvas.draw()
        box, height = bars[i % 4].get_window_extent(), figure.canvas.get_width_height()[1]
        figure.savefig(folder / f"chart{i}.png")
        pyplot.close(figure)
        lines.append(
            {
                "image": f"chart{i}.png",
                "question": f"How tall is the {('red', 'green', 'blue', 'pink')[i % 4]} bar?",
                "answer": str(heights[i % 4]),
                "id": f"chart-{i}",
                "boxes": [[box.x0, height - box.y1, box.x1, height - box.y0]],
            }
        )
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        (folder / "hopper.jpg").write_bytes(file.read())
    lines.append(
        {
            "image": "hopper.jpg",
            "question": "What is on the head?",
            "answer": "a cap",
            "boxes": [[150, 20, 380, 200]],
            "id": "photo",
        }
    )
    return write(folder, *lines)


def test_a_run_on_thirty_charts_and_a_photo(tmp_path, capfd):
    path = write_charts(tmp_path)
    assert sayo_mini.main(["check", str(path)]) == 0
    assert "31 valid examples; 31 images, 31 boxes" in capfd.readouterr().out
    folder = tmp_path / "run"
    flags = ["--dataset", path, "--max_steps", 4, "--eval_examples", 3]
    assert main(*flags, "--output_dir", folder) == 0
    names = {row["id"] for row in rows(folder, "samples.jsonl")}
    held_out = {row["id"] for row in json.loads((folder / "after.json").read_text())}
    assert len(names) == 8 and len(held_out) == 3 and not names & held_out
    metrics = rows(folder, "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["skipped_updates"] == 0 for row in metrics)
    assert (folder / "look.png").exists() and any(row["grad_norm"] > 0 for row in metrics)


def test_the_boxes_of_the_charts_are_on_their_bars(tmp_path):
    for example in JsonLines(write_charts(tmp_path, 4)).split(0)[0]:
        if example.id != "photo":
            (x1, y1, x2, y2), color = example.boxes[0], example.question.split()[4]
            center = (x1 + x2) // 2, (y1 + y2) // 2
            assert example.image.getpixel(center) == ImageColor.getrgb(color)
