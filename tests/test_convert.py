"""extras/convert.py: GQA and ReFocus in their published layouts, and mixtures of .jsonl files."""

import io
import json

import datasets
import pytest
from PIL import Image

from extras import convert
from json_lines import JsonLines

PIPE, WALL, DOOR = [6, 4, 18, 14], [0, 0, 60, 40], [30, 10, 40, 30]
OBJECTS = {  # of every scene graph
    "pipe": {"x": 6, "y": 4, "w": 12, "h": 10, "name": "pipe", "attributes": []},
    "wall": {"x": 0, "y": 0, "w": 60, "h": 40, "name": "wall", "attributes": []},
    "door": {"x": 30, "y": 10, "w": 10, "h": 20, "name": "door", "attributes": []},
}
ANNOTATIONS = {  # of every question: spans of words -> objects
    "q0": {"answer": {"0": "pipe"}, "fullAnswer": {"1": "wall"}, "question": {"4": "wall"}},
    "q1": {"answer": {}, "fullAnswer": {"1": "pipe", "3": "door", "5": "pipe"}, "question": {}},
    "q2": {"answer": {}, "fullAnswer": {}, "question": {"4:6": "wall"}},
    "q3": {"answer": {}, "fullAnswer": {}, "question": {}},
}


def run(*arguments):
    return convert.main(list(map(str, arguments)))


def error(capsys, *arguments):
    """Run a command that fails. Returns: its one line on stderr."""
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("convert.py: ")


def test_gqa_takes_the_objects_of_the_answer_or_the_full_answer_or_the_question(tmp_path, capsys):
    questions = tmp_path / "questions" / "train_balanced_questions.json"
    for folder in (tmp_path / "images", questions.parent):
        folder.mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "17.jpg")
    same = {"question": "What is on the wall?", "imageId": "17", "answer": "pipe", "semantic": []}
    rows = {number: same | {"annotations": spans} for number, spans in ANNOTATIONS.items()}
    questions.write_text(json.dumps(rows))
    assert "has no train_sceneGraphs.json" in error(capsys, "gqa", tmp_path)
    (tmp_path / "train_sceneGraphs.json").write_text(json.dumps({"17": {"objects": OBJECTS}}))
    assert run("gqa", tmp_path) == 0
    assert "skipped 1 of 4 questions: no annotated objects" in capsys.readouterr().out
    data = JsonLines(tmp_path / "gqa.jsonl")
    boxes = {example.id: example.boxes for example in data}
    assert boxes == {"q0": [PIPE], "q1": [PIPE, DOOR], "q2": [WALL]}
    assert (data[0].question, data[0].answer) == ("What is on the wall?", "pipe")


def chart(color, *boxes, **change):
    """A row of ReFocus/ReFocus_Data."""
    file = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(file, "JPEG")
    sides = {side: [box[i] for box in boxes] for i, side in enumerate(("x1", "y1", "x2", "y2"))}
    row = {"question": "How tall?", "answer": "4", "focus_areas_bbox": sides}
    return {"image": {"bytes": file.getvalue(), "path": None}} | row | change


def fake_hub(monkeypatch, *rows):
    """Put these rows in place of the data set on the hub."""
    table = datasets.Dataset.from_list(list(rows)).cast_column("image", datasets.Image())
    hub = {("ReFocus/ReFocus_Data", "train"): table}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub[name, split])


def test_refocus_stores_every_chart_once_with_all_boxes(tmp_path, monkeypatch, capsys):
    charts = [chart("red", PIPE), chart("blue"), chart("red", PIPE, DOOR), chart("pink", WALL)]
    fake_hub(monkeypatch, *charts)
    assert run("refocus", tmp_path) == 0
    assert "skipped 1 of 4 rows: no boxes" in capsys.readouterr().out
    data = JsonLines(tmp_path / "refocus.jsonl")
    boxes = {example.id: example.boxes for example in data}
    assert boxes == {"refocus-0": [PIPE], "refocus-2": [PIPE, DOOR], "refocus-3": [WALL]}
    files = [row["image"] for row in data.rows]  # the held-out split is by file
    assert files[0] == files[1] != files[2] and files[0].endswith(".png")
    assert data[0].image.getpixel((30, 20)) == pytest.approx((254, 0, 0), abs=2)
    fake_hub(monkeypatch, charts[0], chart("blue", PIPE, image={"bytes": b"no", "path": None}))
    assert "ReFocus row 1" in error(capsys, "refocus", tmp_path)
    uneven = {"x1": [1, 2], "y1": [1], "x2": [9], "y2": [9]}
    fake_hub(monkeypatch, chart("red", focus_areas_bbox=uneven))
    assert "ValueError" in error(capsys, "refocus", tmp_path)


