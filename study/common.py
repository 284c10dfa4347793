"""What the scripts of this folder share: the machine, results as JSON, tables in Markdown."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "study" / "results"


def machine():
    """The processor, its cores, the GPU if there is one, and package versions, as a dict."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    packages = ("torch", "transformers", "bitsandbytes", "peft", "trl")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        **card,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_results(path, results):
    """Replace a JSON file atomically, so that an interrupted script leaves the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, path)


def markdown_table(header, rows):
    """A Markdown table, padded so that its source is readable. Args: lists of strings."""
    rows = [header, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |"
        for row in rows
    ]
    rule = "|" + "---|" * len(header)
    return "\n".join([lines[0], rule, *lines[1:]])
