"""The public names and their signatures: a change has to be named in CHANGELOG.md."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ROOT / "tests" / "data" / "public_api.txt"


def changed(released: list[str], present: list[str]) -> list[str]:
    """Names whose line is new, gone or another."""
    return sorted({re.split(r"[(:]", line)[0] for line in {*released} ^ {*present}})


def unnamed(names: list[str], changelog: str) -> list[str]:
    """Names of which the part of the changelog that is not released says nothing."""
    unreleased = changelog.split("\n## ")[1]
    return [name for name in names if not re.search(rf"\b{re.escape(name.split('.')[-1])}\b", unreleased)]


def test_a_change_of_the_public_names_is_in_the_changelog() -> None:
    present = runpy.run_path(str(ROOT / "scripts" / "public_api.py"))["public_api"]()
    released = RELEASED.read_text(encoding="utf-8").splitlines()
    left = unnamed(changed(released, present), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert not left, (
        f"{', '.join(left)}: the public interface changed. Say so in CHANGELOG.md under its first heading, by these "
        "names (tests/data/public_api.txt is written anew at a release)"
    )


def test_what_counts_as_a_change() -> None:
    before, after = ["a.f(x)", "a.C: type", "a.gone()"], ["a.f(x, y)", "a.C: type", "a.new()"]
    names = changed(before, after)
    assert names == ["a.f", "a.gone", "a.new"]
    text = "# Changes\n\n## Unreleased\n- `a.f` takes y; `new`.\n\n## 0.1\n- gone\n"
    assert unnamed(names, text) == ["a.gone"]
