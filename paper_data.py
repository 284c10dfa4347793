"""The paper's data, GQA and ReFocus, read in the form in which they are published; and mixtures of data sets."""

import io
import json
import math
from pathlib import Path

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from data import Files, InputError, JsonLines, Rows


def read_datasets(cfg):
    """(training, held-out) examples of the `--dataset` named, or of several in the shares of `--mix`. Prints what was
    left out."""
    names = [cfg.dataset] if Path(cfg.dataset).exists() else cfg.dataset.split("+")
    shares, parts = mix_shares(cfg.mix, names), []
    for name, share in zip(names, shares):
        problems = [] if cfg.skip_bad_examples else None
        if name == "gqa":
            data = Gqa(cfg.data_dir, cfg.allow_absolute_paths, problems)
        elif name == "refocus":
            data = ReFocus(problems)
        elif name == "scenes":
            raise InputError("--dataset: scenes are drawn to measure and cannot be mixed with others")
        else:
            data = JsonLines(name, cfg.allow_absolute_paths, problems)
        print(*data.notes, sep="\n", end="\n" * bool(data.notes))
        parts.append(data.split(round(cfg.eval_examples * share)))
    if len(parts) == 1:
        return parts[0]
    train_sets, eval_sets = zip(*parts)
    return Mixture(train_sets, shares), ConcatDataset(eval_sets)


def mix_shares(text, names):
    """The shares of the data sets, adding to 1. Raises: InputError if `text` does not give each of several its own."""
    try:
        shares = [1.0] if len(names) == 1 else [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(names) or not all(0 < share < math.inf and share >= 0.001 * sum(shares) for share in shares):
        raise InputError(f"--mix {text!r} does not give each of {', '.join(names)} its share, as in 0.8,0.2")
    return [share / sum(shares) for share in shares]


# What GQA's large files hold and nobody here reads: dropped while they are parsed, else they fill the memory.
UNUSED = {"semantic", "semanticStr", "entailed", "equivalent", "types", "groups", "isBalanced", "relations",
          "attributes", "location", "weather"}  # fmt: skip


class Gqa(Files):
    """GQA as published: below `folder`, or in a folder below it, `train_balanced_questions.json` (if there is none, all
    `train_all_questions_*.json`) and `train_sceneGraphs.json`; and `images/<imageId>.jpg`.

    The region is the union of the boxes of the objects that a question's `annotations` name: those of its answer,
    else of its full answer, else of the question. Questions that name none are left out and counted.
    Raises: InputError naming file and question.
    """

    def __init__(self, folder, anywhere=False, problems=None):
        self.folder = Path(folder)
        super().__init__(f"GQA in {folder}", self.folder, anywhere, problems)
        if not folder or not self.folder.is_dir():
            raise InputError(f"--dataset gqa: --data_dir {folder or '(not given)'} is no folder with GQA in it")
        questions = self.find("train_balanced_questions.json") or self.find("train_all_questions_*.json")
        graphs = self.find("train_sceneGraphs.json")
        if not questions or not graphs:
            missing = "train_sceneGraphs.json" if questions else "train_balanced_questions.json"
            raise InputError(f"--data_dir {folder}: no {missing} there or in a folder below it")
        graphs, nameless = load_json(graphs[0]), 0
        for file in questions:
            for number, question in load_json(file).items():
                where = f"{file}: question {number}"
                try:
                    boxes = named_boxes(question, graphs)
                    row = {key: question[key] for key in ("question", "answer")}
                    row |= {"id": number, "boxes": boxes, "image": f"images/{question['imageId']}.jpg"}
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    self.complain(f"{where}: not in GQA's form ({type(error).__name__}: {error})")
                    self.bad += 1
                    continue
                if boxes:
                    self.add(where, row)
                else:
                    nameless += 1
        self.notes.append(f"GQA: {nameless} questions name no object and are left out")
        self.finish()

    def find(self, name):
        return sorted([*self.folder.glob(name), *self.folder.glob(f"*/{name}"), *self.folder.glob(f"*/*/{name}")])


def named_boxes(question, graphs):
    """The boxes (x1, y1, x2, y2) of the objects that a question of GQA names; none if it names none."""
    named = question["annotations"]
    ids = next((list(named[key].values()) for key in ("answer", "fullAnswer", "question") if named.get(key)), [])
    objects = [graphs[question["imageId"]]["objects"][i] for i in dict.fromkeys(ids)]
    return [(o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]) for o in objects]


def load_json(file):
    """The object in a JSON file, without what is UNUSED. Raises: InputError naming the file."""
    try:
        with open(file, encoding="utf-8") as text:
            content = json.load(text, object_pairs_hook=lambda pairs: {k: v for k, v in pairs if k not in UNUSED})
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON in UTF-8 ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not in GQA's form: one object with an entry for each question or image")
    return content


class ReFocus(Rows):
    """The charts of `ReFocus/ReFocus_Data`, through the `datasets` library: every box of a row's `focus_areas_bbox`,
    whose x1, y1, x2, y2 are lists. Rows without boxes are left out and counted. Several rows may show one chart.
    Raises: InputError naming the row."""

    def __init__(self, problems=None):
        super().__init__("ReFocus", problems)
        try:
            import datasets
        except ImportError:
            raise InputError("--dataset refocus needs a library that is not installed: pip install datasets") from None
        try:
            table = datasets.load_dataset("ReFocus/ReFocus_Data", split="train")
            self.table = table.cast_column("image", datasets.Image(decode=False))  # its bytes, to be read when needed
        except Exception as error:  # of the hub, the network, the disk, the parquet files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"ReFocus/ReFocus_Data cannot be had from the hub: check the network ({reason})") from None
        boxless = 0
        for number, row in enumerate(self.table.remove_columns("image")):
            areas = row.get("focus_areas_bbox")
            try:
                boxes = list(zip(*(areas[side] for side in ("x1", "y1", "x2", "y2")), strict=True)) if areas else []
            except (KeyError, TypeError, ValueError):
                self.complain(f"ReFocus row {number}: focus_areas_bbox is not four equal lists x1, y1, x2, y2")
                self.bad += 1
                continue
            if boxes:
                chart = str(row.get("id"))
                self.add(f"ReFocus row {number}", {
                    "question": row.get("question"), "answer": row.get("answer"), "boxes": boxes, "number": number,
                    "image": chart, "key": chart, "id": f"refocus-{number}",
                })  # fmt: skip
            else:
                boxless += 1
        self.notes.append(f"ReFocus: {boxless} rows have no boxes and are left out")
        self.finish()

    def open(self, row):
        return Image.open(io.BytesIO(self.table[row["number"]]["image"]["bytes"]))


class Mixture(Dataset):
    """Several data sets as one, in given shares. An epoch is as long as it takes to show every example of each once at
    least; the others come round again. Which example stands at `[i]` depends on nothing but i."""

    def __init__(self, parts, shares):
        self.parts = parts
        length = max(len(part) / share for part, share in zip(parts, shares))
        self.counts = [round(length * share) for share in shares]

    def __len__(self):
        return sum(self.counts)

    def __getitem__(self, index):
        for part, count in zip(self.parts, self.counts):
            if index < count:
                return part[index % len(part)]
            index -= count
        raise IndexError(index)
