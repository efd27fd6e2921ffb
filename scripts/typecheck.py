"""Type-check flowaccel with mypy.

An editable install maps `samplers/` to `flowaccel.samplers` at run time, which mypy does not follow. So the packages
are linked into `.typetree/flowaccel/` as they lie in the wheel, and mypy is run there. Arguments are handed on to mypy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typetree"


def build_tree(mapping: dict[str, str]) -> dict[str, str]:
    """Make the link tree afresh and return, for each linked folder, where it really lies (both relative)."""
    shutil.rmtree(TREE, ignore_errors=True)
    core = TREE / "flowaccel"
    core.mkdir(parents=True)
    for child in (ROOT / mapping["flowaccel"]).iterdir():
        if child.name != "__pycache__":
            (core / child.name).symlink_to(child)
    origins = {}
    for package, folder in mapping.items():
        if package != "flowaccel" and (ROOT / folder).is_dir():
            link = Path(*package.split("."))
            (TREE / link).symlink_to(ROOT / folder)
            origins[f"{link.as_posix()}/"] = f"{folder}/"
    return origins


def main() -> int:
    """Run mypy; messages name the files where they really lie."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    origins = build_tree(table["package-dir"])
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "--package", "flowaccel", *sys.argv[1:]]
    result = subprocess.run(command, cwd=TREE, stdout=subprocess.PIPE, text=True)
    for line in result.stdout.splitlines():
        link = next((link for link in origins if line.startswith(link)), None)
        print(line if link is None else origins[link] + line[len(link) :])
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
