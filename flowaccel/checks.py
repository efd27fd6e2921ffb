"""Checks of numbers that users give; a bool is none, though Python counts it as an integer."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def is_whole(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[int]:
    """Return whether `value` is an integer in `least` .. `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Return whether `value` is a finite number in `least` .. `most`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most
