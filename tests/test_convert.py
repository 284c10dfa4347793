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


@pytest.fixture
def gqa(tmp_path):
    """A folder with the files of GQA's three archives."""
    for name in ("images", "questions"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "17.jpg")
    same = {"question": "What is on the wall?", "imageId": "17", "answer": "pipe", "semantic": []}
    questions = {number: same | {"annotations": spans} for number, spans in ANNOTATIONS.items()}
    (tmp_path / "questions" / "train_balanced_questions.json").write_text(json.dumps(questions))
    (tmp_path / "train_sceneGraphs.json").write_text(json.dumps({"17": {"objects": OBJECTS}}))
    return tmp_path


def test_gqa_takes_the_objects_of_the_answer_or_the_full_answer_or_the_question(gqa, capsys):
    assert run("gqa", gqa) == 0
    assert "skipped 1 of 4 questions: no annotated objects" in capsys.readouterr().out
    data = JsonLines(gqa / "gqa.jsonl")
    boxes = {example.id: example.boxes for example in data}
    assert boxes == {"q0": [PIPE], "q1": [PIPE, DOOR], "q2": [WALL]}
    assert (data[0].question, data[0].answer) == ("What is on the wall?", "pipe")


@pytest.mark.parametrize(
    "change", [{"annotations": None}, {"annotations": {"answer": {"0": "roof"}}}, {"imageId": "7"}]
)
def test_a_bad_question_or_a_missing_file_of_gqa_is_one_line_that_names_it(gqa, capsys, change):
    path = gqa / "questions" / "train_balanced_questions.json"
    questions = json.loads(path.read_text())
    questions["q1"] |= change
    path.write_text(json.dumps(questions))
    assert run("gqa", gqa) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"convert.py: {path}: question q1: ") and error.count("\n") == 1
    assert not (gqa / "gqa.jsonl").exists()
    (gqa / "train_sceneGraphs.json").unlink()
    assert run("gqa", gqa) == 2 and "no train_sceneGraphs.json" in capsys.readouterr().err


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


def test_a_bad_row_of_refocus_is_named(tmp_path, monkeypatch, capsys):
    uneven = {"x1": [1, 2], "y1": [1], "x2": [9], "y2": [9]}
    no_image = {"bytes": b"not an image", "path": None}
    for change in ({"focus_areas_bbox": uneven}, {"image": no_image}):
        fake_hub(monkeypatch, chart("red", PIPE), chart("blue", PIPE, **change))
        assert run("refocus", tmp_path) == 2
        error = capsys.readouterr().err
        assert "ReFocus row 1" in error and error.count("\n") == 1


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
    coco = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "more/b.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "traffic light"}],
        "annotations": annotations,
    }
    path = photos / "instances.json"
    path.write_text(json.dumps(coco))
    assert run("coco", path, photos / "photos") == 0
    assert read_counts(photos / "photos.jsonl") == COUNTS
    assert len(JsonLines(photos / "photos.jsonl")) == 3
    for change in ({"images": []}, {"annotations": [{}]}, {"categories": 7}):
        path.write_text(json.dumps(coco | change))
        assert run("coco", path, photos / "photos") == 2
        error = capsys.readouterr().err
        assert f"{path} is not in COCO's format" in error and error.count("\n") == 1


def test_yolo_becomes_questions_that_count(photos, capsys):
    def line(index, x1, y1, x2, y2):
        return f"{index} {(x1 + x2) / 120} {(y1 + y2) / 80} {(x2 - x1) / 60} {(y2 - y1) / 40}\n"

    labels = photos / "labels"
    (labels / "more").mkdir(parents=True)
    (labels / "a.txt").write_text(line(0, *PIPE) + line(1, *WALL) + line(0, *DOOR))
    (labels / "more" / "b.txt").write_text(line(0, *DOOR))
    Image.new("L", (9, 9)).save(photos / "photos" / "unlabeled.png")
    (photos / "classes.txt").write_text("cat\ntraffic light\n")
    command = "yolo", photos / "photos", labels, photos / "classes.txt"
    assert run(*command) == 0
    assert read_counts(photos / "photos.jsonl") == COUNTS
    for text in ("2 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "cat 0.5 0.5 0.1 0.1"):
        (labels / "a.txt").write_text(f"{line(0, *PIPE)}{text}")
        assert run(*command) == 2
        error = capsys.readouterr().err
        assert f"{labels / 'a.txt'}:2: expected" in error and error.count("\n") == 1


def write_set(folder, count):
    """A .jsonl file whose answers are "<folder> <number>"."""
    folder.mkdir()
    Image.new("RGB", (60, 40)).save(folder / "image.png")
    row = {"image": "image.png", "question": "What?", "boxes": [PIPE]}
    rows = [row | {"id": i, "answer": f"{folder.name} {i}"} for i in range(count)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def test_a_mixture_has_its_shares_and_no_row_twice(tmp_path, capsys):
    a, b = write_set(tmp_path / "a", 40), write_set(tmp_path / "b", 8)
    output = tmp_path / "a" / "mixed.jsonl"

    def mix(seed, count=30, code=0):
        command = ["mix", output, f"{a}=4", f"{b}=1", "--count", count, "--seed", seed]
        assert run(*command) == code
        return JsonLines(output, allow_absolute_paths=True)

    data, answers = mix(0), [example.answer for example in mix(0)]
    assert answers == [example.answer for example in data] != [x.answer for x in mix(1)]
    assert len(set(answers)) == len(answers) == 30
    assert sum(answer.startswith("b") for answer in answers) == 6
    assert {answer[0] for answer in answers[:20]} == {"a", "b"}  # shuffled
    assert {row["image"] for row in data.rows} == {"image.png", str(tmp_path / "b" / "image.png")}
    assert "6 rows have images outside" in capsys.readouterr().out
    mix(0, count=43, code=2)
    assert "has 8 rows, not 9: use --count 40" in capsys.readouterr().err
