"""The pages that are written from the presets are those of the present presets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_pages_of_the_caches_are_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "cache_docs.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
