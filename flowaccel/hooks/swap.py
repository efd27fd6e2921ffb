"""Another network in a pipeline's place for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowaccel.hooks.families import networks


def exchange(pipe: Any, old: Any, new: Any) -> Callable[[], None]:
    """Put `new` where the pipeline has the network `old`; returns what undoes it. Offloading of whole models, where it
    is switched on, follows.
    """
    name = next(name for name, module in networks(pipe).items() if module is old)

    def put(module: Any) -> None:
        setattr(pipe, name, module)
        pipe.maybe_free_model_hooks()  # puts diffusers' offloading on what is there now; without any it does nothing

    put(new)

    def undo() -> None:
        if getattr(pipe, name) is new:  # and not what the user put there meanwhile
            put(old)

    return undo
