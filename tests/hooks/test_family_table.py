"""docs/families.md says what the tests show, and knows every pipeline of the installed diffusers."""

from __future__ import annotations

import runpy
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "families.md"


def test_the_table_is_that_of_the_tests() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"diffusers {diffusers.__version__} " not in text:
        pytest.skip(f"docs/families.md is about another diffusers than {diffusers.__version__}")
    assert runpy.run_path(str(ROOT / "scripts" / "families.py"))["page"]() == text, (
        "run `python scripts/families.py --write`: a network is new, or another one is run by the tests"
    )
