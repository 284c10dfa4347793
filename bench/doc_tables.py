"""Generated Markdown tables, their place in the documents, and a description of the machine."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def machine():
    """The processor, its cores, the GPU if there is one, and package versions, as a dict."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    packages = ("torch", "transformers", "bitsandbytes", "peft")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **card,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_atomically(path, text):
    """Replace a file atomically, so that an interrupted benchmark leaves the old or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def markdown_table(header, rows):
    """A Markdown table, padded so that its source is readable. Args: lists of strings."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def marked(name, text):
    """`text`, enclosed in the comments that mark its place in a document."""
    return f"<!-- {name} -->\n{text}\n<!-- end {name} -->"


def insert(path, name, text):
    """Put `text` between the comments `<!-- name -->` and `<!-- end name -->` of a document.
    Raises: SystemExit if it has no such comments."""
    document = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if start not in document or end not in document:
        raise SystemExit(f"{path} has no comments {start.strip()} and {end} for this table")
    before, rest = document.split(start)
    path.write_text(before + marked(name, text) + rest.split(end)[1])
