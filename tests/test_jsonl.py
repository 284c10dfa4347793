"""sources/jsonl.py: reading a .jsonl file, errors on malformed lines, and the held-out split."""

import json
import math
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from config import InputError
from data import example_region
from sources.jsonl import JsonLines

GOOD = dict(image="photo.png", question="What is it?", answer="a cat", boxes=[[1, 2, 30, 20.5]])


def png_chunk(kind, content):
    size, checksum = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
    return size + kind + content + checksum


@pytest.fixture
def folder(tmp_path):
    """A folder with two images, damaged images and files that are not images."""
    noise = Image.effect_noise((64, 48), 90)
    noise.convert("RGB").save(tmp_path / "photo.png")
    (tmp_path / "more").mkdir()
    noise.resize((40, 30)).save(tmp_path / "more" / "gray.png")
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    idat = whole.index(b"IDAT")
    header, content = whole[: idat - 4], whole[idat + 4 :]
    bad_chunk = png_chunk(b"IDAT", content[:2000]) + png_chunk(b"\0\0\0\0", content[2000:])
    (tmp_path / "bad_chunk.png").write_bytes(header + bad_chunk)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b""))
    return tmp_path


def write(folder, *rows):
    """Write these rows as a data set; a row that is text is written unchanged."""
    path = folder / "set.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def error_message(path):
    """The message of the error that reading the file raises; must be one line."""
    with pytest.raises(InputError) as error:
        JsonLines(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_examples_are_read_with_image_paths_relative_to_the_file(folder, monkeypatch):
    monkeypatch.chdir("/")  # paths must not depend on the working directory
    gray = dict(
        image="more/gray.png",
        question="Où ?",
        answer="là",
        boxes=[[0, 0, 9, 9], [10, 10, 20, 20]],
        id="g",
    )
    path = write(folder, GOOD, " \t", gray, GOOD | {"id": 7, "source": "an extra key"})
    rows = JsonLines(path)
    assert len(rows) == 3 and len(list(rows)) == 3
    first, second, third = rows
    assert first.image.size == (64, 48) and first.image.mode == second.image.mode == "RGB"
    assert first.image.tobytes() == Image.open(folder / "photo.png").tobytes()
    assert (first.question, first.answer) == ("What is it?", "a cat")
    assert first.boxes == [[1, 2, 30, 20.5]]
    assert second.image.size == (40, 30) and (second.question, second.answer) == ("Où ?", "là")
    assert second.boxes == [[0, 0, 9, 9], [10, 10, 20, 20]]
    assert [first.id, second.id, third.id] == [f"{path}:1", "g", "7"]
    assert example_region(second, (3, 4)).nonzero().flatten().tolist() == [0, 5]  # cells of 10 px


@pytest.mark.parametrize("separator", ["\n", "\r\n"])
@pytest.mark.parametrize("end", [True, False])
def test_line_endings_of_all_systems_are_read(folder, separator, end):
    path = folder / "set.jsonl"
    path.write_bytes((separator.join([json.dumps(GOOD)] * 2) + separator * end).encode())
    assert len(JsonLines(path)) == 2


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\u00a0"])
def test_only_a_newline_ends_a_line(folder, character):
    # JSON allows these characters in strings, and json.dumps(..., ensure_ascii=False) writes them.
    row = GOOD | {"question": f"What{character}is it?"}
    rows = JsonLines(write(folder, json.dumps(row, ensure_ascii=False), GOOD))
    assert len(rows) == 2 and rows[0].question == row["question"] and rows[1].id.endswith(":2")


def without(key):
    return {k: v for k, v in GOOD.items() if k != key}


MALFORMED = {
    "not JSON": "image: photo.png",
    "half an object": '{"image": "photo.png",',
    "a list": [GOOD],
    "a number": "3",
    "null": "null",
    "nested too deeply": "[" * 200_000,
    **{f"no {key}": without(key) for key in GOOD},
    **{f"empty {key}": GOOD | {key: ""} for key in GOOD},
    **{f"blank {key}": GOOD | {key: " \n"} for key in ("image", "question", "answer")},
    **{f"null {key}": GOOD | {key: None} for key in GOOD},
    **{f"number as {key}": GOOD | {key: 3} for key in GOOD},
    **{f"list as {key}": GOOD | {key: ["a"]} for key in ("image", "question", "answer")},
    "no such image": GOOD | {"image": "nowhere.png"},
    "no such image, name with a line break": GOOD | {"image": "no\nwhere.png"},
    "folder as image": GOOD | {"image": "more"},
    "text as image": GOOD | {"image": "text.png"},
    "empty image": GOOD | {"image": "empty.png"},
    "decompression bomb": GOOD | {"image": "bomb.png"},
    "NUL in the image's name": GOOD | {"image": "photo\0.png"},
    "half a surrogate pair in the image's name": GOOD | {"image": "photo\ud800.png"},
    "boxes: none": GOOD | {"boxes": []},
    "boxes: an empty box": GOOD | {"boxes": [[]]},
    "boxes: text": GOOD | {"boxes": "1, 2, 3, 4"},
    "boxes: object": GOOD | {"boxes": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}},
    "boxes: true": GOOD | {"boxes": True},
    "boxes: one flat box": GOOD | {"boxes": [1, 2, 3, 4]},
    "boxes: text in a box": GOOD | {"boxes": [["1", "2", "3", "4"]]},
    "boxes: four letters": GOOD | {"boxes": ["abcd"]},
    "boxes: null in a box": GOOD | {"boxes": [[1, 2, None, 4]]},
    "boxes: object as a box": GOOD | {"boxes": [{"x1": 1, "y1": 2, "x2": 3, "y2": 4}]},
    "boxes: three numbers": GOOD | {"boxes": [[1, 2, 3]]},
    "boxes: inverted": GOOD | {"boxes": [[30, 2, 1, 20]]},
    "boxes: the second inverted": GOOD | {"boxes": [[1, 2, 30, 20], [30, 2, 1, 20]]},
    "boxes: no area": GOOD | {"boxes": [[1, 2, 1, 20]]},
    # Not valid JSON, but Python's json reads and writes NaN and Infinity.
    "boxes: NaN": GOOD | {"boxes": [[1, 2, math.nan, 20]]},
    "boxes: infinite": GOOD | {"boxes": [[1, 2, math.inf, 20]]},
    "boxes: outside": GOOD | {"boxes": [[64, 2, 70, 20]]},
    "boxes: outside this image, inside another": GOOD
    | {"image": "more/gray.png", "boxes": [[41, 2, 60, 20]]},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_an_error_with_its_line_number(folder, case):
    path = write(folder, GOOD, "", MALFORMED[case], GOOD)
    assert f"{path}:3:" in error_message(path)  # blank lines count


@pytest.mark.parametrize(
    "case, part",
    [
        *[
            (f"{fault} {key}", key)
            for fault in ("no", "empty", "blank")
            for key in ("image", "question", "answer")
        ],
        ("no such image", "nowhere.png"),
        ("text as image", "text.png"),
        ("no boxes", "box"),
        ("boxes: inverted", "30, 2, 1, 20"),
        ("boxes: outside", "64, 2, 70, 20"),
        ("boxes: NaN", "nan"),
    ],
)
def test_the_error_says_what_is_wrong(folder, case, part):
    path = write(folder, MALFORMED[case])
    assert part in error_message(path).removeprefix(str(path))


def test_a_number_of_400_digits_does_not_crash_the_reader(folder):
    # It is finite, so clipping the box at the edge of the image and an error are both correct.
    path = write(folder, GOOD | {"boxes": [[1, 2, 10**400, 20]]})
    try:
        assert len(JsonLines(path)) == 1
    except InputError as error:
        assert f"{path}:1:" in str(error)


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\n"])
def test_a_file_without_examples_is_an_error(tmp_path, content):
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    assert str(path) in error_message(path)


@pytest.mark.parametrize("make", ["missing", "directory", "not UTF-8", "an image"])
def test_a_file_that_is_not_text_is_an_error(folder, make):
    path = folder / "set.jsonl"
    if make == "directory":
        path.mkdir()
    elif make == "not UTF-8":
        path.write_bytes(json.dumps(GOOD | {"answer": "é"}, ensure_ascii=False).encode("latin-1"))
    elif make == "an image":
        path.write_bytes((folder / "photo.png").read_bytes())
    assert str(path) in error_message(path)
    assert str(path) in error_message(str(path))


@pytest.mark.parametrize("image", ["truncated.png", "bad_chunk.png"])
def test_a_damaged_image_is_an_error_when_it_is_decoded(folder, image):
    path = write(folder, GOOD, GOOD | {"image": image, "where": "an extra key"}, GOOD)
    rows = JsonLines(path)  # works, because the header is intact
    assert rows[0].image.size == rows[2].image.size == (64, 48)
    with pytest.raises(InputError) as error:
        rows[1]
    message = str(error.value)
    assert f"{path}:2:" in message and image in message and len(message.splitlines()) == 1


# --- the held-out split


def dataset_of(folder, images, questions=2):
    """A data set of `images` images with `questions` questions about each."""
    tile = (folder / "photo.png").read_bytes()
    for i in range(images):
        (folder / f"{i}.png").write_bytes(tile)
    rows = [
        GOOD | {"image": f"{i}.png", "id": f"{i}-{q}"}
        for q in range(questions)
        for i in range(images)
    ]
    return JsonLines(write(folder, *rows))


def ids(rows):
    return [str(row["id"]) for row in rows.rows]


def images(rows):
    return {row["image"] for row in rows.rows}


def test_split_holds_out_about_a_fifth_of_the_images_and_shares_none(folder):
    rows = dataset_of(folder, 200)
    train, held_out = rows.split(1000)
    assert not images(train) & images(held_out)
    assert sorted(ids(train) + ids(held_out)) == sorted(ids(rows))
    assert 0.13 < len(images(held_out)) / 200 < 0.27  # 0.2 +- 2.5 sigma
    assert len(rows) == 400  # the split leaves it unchanged
    assert train[0].id == ids(train)[0] and len(held_out) == len(list(ids(held_out)))


@pytest.mark.parametrize("limit", [1, 5])
def test_split_holds_out_no_more_questions_than_requested(folder, limit):
    rows = dataset_of(folder, 60)
    train, held_out = rows.split(limit)
    assert len(held_out) == limit and not images(train) & images(held_out)
    # A longer evaluation does not change the training set.
    assert ids(train) == ids(rows.split(1000)[0])


def test_split_is_the_same_every_time_and_in_any_order_of_lines(folder):
    rows = dataset_of(folder, 40)
    path = folder / "set.jsonl"
    lines = path.read_text().splitlines()
    again = JsonLines(path).split(100)
    assert [ids(part) for part in rows.split(100)] == [ids(part) for part in again]
    backwards = JsonLines(write(folder, *lines[::-1])).split(100)
    assert [images(part) for part in backwards] == [images(part) for part in again]
    # It is also the same in every process, because it takes the names with the lowest crc32. A
    # resumed run must not train on held-out images.
    lowest = sorted((f"{i}.png" for i in range(40)), key=lambda name: zlib.crc32(name.encode()))[:8]
    assert images(again[1]) == set(lowest)


def test_split_of_two_images_holds_out_one_and_of_one_image_is_an_error(folder):
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((folder / "photo.png").read_bytes())
    rows = [GOOD | {"image": name} for name in ("a.png", "b.png", "./a.png")]
    parts = JsonLines(write(folder, *rows)).split(100)
    assert sorted(map(len, parts)) == [1, 2]
    train, held_out = ({Path(name) for name in images(part)} for part in parts)
    assert not train & held_out
    single = JsonLines(write(folder, GOOD))
    with pytest.raises(InputError, match="set.jsonl"):
        single.split(100)
    assert [len(part) for part in single.split(0)] == [1, 0]  # none held out
