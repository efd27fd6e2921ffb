"""Swapping of a network in a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowaccel.hooks.families import networks
from flowaccel.hooks.pipeline import Pipeline


def swap(pipe: Pipeline, old: Any, new: Any) -> Callable[[], None]:
    """Replace the pipeline's network `old` by `new`; returns a function that undoes it.

    Model offloading, where it is enabled, is updated as well.
    """
    name = next(name for name, module in networks(pipe).items() if module is old)

    def put(module: Any) -> None:
        setattr(pipe, name, module)
        pipe.maybe_free_model_hooks()  # applies diffusers' offloading, if any, to the new components

    put(new)

    def undo() -> None:
        if getattr(pipe, name) is new:  # unless the user swapped it meanwhile
            put(old)

    return undo
