"""Print how much of the public interface has a type that every type checker infers alike, in percent.

    pip install basedpyright==1.40.2
    python scripts/type_completeness.py            # fails below 95 %; further arguments: -v lists what lacks a type

`pyright --verifytypes` reads the packages as they lie in the wheel, and torch's stubs from this environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

from typecheck import ROOT, TREE, build_tree

LEAST = 95.0


def main() -> int:
    """Run basedpyright on a copy of the packages."""
    program = shutil.which("basedpyright")
    if program is None:
        print("error: basedpyright is not installed; pip install basedpyright==1.40.2", file=sys.stderr)
        return 2
    build_tree(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(TREE / "flowaccel", Path(folder) / "flowaccel", ignore=shutil.ignore_patterns("__pycache__"))
        found = subprocess.run(
            [program, "--verifytypes", "flowaccel", "--ignoreexternal"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{sysconfig.get_path('purelib')}"},
            capture_output=True,
            text=True,
        ).stdout
    if "-v" in sys.argv:
        print(found.replace(f"{folder}/", ""))
    score = re.search(r"Type completeness score: ([\d.]+)%", found)
    if score is None:
        print(found, file=sys.stderr)
        return 2
    print(f"{score[1]} %")
    return int(float(score[1]) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
