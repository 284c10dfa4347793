"""Your own data: a file with one JSON object per line."""

import json
from pathlib import Path

from sources.annotated import FileDataset, read_file


class JsonLines(FileDataset):
    """A file with one JSON object per line: `image` (a path relative to the file), `question`,
    `answer`, `boxes` ([[x1, y1, x2, y2], ...] in pixels of the stored image) and an optional `id`.
    Raises: InputError naming file and line."""

    def __init__(self, path, allow_absolute_paths=False, problems=None):
        super().__init__(path, Path(path).parent, allow_absolute_paths, problems)
        # str.splitlines() would also split at characters that JSON text may contain.
        for number, line in enumerate(read_file(path).split(b"\n"), 1):
            if line.strip():
                self.parse_line(f"{path}:{number}", line)
        self.finish()

    def parse_line(self, where, line):
        """Add the row on this line, or reject it."""
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            self.reject(where, f"not JSON in UTF-8 ({error})")
            return
        if isinstance(row, dict):
            self.add(where, row)
        else:
            self.reject(where, "not a JSON object with image, question, answer and boxes")