@pytest.fixture
def photos(tmp_path):
    """A folder with photos/a.png and photos/more/b.png, both 60 x 40."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "more/b.png")):
        Image.new("L", (60, 40), i).save(tmp_path / "photos" / name)
    return tmp_path


COUNTS = {  # what both converters write: (image, category) -> (answer, boxes)
    ("photos/a.png", "cat"): ("2", [PIPE, DOOR]),
    ("photos/a.png", "traffic light"): ("1", [WALL]),
    ("photos/more/b.png", "cat"): ("1", [DOOR]),
}


def read_counts(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["image"], r["question"].split("'")[1]): (r["answer"], r["boxes"]) for r in rows}


def test_coco_becomes_questions_that_count(photos, capsys):
    def item(image, category, x1, y1, x2, y2, **more):
        box = [x1, y1, x2 - x1, y2 - y1]
        return {"image_id": image, "category_id": category, "bbox": box} | more

    annotations = [item(7, 1, *PIPE), item(7, 3, *WALL), item(7, 1, *DOOR), item(8, 1, *DOOR)]
    annotations.append(item(8, 3, *WALL, iscrowd=1))  # an unknown number: no question
    annotations.append(item(9, 1, *WALL))
    coco = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
            {"id": 8, "file_name": "more/b.png"},
            {"id": 9, "file_name": "gone.png"},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "traffic light"}],
        "annotations": annotations,
    }
    path = photos / "instances.json"
    path.write_text(json.dumps(coco))
    assert run("coco", path, photos / "photos") == 0
    assert read_counts(photos / "photos.jsonl") == COUNTS
    assert len(JsonLines(photos / "photos.jsonl")) == 3
    assert "left out 1 images that are not in " in capsys.readouterr().out
    assert "photos.jsonl exists already" in error(capsys, "coco", path, photos / "photos")
    coco["images"][0]["height"] = 60
    path.write_text(json.dumps(coco))
    wrong = "a.png: its boxes fit 60 x 60 pixels, but the stored image has 60 x 40"
    assert wrong in error(capsys, "coco", path, photos / "photos")
    for change in ({"images": []}, {"annotations": [{}]}, {"categories": 7}):
        path.write_text(json.dumps(coco | change))
        line = error(capsys, "coco", path, photos / "photos")
        assert f"{path} is not in COCO's format" in line


@pytest.mark.parametrize("place", ["labels", "photos"])  # labels beside the photos, too
def test_yolo_becomes_questions_that_count(photos, capsys, place):
    def line(index, x1, y1, x2, y2):
        return f"{index} {(x1 + x2) / 120} {(y1 + y2) / 80} {(x2 - x1) / 60} {(y2 - y1) / 40}\n"

    labels = photos / place
    (labels / "more").mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text(line(0, *PIPE) + line(1, *WALL) + line(0, *DOOR))
    (labels / "more" / "b.txt").write_text(line(0, *DOOR))
    Image.new("L", (9, 9)).save(photos / "photos" / "unlabeled.png")
    (photos / "classes.txt").write_text("\ufeffcat\ntraffic light\n")
    command = "yolo", photos / "photos", labels, photos / "classes.txt"
    assert run(*command) == 0
    assert read_counts(photos / "photos.jsonl") == COUNTS
    assert "names of its classes" in error(capsys, *command[:3], photos / "data.yaml")
    for text in ("2 .5 .5 .1 .1", "-1 .5 .5 .1 .1", "0 .5 .5 .1", "cat .5 .5 .1 .1"):
        (labels / "a.txt").write_text(f"{line(0, *PIPE)}{text}")
        assert f"{labels / 'a.txt'}:2: expected" in error(capsys, *command)


def write_set(folder, count, boxes=(PIPE,)):
    """A .jsonl file whose answers are "<folder> <number>"."""
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "image.png")
    row = {"image": "image.png", "question": "What?", "boxes": boxes}
    rows = [row | {"id": i, "answer": f"{folder.name} {i}"} for i in range(count)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def test_a_mixture_has_its_shares_and_no_row_twice(tmp_path, capsys):
    a, b = write_set(tmp_path / "a", 40), write_set(tmp_path / "b", 8)

    def mix(seed):
        output = tmp_path / "a" / f"mixed{seed}.jsonl"
        assert run("mix", output, f"{a}=4", f"{b}=1", "--count", 30, "--seed", seed) == 0
        return JsonLines(output, allow_absolute_paths=True)

    data, others = mix(0), mix(1)
    answers = [example.answer for example in data]
    assert len(set(answers)) == len(answers) == 30
    assert answers != [example.answer for example in others]
    assert sum(answer.startswith("b") for answer in answers) == 6
    assert {answer[0] for answer in answers[:20]} == {"a", "b"}  # shuffled
    assert {row["image"] for row in data.rows} == {"image.png", str(tmp_path / "b" / "image.png")}
    assert "6 rows have images outside" in capsys.readouterr().out
    assert run("mix", tmp_path / "five.jsonl", f"{a}=1", f"{b}=1", "--count", 5) == 0
    assert len((tmp_path / "five.jsonl").read_text().splitlines()) == 5
    command = "mix", tmp_path / "new.jsonl", f"{a}=4", f"{b}=1", "--count", 43
    assert "has 8 rows, not 9: use --count 40" in error(capsys, *command)


def test_a_mixture_is_in_pixels_whatever_its_sources_are_in(tmp_path, capsys):
    a, b = write_set(tmp_path / "a", 4), write_set(tmp_path / "b", 4, [[100, 100, 300, 900]])
    command = "mix", tmp_path / "mixed.jsonl", f"{a}=1", f"{b}=1", "--count", 8
    assert f"{b}: the boxes look like thousandths" in error(capsys, *command)
    assert "give 2 units" in error(capsys, *command, "--boxes", "0-1000")
    assert run(*command, "--boxes", "pixels", "0-1000") == 0
    boxes = [row["boxes"] for row in JsonLines(command[1], allow_absolute_paths=True).rows]
    assert sorted(boxes) == [[[6, 4, 18, 14]]] * 4 + [[[6, 4, 18, 36]]] * 4
