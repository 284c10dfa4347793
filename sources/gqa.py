"""GQA, the larger of the paper's two data sets."""

import json

from config import InputError
from sources.dataset import FileDataset

# GQA's files are large. These parts are not used, and are dropped during parsing to save memory.
UNUSED = frozenset(
    "semantic semanticStr entailed equivalent types groups isBalanced relations attributes "
    "location weather".split()
)


class Gqa(FileDataset):
    """GQA in `folder`, as published.

    Reads `train_balanced_questions.json` (or, if it does not exist, all files
    `train_all_questions_*.json`) and `train_sceneGraphs.json`, in the folder or up to two levels
    below, and images from `images/<imageId>.jpg`.

    The region is the union of the boxes of the annotated objects: those of the answer if it has
    any, otherwise those of the full answer, otherwise those of the question. Questions without
    annotated objects are skipped and counted.
    Raises: InputError naming file and question.
    """

    def __init__(self, folder, allow_absolute_paths=False, problems=None):
        super().__init__(f"GQA in {folder}", folder, allow_absolute_paths, problems)
        if not folder or not self.folder.is_dir():
            raise InputError(f"--dataset gqa: --data_dir {folder or '(missing)'} is not a folder")
        questions = self.find("train_balanced_questions.json")
        questions = questions or self.find("train_all_questions_*.json")
        graphs = self.find("train_sceneGraphs.json")
        if not questions or not graphs:
            missing = "train_sceneGraphs.json" if questions else "train_balanced_questions.json"
            raise InputError(f"--data_dir {folder}: no {missing} there or up to two levels below")
        graphs, self.total, self.without_objects = load_json(graphs[0]), 0, 0
        for file in questions:
            for number, question in load_json(file).items():
                self.add_question(f"{file}: question {number}", number, question, graphs)
        self.notes.append(
            f"GQA: skipped {self.without_objects} of {self.total} questions: no annotated objects"
        )
        self.finish()

    def find(self, name):
        patterns = name, f"*/{name}", f"*/*/{name}"
        return sorted(path for pattern in patterns for path in self.folder.glob(pattern))

    def add_question(self, where, number, question, graphs):
        """Add or reject a question, or only count it if it has no annotated objects."""
        self.total += 1
        try:
            row = {
                "image": f"images/{question['imageId']}.jpg",
                "question": question["question"],
                "answer": question["answer"],
                "boxes": annotated_boxes(question, graphs),
                "id": number,
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            self.reject(where, f"not in GQA's format ({reason})")
            return
        if row["boxes"]:
            self.add(where, row)
        else:
            self.without_objects += 1


def annotated_boxes(question, graphs):
    """The boxes (x1, y1, x2, y2) of a question's annotated objects, as a list."""
    annotations, ids = question["annotations"], []
    for part in ("answer", "fullAnswer", "question"):
        if annotations.get(part):
            ids = list(annotations[part].values())
            break
    ids = dict.fromkeys(ids)  # each once, in order
    objects = [graphs[question["imageId"]]["objects"][i] for i in ids]
    return [(o["x"], o["y"], o["x"] + o["w"], o["y"] + o["h"]) for o in objects]


def load_json(file):
    """The object in a JSON file, without the keys in UNUSED. Raises: InputError naming the file."""

    def drop_unused(pairs):
        return {key: value for key, value in pairs if key not in UNUSED}

    try:
        with open(file, encoding="utf-8") as text:
            content = json.load(text, object_pairs_hook=drop_unused)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file}: not JSON in UTF-8 ({reason})") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object")
    return content
