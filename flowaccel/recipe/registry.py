"""Registry of methods by strings, so that listing them imports neither torch nor diffusers.

Every method describes itself as `METHOD` in the `__init__` of its own package: `flowaccel.caching`, a package below
`flowaccel.methods`, or a package that another distribution lists in the entry-point group `flowaccel.methods`. In a
script or a notebook, `register` adds one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

_METHODS = "flowaccel.methods"
"""Package of flowaccel's methods, and entry-point group of other distributions' methods."""

_registered: list[Method] = []


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A name for accelerators of a method in `accelerate`, recipes and the command line.

    Args:
        summary: what it is, in a sentence.
        make: `"module:name"` of a function of the options that returns an accelerator or a list of them.
        arguments: keyword arguments of that call besides the options.
        options: whether it takes options, as in `NAME:threshold=0.1`.
        pattern: regular expression of the names that it stands for, where its name is a placeholder; named groups
            become keyword arguments.
        source: where it was published.
    """

    summary: str
    make: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: bool = True
    pattern: str | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its name, and references to its parts.

    References are `"module:name"`, which is imported when it is used, or the object itself.

    Args:
        accelerators: classes that recipes hold, by their names in JSON.
        presets: by name.
        networks: classes of the networks that it saves, by class name.
        former: names that JSON of earlier releases holds; each refers to a function that turns such an entry (a dict)
            into a current one.
        fit: methods of `flowaccel calibrate`, by name; a `Calibrator` for a cache,
            or the function that makes a recipe.
        train: sub-commands of `flowaccel train`, by name; each refers to a typer command.
        commands: further commands of `flowaccel`, by name.
    """

    accelerators: Mapping[str, Any] = field(default_factory=dict)
    presets: Mapping[str, Preset] = field(default_factory=dict)
    networks: Mapping[str, Any] = field(default_factory=dict)
    former: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def all_methods() -> tuple[Method, ...]:
    """Return the methods of flowaccel, of other installed distributions, and registered at run time.

    A distribution whose method cannot be imported, or that uses a name already taken, is skipped with a warning.
    """
    spec = importlib.util.find_spec(_METHODS)
    folders = pkgutil.iter_modules(spec.submodule_search_locations if spec else None)
    packages = ["flowaccel.caching", *(f"{_METHODS}.{folder.name}" for folder in folders)]
    found: list[Method] = [importlib.import_module(package).METHOD for package in packages]
    for point in entry_points(group=_METHODS):
        try:
            method = point.load()
            if not isinstance(method, Method):
                raise TypeError(f"it is a {type(method).__name__}, not a flowaccel.recipe.registry.Method")
            _check_names(method, found)
        except Exception as error:  # an import of another distribution may raise anything
            warnings.warn(
                f"the method {point.name!r} ({point.value}) of another distribution is left out: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        found.append(method)
    return (*found, *_registered)


def register(method: Method) -> Callable[[], None]:
    """Register a method until the process ends; returns a function that removes it.

    Raises:
        ValueError: a name is already taken.
    """
    _check_names(method, list(all_methods()))
    _registered.append(method)
    all_methods.cache_clear()

    def remove() -> None:
        _registered.remove(method)
        all_methods.cache_clear()

    return remove


def _check_names(method: Method, others: list[Method]) -> None:
    for kind in ("accelerators", "presets", "networks", "former", "fit", "train", "commands"):
        taken = {name for other in others for name in getattr(other, kind)} & set(getattr(method, kind))
        if taken:
            raise ValueError(f"the name {sorted(taken)[0]!r} in {kind} is taken")


def entries(kind: str) -> dict[str, Any]:
    """Return one field of all methods, joined: `entries("presets")` by name."""
    return {name: value for method in all_methods() for name, value in getattr(method, kind).items()}


def load(reference: Any) -> Any:
    """Import the object that `"module:name"` refers to; anything but text is returned unchanged."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


class Loaded(Mapping[str, Any]):
    """Mapping of one field of all methods by name; its values are imported on access."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __getitem__(self, name: str) -> Any:
        return load(entries(self._kind)[name])

    def __iter__(self) -> Iterator[str]:
        return iter(entries(self._kind))

    def __len__(self) -> int:
        return len(entries(self._kind))

    def __contains__(self, name: object) -> bool:
        return name in entries(self._kind)


ACCELERATORS: Mapping[str, Any] = Loaded("accelerators")
"""Classes of accelerators, by their names in recipes."""
NETWORKS: Mapping[str, Any] = Loaded("networks")
"""Classes of the networks that methods save, by class name."""
