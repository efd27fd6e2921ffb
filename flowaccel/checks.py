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


def check_whole(owner: Any, **least: int) -> None:
    """Raise a ValueError unless the attributes of `owner` are integers of at least these values."""
    for name, lowest in least.items():
        if not is_whole(getattr(owner, name), lowest):
            raise ValueError(f"{name} must be a whole number of at least {lowest}, got {getattr(owner, name)!r}")
