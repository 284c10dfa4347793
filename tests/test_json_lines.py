"""json_lines.py: every row of a file is checked, images of all kinds, the held-out split."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageChops, ImageDraw

import data
import json_lines
from config import Config, InputError
from json_lines import UNITS, JsonLines

# --- images


def reopened(image, format, **options):
    """Save the image in a format and open it again."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_boxes_turn_with_the_image(format):
    white_box = Image.new("RGB", (60, 40))
    ImageDraw.Draw(white_box).rectangle((6, 4, 17, 13), fill="white")
    seen = set()
    for orientation in range(10):  # 1 to 8 are defined
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = reopened(white_box, format, exif=exif, lossless=True)
        assert json_lines.stored_size(stored) == (60, 40)
        image, boxes = json_lines.apply_exif_orientation(stored, [(6, 4, 18, 14)])
        assert image.size == ((40, 60) if orientation in (5, 6, 7, 8) else (60, 40))
        assert boxes == [image.getbbox()]  # of the white rectangle
        seen.add((image.size, boxes[0]))
    assert len(seen) == 8


ORANGE, WHITE = (240, 120, 30), (255, 255, 255)
PLAIN = Image.new("RGB", (32, 24), ORANGE)


def filled(mode, color):
    return Image.new(mode, PLAIN.size, color)


@pytest.mark.parametrize(
    "image, color",
    [
        (reopened(PLAIN.convert("L"), "PNG"), (146, 146, 146)),
        (reopened(PLAIN.quantize(), "GIF"), ORANGE),
        (reopened(PLAIN.convert("CMYK"), "JPEG", quality=95), ORANGE),
        (reopened(filled("I;16", 40000), "PNG"), (156, 156, 156)),  # 40000 / 256
        (reopened(filled("I;16", 40000), "TIFF"), (156, 156, 156)),
        (reopened(filled("RGBA", (*ORANGE, 128)), "PNG"), (247, 187, 142)),  # half transparent
        (reopened(filled("LA", (9, 0)), "PNG"), WHITE),  # transparent
        (reopened(filled("P", 0), "PNG", transparency=0), WHITE),
        (reopened(PLAIN, "PNG", transparency=ORANGE), WHITE),
    ],
)
def test_images_of_all_kinds_become_rgb_as_displayed(image, color):
    image, boxes = json_lines.apply_exif_orientation(image, [(1, 2, 3, 4)])
    assert image.mode == "RGB" and image.size == (32, 24) and boxes == [(1, 2, 3, 4)]
    difference = ImageChops.difference(image, filled("RGB", color))
    assert max(high for _, high in difference.getextrema()) <= 3


def test_any_exception_while_an_image_is_read_becomes_one_line(recwarn):
    for error, reason in (
        (OSError(5, "Input/output error"), "Input/output error"),
        (SyntaxError("broken\n  PNG file"), "broken PNG file"),
        (IndexError(), "IndexError"),
    ):
        with pytest.raises(InputError) as found, json_lines.image_errors(Path("a\nb.png")):
            raise error
        assert str(found.value) == f"cannot read the image 'a\\nb.png': {reason}"
    with json_lines.image_errors("a.png"):
        warnings.warn("about a file that can be read")
    assert not recwarn


# --- rows

