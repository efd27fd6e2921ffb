"""Which tests run when, told from what they use.

- default: every feature, family and method at least once. Of a product of arguments (families x methods x ...) it takes
  tests that hold every value of every argument once; of a conformance test's single argument every third value.
- full: also the rest of these products, and the tests that start processes.
- soak: kills, hostile files, threads; by hand.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

TIERS = ("default", "full", "soak")
COSTLY = ("process", "compiler")
"""Fixtures of tests that start processes, or compile by a C++ compiler; see `nothing_costly`."""
Process = Callable[..., "subprocess.CompletedProcess[str]"]
"""Type of the fixture `process`."""
MOST_QUICK = 6
"""Tests of the default tier that start a process, at most."""
DEFAULT = pytest.StashKey[list[pytest.Item]]()
"""The default tier of all tests that were found."""

_started: list[str] = []


def _heard(event: str, values: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and values[:1] != ("git",):  # asked for the version
        _started.append(str(values[0] if values else event))


sys.addaudithook(_heard)


def tier_of(item: pytest.Item, covering: set[pytest.Item]) -> str:
    """Return the tier of one test; `covering` are those that stand for a product of arguments."""
    if item.get_closest_marker("soak"):
        return "soak"
    if item.get_closest_marker("quick"):
        return "default"
    if item.get_closest_marker("slow") or set(COSTLY) & set(_fixtures(item)):
        return "full"
    return "default" if item in covering else "full"


def sort_into_tiers(items: Sequence[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """Return the tests of each tier.

    Raises:
        pytest.UsageError: more than `MOST_QUICK` tests that start a process are marked to be in the default tier.
    """
    groups: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[item.nodeid.split("[")[0]].append(item)
    turns: Counter[tuple[str, ...]] = Counter()
    covering: set[pytest.Item] = set()
    for name, group in groups.items():
        single = _single(group)
        if single:
            covering.update(group[turns[single] % 3 :: 3] or group)
            turns[single] += 1
        else:
            covering.update(_cover(name, group) if _product(group) else group)
    tiers: dict[str, list[pytest.Item]] = {tier: [] for tier in TIERS}
    for item in items:
        tiers[tier_of(item, covering)].append(item)
    quick = [item.nodeid for item in tiers["default"] if set(COSTLY) & set(_fixtures(item))]
    if len(quick) > MOST_QUICK:
        raise pytest.UsageError(f"at most {MOST_QUICK} tests that start a process may be marked `quick`, got {quick}")
    return tiers


def arguments(item: pytest.Item) -> dict[str, str]:
    """Return the names of a test's arguments with a text for each value."""
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else {name: _text(value) for name, value in callspec.params.items()}


def worker_group(item: pytest.Item) -> str:
    """Return the name of the tests that run in one worker: a file shares its fixtures, and a conformance file the
    untouched runs of a family."""
    case = arguments(item).get("case", "")
    return f"{item.path.name}:{case}" if _conforms(item) else item.path.name


def _text(value: Any) -> str:
    return str(getattr(value, "name", None) or getattr(value, "__name__", None) or value)


def _fixtures(item: pytest.Item) -> Sequence[str]:
    return getattr(item, "fixturenames", ())


def _conforms(item: pytest.Item) -> bool:
    return "conformance" in Path(item.path).parts


def _single(group: Sequence[pytest.Item]) -> tuple[str, ...]:
    """Return the values of a conformance test with a single argument; the tests that share them take turns, so that
    three of them meet every value."""
    found = [arguments(item) for item in group]
    alone = _conforms(group[0]) and all(len(each) == 1 for each in found)
    return tuple(value for each in found for value in each.values()) if alone else ()


def _product(group: Sequence[pytest.Item]) -> bool:
    return len({name for item in group for name in arguments(item)}) > 1


def _cover(name: str, group: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
    """Choose tests of a product until every value of every argument is in one. Which ones differs from test function
    to test function, so that together they meet many pairs."""
    start = crc32(name.encode()) % len(group)
    left = [*group[start:], *group[:start]]
    missing = {pair for item in group for pair in arguments(item).items()}
    while missing:
        best = max(left, key=lambda item: len(missing & set(arguments(item).items())))
        left.remove(best)
        missing -= set(arguments(best).items())
        yield best


@contextmanager
def nothing_costly(item: pytest.Item) -> Iterator[None]:
    """Fail a test of the default tier that starts a process, and does not ask for the fixture that says so."""
    _started.clear()
    yield
    if item.config.getoption("--tier") == "default" and _started and not set(COSTLY) & set(_fixtures(item)):
        pytest.fail(f"{item.name} starts {_started}: let it ask for the fixture 'process', or 'compiler'")
