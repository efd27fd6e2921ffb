"""Conversion of accelerators of earlier releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def feature_cache_of_step_skip(data: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the entry of a `step_skip` (until 0.1) to that of an equivalent feature cache."""
    gate = {key: data[key] for key in ("threshold", "mode", "per_time") if key in data}
    others = {key: value for key, value in data.items() if key not in (*gate, "name", "max_run", "predictor")}
    return {
        "name": "feature_cache",
        "gate": {"name": "third_difference", **gate},
        "scope": {"name": "output"},
        "predictor": data.get("predictor", {"name": "hold"}),
        "guard": {"name": "guard", "warmup": 4, "last": 0, "max_run": data.get("max_run", 4)},
        **others,
    }
