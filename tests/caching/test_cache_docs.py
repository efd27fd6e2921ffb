"""The pages that are written from the presets are those of the present presets."""

from __future__ import annotations

from pathlib import Path

from tiers import Process

ROOT = Path(__file__).resolve().parents[2]


def test_pages_of_the_caches_are_up_to_date(process: Process) -> None:
    process(ROOT / "scripts" / "cache_docs.py", "--check")
