"""benchmarks/mediators_time.py: the number of tokens where mediators break even, and what a quick run writes."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tiers import Process

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("mediators_time")


def test_break_even_is_where_the_speedup_crosses_one(script: Any) -> None:
    """A power law is met exactly: the speed-up (N / 700) ** 0.6 is 1 at 700 tokens."""
    law = {tokens: (tokens / 700) ** 0.6 for tokens in (4096, 256, 1024)}
    assert script.break_even(law) == pytest.approx(700)
    assert script.said(script.break_even(law), law) == "700 tokens"


def test_break_even_at_the_last_crossing(script: Any) -> None:
    found = script.break_even({256: 1.2, 512: 0.5, 1024: 2.0, 4096: 3.0})
    assert found == pytest.approx(math.sqrt(512 * 1024))


def test_break_even_outside_of_what_was_measured(script: Any) -> None:
    faster, slower = {256: 1.0, 1024: 2.0}, {256: 1.5, 1024: 0.9}
    assert script.said(script.break_even(faster), faster) == "at most 256 tokens"
    assert script.break_even(slower) is None
    assert script.said(None, slower) == "none measured, up to 1024 tokens"


def test_a_quick_run(tmp_path: Path, process: Process) -> None:
    result = process(BENCHMARKS / "mediators_time.py", "--quick", "--out", tmp_path)
    found = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in ("layers", "models", "agents")}
    for stage in ("layers", "models"):
        assert [row["tokens"] for row in found[stage]["rows"]] == [16, 64]
        calls = found[stage]["rows"][1]["calls"]
        assert set(found[stage]["break_even_tokens"]) == set(calls) - {"softmax"}
        assert calls["softmax"]["macs"] > 0
    assert "break-even" in result.stdout
    assert found["agents"]["weights"] == "random"
    assert found["agents"]["about_errors"] in result.stdout
    for row in found["agents"]["rows"]:
        calls = row["calls"]
        macs = {name: call["macs"] for name, call in calls.items()}
        assert macs["untouched"] > macs["stride 2, first 0.4"] > macs["stride 4, first 0.4"] > macs["stride 4, first 1"]
        assert 0 < calls["stride 4, first 1"]["output_error"] < 1
        assert calls["untouched"]["latents_error"] == 0
        assert calls["3 steps"]["ideal"] == pytest.approx(5 / 3, rel=0.01)


def test_a_quick_run_has_nothing_to_record(tmp_path: Path, process: Process) -> None:
    result = process(BENCHMARKS / "mediators_time.py", "--quick", "--record", "--out", tmp_path, code=2)
    assert "--quick has no numbers to --record" in result.stderr
