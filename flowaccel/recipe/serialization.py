"""Conversion between frozen dataclasses and plain JSON data, for every accelerator and its components.

A field holds a plain value (None, bool, number, text, lists or tuples and string-keyed dicts of these, a path), or, if
it was declared with `component`, another frozen dataclass, or, if with `learned`, a network that is stored in a folder
of its own. A component is written as `{"name": ..., FIELD: ...}`, where `name` is its class variable.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flowaccel.errors import FlowaccelError, WeightsNotFoundError, did_you_mean

_REGISTRY, _LEARNED = "flowaccel_registry", "flowaccel_learned"


@dataclass(frozen=True)
class Learned:
    """Storage of a learned part: the sub-folder it is written to, and the function that loads it."""

    folder: str
    load: Callable[[Path], nn.Module]


@dataclass(frozen=True)
class Part:
    """A learned part of an accelerator: the network, or the folder that it is stored in."""

    value: nn.Module | str | Path
    load: Callable[[Path], nn.Module]

    @property
    def network(self) -> nn.Module:
        """The network, loaded from disk if necessary."""
        return self.value if isinstance(self.value, nn.Module) else self.load(Path(self.value))


@dataclass(frozen=True)
class Source:
    """The folder that a recipe is read from.

    Args:
        folder: folder of its learned parts.
        contained: refuse paths outside of that folder; only a file that the user named may point elsewhere.
        fetch: downloads a sub-folder to `folder` (from the Hub); None if all are present.
    """

    folder: Path
    contained: bool = True
    fetch: Callable[[str], None] | None = None

    def inside(self, text: str, path: str) -> Path:
        """Return the path that `text` denotes.

        Raises:
            ValueError: it leads out of the folder.
        """
        steps = text.replace("\\", "/").split("/")
        leaves = ".." in steps or ":" in text or not steps[0]  # "C:..." and "/..." are absolute
        if self.contained and (leaves or not self._reaches(text)):
            raise ValueError(
                f"{path}: {text!r} leads out of the recipe's folder; a recipe reads only what lies beside it. Copy it "
                "into that folder, or build the recipe in Python, where any path is allowed"
            )
        return self.folder / text

    def part(self, text: str, path: str) -> Path:
        """Return the folder of a learned part.

        Raises:
            ValueError: it leads out of the recipe's folder.
            WeightsNotFoundError: it is not there.
        """
        found = self.inside(text, path)
        if self.fetch is not None:
            self.fetch(text)
        if not found.is_dir():
            raise WeightsNotFoundError(
                f"{path}: the learned part {text!r} is missing, there is no folder {found}. Copy it there from where "
                "the recipe was saved, or save the recipe again with save_pretrained"
            )
        return found

    def _reaches(self, text: str) -> bool:
        """Return whether `text` stays below the folder after links are resolved."""
        return (self.folder / text).resolve().is_relative_to(self.folder.resolve())


def component(registry: Mapping[str, type], **options: Any) -> Any:
    """Return a dataclass field for a component in `registry` (or None, or several of them).

    Args:
        registry: name -> frozen dataclass with a class variable `name`.
        options: arguments of `dataclasses.field`.
    """
    return dataclasses.field(metadata={_REGISTRY: registry}, **options)


def learned(folder: str, load: Callable[[Path], nn.Module], **options: Any) -> Any:
    """Return a dataclass field for a network with `save_pretrained`, the folder that it is stored in, or None.

    Args:
        folder: name of the sub-folder that it is saved to.
        load: loads it from a folder.
        options: arguments of `dataclasses.field`.
    """
    return dataclasses.field(metadata={_LEARNED: Learned(folder, load)}, **options)


def storage_of(kind: type, name: str) -> Learned:
    """Return the storage of the `learned` field `name` of a dataclass."""
    stored: Learned = kind.__dataclass_fields__[name].metadata[_LEARNED]  # type: ignore[attr-defined]
    return stored


def encode(value: Any, parts: dict[str, Part], path: str = "") -> dict[str, Any]:
    """Return the fields of a dataclass as JSON data.

    Args:
        value: the dataclass.
        parts: gets every learned part under the name of the sub-folder that the data refers to; names that it already
            holds are not used again.
        path: name of `value` in errors.

    Raises:
        TypeError, ValueError: a field holds a value that JSON cannot; the message names it.
    """
    return {
        field.name: _encode_field(field, getattr(value, field.name), parts, f"{path}.{field.name}".lstrip("."))
        for field in _fields(value)
    }


def encode_component(value: Any, parts: dict[str, Part], path: str) -> dict[str, Any]:
    """Return a component as `{"name": ..., FIELD: ...}`; raises as `encode` does."""
    name = getattr(value, "name", None)
    if not dataclasses.is_dataclass(value) or not isinstance(name, str):
        raise TypeError(f"{path}: must hold a frozen dataclass with a class variable `name`, got {value!r}")
    return {"name": name, **encode(value, parts, path)}


def decode(registry: Mapping[str, type], data: Any, path: str, source: Source) -> Any:
    """Build a component from its JSON data; the inverse of `encode_component`.

    Args:
        registry: name -> class.
        data: the JSON data.
        path: its position in the JSON data, for errors.
        source: the source of learned parts.

    Raises:
        ValueError: unknown name or key, or a value that the class refuses; the message begins with its position.
        WeightsNotFoundError: a learned part is missing.
    """
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ValueError(f'{path}: must look like {{"name": ..., ...}}, got {data!r}')
    if data["name"] not in registry:
        raise ValueError(f"{path}.name: unknown {data['name']!r}; {_allowed(data['name'], sorted(registry))}")
    kind = registry[data["name"]]
    fields = {field.name: field for field in _fields(kind)}
    check_keys(data, ["name", *fields], path)
    hints = typing.get_type_hints(kind)
    values = {
        key: _decode_field(fields[key], hints[key], value, f"{path}.{key}", source)
        for key, value in data.items()
        if key != "name"
    }
    try:
        return kind(**values)
    except FlowaccelError as error:
        raise type(error)(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_keys(data: Iterable[str], allowed: list[str], path: str = "") -> None:
    """Raise a ValueError for a key that is not allowed; its message names the closest allowed key."""
    for key in data:
        if key not in allowed:
            raise ValueError(f"{path}.{key}: unknown; {_allowed(key, allowed)}".lstrip("."))


def load_parts(value: Any) -> Any:
    """Return the dataclass with every learned part in memory."""
    changes = {}
    for field in _fields(value):
        current = getattr(value, field.name)
        if _LEARNED in field.metadata and isinstance(current, (str, Path)):
            changes[field.name] = field.metadata[_LEARNED].load(Path(current))
        elif _REGISTRY in field.metadata and current is not None:
            several = isinstance(current, (tuple, list))
            loaded = tuple(load_parts(item) for item in (current if several else [current]))
            if any(new is not old for new, old in zip(loaded, current if several else [current], strict=True)):
                changes[field.name] = loaded if several else loaded[0]
    return dataclasses.replace(value, **changes) if changes else value


def _fields(value: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(value) if field.init]


def _allowed(key: str, allowed: list[str]) -> str:
    return f"{did_you_mean(key, allowed)}allowed: {', '.join(allowed)}"


def _encode_field(field: dataclasses.Field[Any], value: Any, parts: dict[str, Part], path: str) -> Any:
    if value is None:
        return None
    if _LEARNED in field.metadata:
        return _claim(field.metadata[_LEARNED], value, parts)
    if _REGISTRY in field.metadata:
        if isinstance(value, (tuple, list)):
            return [encode_component(item, parts, f"{path}[{index}]") for index, item in enumerate(value)]
        return encode_component(value, parts, path)
    return _plain(value, path)


def _claim(stored: Learned, value: Any, parts: dict[str, Part]) -> str:
    """Store a learned part under the first unused name."""
    name, number = stored.folder, 1
    while name in parts:
        number += 1
        name = f"{stored.folder}-{number}"
    parts[name] = Part(value, stored.load)
    return name


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {value} cannot be written to JSON; use None or a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{path}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be written to a recipe; allowed are None, bools, numbers, text, "
        "paths, and lists, tuples and string-keyed dicts of these"
    )


def _decode_field(field: dataclasses.Field[Any], hint: Any, value: Any, path: str, source: Source) -> Any:
    if value is None:
        return None
    if _LEARNED in field.metadata:
        if not isinstance(value, str):
            raise ValueError(f"{path}: must be the name of a folder beside the recipe, or null, got {value!r}")
        return source.part(value, path)
    if _REGISTRY in field.metadata:
        registry = field.metadata[_REGISTRY]
        if isinstance(value, list):
            return tuple(decode(registry, item, f"{path}[{i}]", source) for i, item in enumerate(value))
        return decode(registry, value, path, source)
    return _typed(hint, value, path, source)


def _typed(hint: Any, value: Any, path: str, source: Source) -> Any:
    """Convert JSON data to the tuples and paths that the annotation states; JSON has neither."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    if isinstance(value, str) and Path in options and str not in options:
        return source.inside(value, path)
    if isinstance(value, list):
        for option in options:
            if (typing.get_origin(option) or option) in (tuple, collections.abc.Sequence):
                kinds = _element_kinds(option, len(value))
                return tuple(
                    _typed(kind, item, f"{path}[{i}]", source)
                    for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
                )
    return value


def _element_kinds(hint: Any, count: int) -> tuple[Any, ...]:
    """Return the annotations of `count` elements of a tuple or sequence; `Any` for those that it does not cover."""
    inner = typing.get_args(hint)
    if len(inner) > 1 and inner[1] is not ...:  # tuple[int, str]
        return (*inner, *[Any] * count)[:count]
    return (*inner[:1], Any)[:1] * count
