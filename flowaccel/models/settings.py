"""Conversion of entries of a network's configuration to settings."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def settings_from(kind: type[Settings], given: Settings | dict[str, Any] | None, argument: str) -> Settings:
    """Build the dataclass `kind` from the entries of the constructor's `argument`; an instance is returned unchanged.

    Raises:
        ValueError: an entry that is not known.
    """
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    entries: dict[str, Any] = dict(given or {})  # type: ignore[arg-type]
    unknown = sorted(set(entries) - set(known))
    if unknown:
        raise ValueError(f"{argument}: unknown {unknown}; allowed are {known}")
    return kind(**entries)
