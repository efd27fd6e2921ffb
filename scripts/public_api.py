"""Print the public names of flowaccel with their signatures, one a line.

tests/data/public_api.txt holds them as they were when it was last written, at a release:
`python scripts/public_api.py > tests/data/public_api.txt`. tests/test_public_api.py compares.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

MODULES = (
    "flowaccel",
    "flowaccel.recipe",
    "flowaccel.hooks",
    "flowaccel.models",
    "flowaccel.samplers",
    "flowaccel.pipelines",
    "flowaccel.evaluation",
    "flowaccel.caching.gates",
    "flowaccel.caching.predictors",
    "flowaccel.caching.scopes",
)


def public_api() -> list[str]:
    """Return a line for every public name of every public module, and for the public members of its classes."""
    return [line for module in MODULES for line in _of_module(module)]


def _of_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    for public in sorted(module.__all__):
        value = getattr(module, public)
        yield f"{name}.{public}{_signature(value)}"
        if inspect.isclass(value):
            for member, defined in sorted(vars(value).items()):
                if not member.startswith("_") and value.__module__.startswith("flowaccel"):
                    yield f"{name}.{public}.{member}{_signature(defined)}"


def _signature(value: Any) -> str:
    if isinstance(value, property):
        return ": property"
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if inspect.ismodule(value) or not (inspect.isclass(value) or inspect.isroutine(value)):
        return f": {type(value).__name__}"
    try:
        text = str(inspect.signature(value))
    except (TypeError, ValueError):
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


if __name__ == "__main__":
    print("\n".join(public_api()))
