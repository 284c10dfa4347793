"""ReFocus, the smaller of the paper's two data sets: questions about charts."""

import io

from PIL import Image

from config import InputError
from sources.dataset import AnnotatedDataset

SIDES = "x1", "y1", "x2", "y2"


class ReFocus(AnnotatedDataset):
    """The charts of `ReFocus/ReFocus_Data` on the hub, with all boxes of `focus_areas_bbox`.

    Rows without boxes are skipped and counted. Several rows can share a chart.
    Raises: InputError naming the row.
    """

    def __init__(self, problems=None):
        super().__init__("ReFocus", problems)
        self.table, without_boxes = load_table(), 0
        for number, row in enumerate(self.table.remove_columns("image")):
            where, areas = f"ReFocus row {number}", row.get("focus_areas_bbox")
            try:
                # one list per side: [x1 of every box], [y1 of every box], ...
                boxes = list(zip(*(areas[side] for side in SIDES), strict=True)) if areas else []
            except (KeyError, TypeError, ValueError):
                self.reject(where, "focus_areas_bbox needs four equally long lists x1, y1, x2, y2")
                continue
            if not boxes:
                without_boxes += 1
                continue
            chart = str(row.get("id"))
            row = {**row, "image": chart, "boxes": boxes, "id": f"refocus-{number}"}
            self.add(where, row, number=number, image_key=chart)
        total = len(self.table)
        self.notes.append(f"ReFocus: skipped {without_boxes} of {total} rows: no boxes")
        self.finish()

    def open_image(self, row):
        return Image.open(io.BytesIO(self.table[row["number"]]["image"]["bytes"]))


def load_table():
    """The training split, with images as encoded bytes. Raises: InputError if that fails."""
    try:
        import datasets
    except ImportError:
        advice = "pip install datasets"
        raise InputError(f"--dataset refocus requires the datasets library: {advice}") from None
    try:
        table = datasets.load_dataset("ReFocus/ReFocus_Data", split="train")
        return table.cast_column("image", datasets.Image(decode=False))
    except Exception as error:  # from the hub, the network, the disk or the parquet files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot load ReFocus/ReFocus_Data from the hub: check the network ({reason})"
        ) from None