GOOD = dict(image="photo.png", question="What is it?", answer="a cat", boxes=[[1, 2, 30, 20.5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for data sets with good and damaged images; one image is outside of it."""
    folder = tmp_path_factory.mktemp("outer") / "data"
    (folder / "more").mkdir(parents=True)
    noise = Image.effect_noise((64, 48), 90).convert("RGB")
    noise.save(folder / "photo.png")
    noise.save(folder / "../outside.png")
    Image.new("L", (40, 30)).save(folder / "more" / "gray.png")
    Image.new("L", (1, 201)).save(folder / "thin.png")
    Image.new("F", (9, 9), 0.5).save(folder / "float.tif")
    Image.new("I", (9, 9), 70000).save(folder / "int.tif")
    (folder / "bomb.png").write_bytes(b"P5 13000 13000 255 ")
    (folder / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    content = bytearray((folder / "photo.png").read_bytes())
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    content[len(content) // 2] ^= 1
    (folder / "flipped.png").write_bytes(content)
    (folder / "text.png").write_text("not an image")
    (folder / "link.png").symlink_to(folder / "../outside.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def write(folder, *lines):
    """Write these lines as a data set; text and bytes are not changed. Returns: its path."""
    lines = [json.dumps(x) if isinstance(x, (dict, list)) else x for x in lines]
    lines = [x.encode() if isinstance(x, str) else x for x in lines]
    (folder / "set.jsonl").write_bytes(b"\n".join(lines))
    return folder / "set.jsonl"


def good(**change):
    return {key: value for key, value in (GOOD | change).items() if value is not None}


def test_rows_become_examples(folder, monkeypatch):
    second = dict(image="more/gray.png", question="Où\u2028?", answer="là", id="g")
    second |= {"boxes": [[0, 0, 9, 9], [-5, 10, 60, 20]]}
    # Blank lines count. Only \n ends a line, \r before it is a space. The first line has a mark.
    lines = [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), " \t\r", ""]
    lines += [json.dumps(second, ensure_ascii=False), good(id=7, source="another key"), good(id="")]
    path = write(folder, *lines)
    monkeypatch.chdir("/")  # image paths are relative to the file
    first, second, third, fourth = dataset = JsonLines(str(path))
    assert len(dataset) == 4 and dataset[-1].id == fourth.id and not dataset.rejected
    assert [x.id for x in dataset] == [f"{path}:1", "g", "7", f"{path}:6"]
    assert first.image.tobytes() == Image.open(folder / "photo.png").tobytes()
    texts = first.question, first.answer
    assert texts == ("What is it?", "a cat") and first.boxes == [[1, 2, 30, 20.5]]
    assert (second.question, second.answer) == ("Où\u2028?", "là")
    assert second.image.size == (40, 30) and second.image.mode == "RGB"
    assert second.boxes == [[0, 0, 9, 9], (0, 10, 40, 20)]  # clipped
    for index in (4, -5):
        with pytest.raises(IndexError):
            dataset[index]


ADVICE = " (use --skip_bad_examples to skip unusable examples)"
OBJECT = "not a JSON object with image, question, answer and boxes"
NUMBERS = "boxes must be a list of boxes, [[x1, y1, x2, y2], ...], of numbers below 10^9, but are"
MOVE = "it is outside the data set's folder: move it, or use --allow_absolute_paths"
NO_PATH = "give the path of a file, not a URL or base64 data"
UNREADABLE = {  # image -> what is wrong
    "nowhere.png": "no such file",
    "C:\\photos\\a.png": "no such file; write / instead of \\",
    "https://example.org/a.png": NO_PATH,
    "data:image/png;base64,iVBORw0KGgo=": NO_PATH,
    "/9j/4AAQSkZJRg": NO_PATH,
    "pipe.png": "no such file",  # opening it would block forever
    "text.png": "cannot identify image file '{folder}/text.png'",
    "bomb.png": "it has 13000 x 13000 pixels: at most 67108864",
    "program.png": "cannot identify image file '{folder}/program.png'",  # or Ghostscript starts
    "thin.png": "one side is more than 200 times the other: crop it",
    "float.tif": "its pixels are 32-bit numbers: convert them to 8 or 16 bits",
    "int.tif": "its pixels are 32-bit numbers: convert them to 8 or 16 bits",
    "../outside.png": MOVE,
    "link.png": MOVE,
}
NOT_BOXES = [7, "1, 2, 3, 4", [[1, 2, 3, 4], 7], [[1, 2, 3]]]
NOT_BOXES += [[[1, 2, x, 4]] for x in (True, "3", 1e9, float("nan"))]
MALFORMED = [  # (line, message; … if it goes on)
    ("image: photo.png", "not JSON in UTF-8 (Expecting value…"),
    ("[" * 100_000, "not JSON in UTF-8 (…"),
    (json.dumps(GOOD).encode() + b"\xff", "not JSON in UTF-8 ('utf-8' codec…"),
    ([GOOD], OBJECT),
    *[(good(**{key: None}), f"{key!r} is missing") for key in GOOD],
    (good(boxes=None, bbox=[]), "'boxes' is missing (is it one of ['bbox']?)"),
    (good(image=3), "image must be text, in quotes, but is 3"),
    (good(answer=[]), "answer must be text, in quotes, but is []"),
    (good(answer=["four", 4]), "answer must be text, in quotes, but is 4"),
    (good(answer=["four", " "]), "answer is empty"),
    (good(answer="\u200b</s>"), "answer is empty"),
    (good(answer="a <answer>b</answer> c"), "answer contains <answer>, a special token: remove it"),
    (good(answer=["a", "b<|image_pad|>"]), "answer contains <|image_pad|>, a special token…"),
    (good(question="Is <image> a cat?"), "question contains <image>, a special token: remove it"),
    (good(question="<img> <IMG>?"), "question contains <IMG>, a special token: remove it"),
    (good(question=" \n"), "question is empty"),
    (good(answer="a\ud800"), "answer 'a\\ud800' is not valid Unicode…"),
    (good(question="<|im_end|>"), "question contains <|im_end|>, a special token: remove it"),
    *[(good(id=value), "id must be text or an integer") for value in ([1], True, 1.5)],
    (good(id="first"), "id 'first' is already used by {path}:1"),
    *[(good(image=x), f"cannot read the image {x!r}: {why}") for x, why in UNREADABLE.items()],
    (good(boxes=[]), "no boxes: a region needs at least one"),
    *[(good(boxes=value), f"{NUMBERS} {value!r}") for value in NOT_BOXES],
    (good(boxes=[[1, 2, 10**400, 4]]), f"{NUMBERS} [[1, 2, 1000…"),
    (good(boxes=[[64, 2, 70, 20]]), "box [64, 2, 70, 20] lies outside the 64 x 48 image"),
]


@pytest.mark.parametrize("line, message", MALFORMED)
def test_a_malformed_line_is_an_error_or_skipped(folder, line, message):
    path = write(folder, good(id="first"), "", line, good(id="last"))
    with pytest.raises(InputError) as error:
        JsonLines(path)
    message = message.replace("{path}", str(path)).replace("{folder}", str(folder))
    message, problem = f"{path}:3: {message}", str(error.value)
    assert problem.endswith(ADVICE) and "\n" not in problem
    problem = problem.removesuffix(ADVICE)
    assert problem == message or problem.startswith(message.partition("…")[0]) and "…" in message
    dataset = JsonLines(path, problems=[])
    assert [row["id"] for row in dataset.rows] == ["first", "last"] and dataset.rejected == 1
    assert dataset.problems == [problem]


def test_boxes_that_look_unusual_but_are_fine(folder):
    Image.new("L", (1, 1)).save(folder / "dot.png")
    rows = [good(boxes=[[0, 0, 2, 2]]), good(boxes=[[0.5, 0.5, 1.5, 2], [-1e8, -1e8, 1e8, 1e8]])]
    rows.append(good(image="dot.png", boxes=[[0, 0.1, 0.5, 1]]))
    assert len(JsonLines(write(folder, *rows))) == 3


def test_tags_and_tokens_around_a_text_are_removed(folder):
    answers = {
        "<answer>D</answer>": "D",
        "<answer> two cats </answer><|im_end|>\n": "two cats",
        "<s>blue </s>": "blue",
        "blue<|eot_id|><|endoftext|>": "blue",
        "\ufeffblue\u200b ": "blue",
        "a < b > c": "a < b > c",
    }
    questions = {"<image>\nWho?": "Who?", " <img> Who?": "Who?", "<Image_1>Who?": "Who?"}
    questions["Who has images <imagine>?"] = "Who has images <imagine>?"
    rows = [good(answer=answer) for answer in answers] + [good(question=q) for q in questions]
    rows += [good(answer=["<answer>4</answer>", "four"]), good(answer=["4"])]
    *found, several, single = JsonLines(write(folder, *rows))
    assert [x.answer for x in found[: len(answers)]] == [*answers.values()]
    assert [x.question for x in found[len(answers) :]] == [*questions.values()]
    assert several.answer == ("4", "four") and single.answer == "4"


# --- what a file as a whole gets wrong

ARRAY = "is a JSON array: write one object per line, without commas"
PRETTY, CSV = "is pretty-printed JSON: write each object", "is CSV: write one JSON object"
COCO = {"images": [{"id": 1}], "annotations": [{"category_id": 2}]}
CHAT = {"image": "a.png", "conversations": [{"from": "human"}]}


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(b"{}", mtime=0), "is compressed, or an Excel file: unpack it, or save text"),
        (b"PAR1\x15\x04", "is Parquet: read it with pandas"),
        (b"image,question,answer,x1,y1,x2,y2\na.png,Why?,so,1,2,3,4\n", CSV),
        (b"a.png\tWhy?\tso\n", CSV),
        (json.dumps(GOOD, indent=2), PRETTY),
        (b'{"image": "a.png",\r\n "question": "?"}', PRETTY),
        (json.dumps([GOOD], indent=2), ARRAY),
        (" [7]", ARRAY),
        (json.dumps(CHAT), "is a chat (LLaVA): write its turns as question and answer"),
        (json.dumps(COCO), "is COCO: extras/convert.py coco converts it"),
        (b"0 0.5 0.5 0.25 0.1\n", "is a label of YOLO: extras/convert.py yolo converts it"),
    ],
)
def test_a_file_in_another_format_is_named(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        JsonLines(path, problems=[])
    assert str(error.value).startswith(f"{path} {message}")


def test_a_file_without_good_rows_is_an_error(tmp_path):
    path = write(tmp_path, " \n\t")
    with pytest.raises(InputError, match=": no usable examples$"):
        JsonLines(path)
    with pytest.raises(
        InputError, match=f": no usable examples; first problem: {path}:1: {OBJECT}"
    ):
        JsonLines(write(tmp_path, "7"), problems=[])


def photos(folder, count, *sizes):
    """Write distinct images of these sizes, in turn. Returns: pairs of a name and its size."""
    for i in range(count):
        Image.new("L", sizes[i % len(sizes)], i).save(folder / f"{i}.png", compress_level=1)
    return [(f"{i}.png", sizes[i % len(sizes)]) for i in range(count)]


def unit_of(folder, named, boxes, unit=""):
    """The unit that the refusal names, "" if there is none. Args: boxes, a list per photo."""
    rows = [good(image=name, boxes=list(each)) for (name, _), each in zip(named, boxes)]
    try:
        JsonLines(write(folder, *rows), problems=[], unit=unit)
    except InputError as error:
        found = re.search(r"boxes look like .*: use --boxes (\S+), or --boxes pixels", str(error))
        return found[1] if found else str(error)
    return ""


def random_boxes(rng, width, height):
    """A box of a tenth to a half of each side, at a random place of such an image."""
    w, h = rng.uniform(0.1, 0.5) * width, rng.uniform(0.1, 0.5) * height
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return x, y, x + w, y + h


SIZES = [(640, 480)], [(512, 512)], [(2000, 1500)], [(640, 480), (1920, 1080)], [(1280, 960)]


@pytest.mark.parametrize("sizes", SIZES, ids=["small", "square", "large", "mixed", "1280"])
def test_the_unit_of_boxes_is_recognized(tmp_path, sizes):
    rng = random.Random(0)
    for count in (6, 20):
        named = photos(tmp_path, count, *sizes)
        pixels = [random_boxes(rng, *size) for _, size in named]
        sides = [size * 2 for _, size in named]
        assert unit_of(tmp_path, named, [[box] for box in pixels]) == ""
        for unit in ("0-1", "0-100", "0-1000"):
            most = int(unit[2:])
            boxes = [[[round(v * most / s, 4) for v, s in zip(*p)]] for p in zip(pixels, sides)]
            if unit != "0-1000" or count == 20 or sizes != SIZES[-1]:  # 6 boxes prove too little
                assert unit_of(tmp_path, named, boxes) == unit
            if unit != "0-1000":  # as in Label Studio, also if the user says xywh
                boxes = [[[x, y, u - x, v - y]] for ((x, y, u, v),) in boxes]
                for given in ("", "xywh", unit):
                    what = unit_of(tmp_path, named, boxes, given)
                    assert f"x, y, width, height, in {UNITS[unit]}: convert" in what
        xywh = [[[x1, y1, x2 - x1, y2 - y1]] for x1, y1, x2, y2 in pixels]
        assert unit_of(tmp_path, named, xywh) == "xywh"
        assert unit_of(tmp_path, named, xywh, "pixels") == ""


def test_a_box_in_fractions_is_refused_alone_and_among_others(tmp_path):
    named = photos(tmp_path, 1, (640, 480))
    for boxes in ([[0, 0, 1, 1]], [[0.1, 0.2, 0.5, 0.6], [1, 1, 2, 2]], [[0, 0, 1.02, 0.9]]):
        assert unit_of(tmp_path, named, [boxes]) == "0-1"
        assert unit_of(tmp_path, named, [boxes], "pixels") == ""
    mixed = [[0, 0, 1, 1], [9, 9, 90, 90], [9, 9, 80, 90]]
    with pytest.raises(InputError, match=r"box \[0, 0, 1, 1\] looks like fractions"):
        JsonLines(write(tmp_path, good(image="0.png", boxes=mixed)))


def test_boxes_in_a_named_unit_become_pixels(folder):
    for unit, box in {
        "0-1": [0.25, 0.5, 0.5, 0.75],
        "0-100": [25, 50, 50, 75],
        "0-1000": [250, 500, 500, 750],
        "xywh": [16, 24, 16, 12],
        "pixels": [16, 24, 32, 36],
    }.items():  # of 64 x 48 pixels
        assert JsonLines(write(folder, good(boxes=[box])), unit=unit)[0].boxes == [[16, 24, 32, 36]]
    with pytest.raises(InputError, match="boxes must be a list"):
        JsonLines(write(folder, good(boxes=[[1, 2, 3]])), unit="0-1000")


def test_boxes_that_fit_only_the_displayed_image_get_a_hint(tmp_path):
    exif = Image.Exif()
    for exif[0x0112], name in ((3, "upside_down"), (6, "turned")):
        Image.new("RGB", (80, 60)).save(tmp_path / f"{name}.jpg", exif=exif)
    for box in ([10, 20, 50, 75], [10, 62, 50, 80]):  # the second lies outside the stored image
        with pytest.raises(InputError, match="fits only the image as displayed, 60 x 80"):
            JsonLines(write(tmp_path, good(image="turned.jpg", boxes=[box])))
    for box in ([10, 20, 75, 50], [10, 20, 81, 61]):
        rows = [good(image=f"{name}.jpg", boxes=[box]) for name in ("turned", "upside_down")]
        assert "2 of 2 images are rotated by EXIF" in JsonLines(write(tmp_path, *rows)).notes()[0]


def test_notes_count_clipped_boxes_copies_and_swapped_columns(folder):
    rows = [good(boxes=[[1, 2, 65, 20], [1, 2, 3, 4]])] + [GOOD] * 3 + [good(id="last")]
    assert JsonLines(write(folder, *rows)).notes() == [
        "1 of 6 boxes extend beyond their image and are clipped",
        "3 of 5 examples repeat an earlier one: same image, text and boxes",
    ]
    swapped = [good(question=f"cat {i}", answer=["What is it?", "Who?"]) for i in range(3)]
    captions = [good(question=f"Who {i}?", answer="a cat on a mat") for i in range(3)]
    for rows, count in ((swapped, 3), (swapped + captions, 6)):
        (note,) = JsonLines(write(folder, *rows)).notes()
        assert note.startswith(f"{count} of {len(rows)} answers end in ? or are longer than their")
    assert not JsonLines(write(folder, GOOD, captions[0])).notes()


@pytest.mark.parametrize("name", ["half.png", "flipped.png"])
def test_damaged_pixels_are_an_error_or_the_next_example_is_used(folder, capsys, name):
    path = write(folder, GOOD, good(image=name), good(image="more/gray.png"), good(image=name))
    with pytest.raises(InputError) as error:
        JsonLines(path)[1]
    assert str(error.value).startswith(f"{path}:2: cannot read the image '{name}': ")
    assert str(error.value).endswith(ADVICE)
    dataset = JsonLines(path, problems=[])
    assert [dataset[i].id for i in (1, 1, 3, -1)] == [f"{path}:3"] * 2 + [f"{path}:1"] * 2
    lines = capsys.readouterr().out.splitlines()  # one for each damaged image
    assert [line.split(" cannot")[0] for line in lines] == [
        f"skipped, using the next example: {path}:{number}:" for number in (2, 4)
    ]
    with pytest.raises(InputError, match="no image can be read; last problem: .*set.jsonl:2: "):
        JsonLines(write(folder, *[good(image=name)] * 2), problems=[])[0]


# --- the data sets of a run


def names(dataset, key="id"):
    return [row[key] for row in dataset.rows]


def test_a_fifth_of_the_images_is_held_out(tmp_path):
    """Those with the lowest hash, the same ones in every process and for every order of the lines.
    A resumed run must not train on held-out images."""
    photos(tmp_path, 40, (64, 48))
    rows = [good(image=f"{i}.png", id=f"{i}-{q}") for q in range(2) for i in range(40)]
    whole = JsonLines(write(tmp_path, *rows))
    train, held_out = whole.split(1000)

    def hash_of(name):
        return hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

    images = sorted((f"{i}.png" for i in range(40)), key=hash_of)
    assert set(names(held_out, "image")) == set(images[:8])
    assert set(names(train, "image")) == set(images[8:])
    assert len(held_out) == 16 and len(train) == 64 and len(whole) == 80
    assert [x for x in names(whole) if x in names(train)] == names(train)  # in order
    same, few = whole.split(5)  # a shorter evaluation does not change the training set
    assert names(few) == names(held_out)[:5] and names(same) == names(train)
    assert names(whole.split(-1)[1]) == names(held_out)
    assert [len(part) for part in whole.split(0)] == [80, 0]


def test_at_least_one_of_two_images_is_held_out(folder):
    path = write(folder, GOOD, good(image="more/gray.png"), good(image="./photo.png"))
    train, held_out = JsonLines(path).split(100)
    assert {*names(train, "image_key")}.isdisjoint(names(held_out, "image_key"))
    assert sorted([len(train), len(held_out)]) == [1, 2]
    # A copy under another name is the same image.
    copies = "photo.png", "../outside.png", "link.png", str(folder / "more/../photo.png")
    single = JsonLines(write(folder, *[good(image=name) for name in copies]), True)
    assert [example.image.size for example in single] == [(64, 48)] * 4
    with pytest.raises(InputError, match="only image cannot be held out; .* --eval_examples 0"):
        single.split(1)
    assert [len(part) for part in single.split(0)] == [4, 0]


def test_another_file_can_be_evaluated(folder, tmp_path, capsys):
    """Then the whole data set is trained on. A resumed run depends on both files."""
    path = write(folder, GOOD, good(image="more/gray.png"))
    shutil.copy(folder / "photo.png", tmp_path / "copy.png")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
    other = write(tmp_path, *[good(image=image) for image in ("red.png", "copy.png", "red.png")])
    cfg = Config(dataset=str(path), eval_dataset=str(other))
    train, held_out = data.load_datasets(cfg)
    assert (len(train), len(held_out), len(data.image_keys(held_out))) == (2, 3, 2)
    assert [data.next_image(held_out, i) for i in range(3)] == [1, 2, 1]
    note = f"note: images of {other} that are also in the training data: 1"
    assert note in capsys.readouterr().out
    assert held_out.checksum != JsonLines(other).checksum and train.checksum in held_out.checksum
    held_out = data.load_datasets(replace(cfg, dataset="scenes", eval_examples=1))[1]
    assert names(held_out, "image") == ["red.png"]
    assert "training" not in capsys.readouterr().out


def test_the_tiny_model_says_that_it_only_knows_cards(folder, capsys):
    cards = ROOT / "example" / "example.jsonl"
    photos = write(folder, GOOD, good(image="more/gray.png"))
    for path, model, expected in (photos, "tiny", 1), (photos, "other", 0), (cards, "tiny", 0):
        data.load_datasets(Config(dataset=str(path), model_name_or_path=model))
        assert capsys.readouterr().out.count("the tiny model only knows cards") == expected


def test_a_run_on_a_file_says_what_it_skips(folder, capsys):
    images = "photo.png", "more/gray.png", "../outside.png", "link.png"
    path = write(folder, *[good(image=image, answer=image) for image in images])
    with pytest.raises(InputError, match=":3: "):
        data.load_datasets(Config(dataset=str(path)))
    train, held_out = data.load_datasets(Config(dataset=str(path), skip_bad_examples=True))
    assert (len(train), len(held_out)) == (1, 1)
    out = capsys.readouterr().out
    assert out.startswith(f"skipped 2 rows of {path}; first problem: {path}:3: cannot read")
    train, held_out = data.load_datasets(Config(dataset=str(path), allow_absolute_paths=True))
    assert len(train) + len(held_out) == 4 and not capsys.readouterr().out
