"""Outputs of networks: extracting their tensors, and building outputs of the same type."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks.calls import Call, in_one


def tensors_of(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a network's return value: a tensor, a tuple, a list or an output class of diffusers.

    Lists in it that hold a tensor for every row are put into one tensor, see `in_one`.
    """
    return tuple(value for value in map(in_one, _values(output)) if isinstance(value, Tensor))


def require_rows(call: Call, output: Any, what: str) -> tuple[Tensor, ...]:
    """Return the tensors (rows, ...) of a network's return value; `what` requires that it holds nothing else.

    Raises:
        UnsupportedModelError: the return value holds something else, which would be lost.
    """
    values = [in_one(value) for value in _values(output) if value is not None]
    if not values or not all(isinstance(value, Tensor) and value.shape[:1] == (call.rows,) for value in values):
        kinds = ", ".join(f"{type(value).__name__}{list(getattr(value, 'shape', []))}" for value in values)
        raise UnsupportedModelError(
            f"{type(call.module).__name__} returned {kinds or 'nothing'} for {call.rows} rows, and {what} stands in "
            "for tensors with these rows alone; leave it off for this pipeline"
        )
    return tuple(values)


def packer(output: Any) -> Callable[[tuple[Tensor, ...]], Any]:
    """Return a function that wraps tensors (rows, ...), as many as `output` holds, in the type of `output`."""
    given = _values(output)
    names = list(output) if isinstance(output, dict) else []
    kind: Any = type(output)
    plain = isinstance(output, Tensor)

    def pack(tensors: tuple[Tensor, ...]) -> Any:
        left = iter(tensors)
        values = [None if value is None else _in_form(value, next(left)) for value in given]
        if plain:
            return values[0]
        return kind(**dict(zip(names, values, strict=True))) if names else kind(values)

    return pack


def _in_form(given: Any, tensor: Tensor) -> Any:
    """Return the tensor, or a list of its rows in the sizes of those in the list `given`, again and again."""
    if isinstance(given, Tensor):
        return tensor
    shapes = itertools.cycle([row.shape for row in given])
    return [row[tuple(slice(size) for size in shape)] for row, shape in zip(tensor, shapes, strict=False)]


def _values(output: Any) -> list[Any]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)
