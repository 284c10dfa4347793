"""Data sets in your own .jsonl files, with one JSON object per line."""

import json
from pathlib import Path

from config import InputError
from sources.dataset import FileDataset, read_file


class JsonLines(FileDataset):
    """A file with one JSON object per line: `image` (a path relative to the file), `question`,
    `answer`, `boxes` ([[x1, y1, x2, y2], ...] in pixels of the stored image) and an optional `id`.
    Raises: InputError naming file and line."""

    def __init__(self, path, allow_absolute_paths=False, problems=None):
        super().__init__(path, Path(path).parent, allow_absolute_paths, problems)
        content = read_file(path)
        if is_array(content):
            raise InputError(f"{path} is a JSON array: write one object per line, without commas")
        # str.splitlines() also splits at characters that may occur inside JSON strings.
        for number, line in enumerate(content.split(b"\n"), 1):
            if line.strip():
                self.parse_line(f"{path}:{number}", line)
        self.finish()

    def parse_line(self, where, line):
        """Add the row on this line or reject it."""
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            self.reject(where, f"not JSON in UTF-8 ({error})")
            return
        if isinstance(row, dict):
            self.add(where, row)
        else:
            self.reject(where, "not a JSON object with image, question, answer and boxes")


def is_array(content):
    """Whether the whole file is a JSON array, which deserves one error instead of one per line."""
    try:
        return content.lstrip()[:1] == b"[" and isinstance(json.loads(content), list)
    except (ValueError, RecursionError):
        return False
