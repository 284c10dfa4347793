"""Builds the package `sayo_mini` from the flat files; pyproject.toml names this class.

In a clone, the files import one another by plain names. Installed, names such as `config` and
`data` would collide with your own. So the build writes `from sayo_mini.config import` where a file
says `from config import`, and `sayo-mini` where a message says `python sayo_mini.py`.
"""

import re
import sys
from pathlib import Path

from setuptools.command.build_py import build_py

MODULES = "|".join([*(path.stem for path in Path().glob("*.py")), r"extras\.\w+"])
CHANGES = {
    rf"^( *)from ({MODULES}) import": r"\1from sayo_mini.\2 import",
    rf"^( *)import ({MODULES})\b": r"\1from sayo_mini import \2",
    r"^sys\.path\.insert.*\n": "",
    r"(python )?sayo_mini\.py": "sayo-mini",
    r"(python )?extras/(\w+)\.py": r"python -m sayo_mini.extras.\2",
}


class BuildPackage(build_py):
    def run(self):
        if self.editable_mode:
            sys.exit("an editable install is not supported: run python sayo_mini.py in the clone")
        super().run()
        Path(self.build_lib, "sayo_mini", "__init__.py").touch()

    def build_module(self, module, module_file, package):
        outfile, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text("utf-8")
        for pattern, replacement in CHANGES.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        Path(outfile).write_text(text, "utf-8")
        return outfile, copied
