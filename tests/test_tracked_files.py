"""What no tracked text file may hold."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("flowaccel", "evaluation", "pipelines", "samplers", "tests", "docs", "benchmarks", "scripts", "examples")


def test_no_file_holds_the_marks_of_a_merge() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".pyi", ".md"}]
    files += ROOT.glob("*.md")
    assert len(files) > 400
    marks = re.compile(r"^(<{7}|>{7})( |$)", re.M)
    assert [str(path) for path in files if marks.search(path.read_text(encoding="utf-8"))] == []
