"""A second module tree that shares its parameters with the first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

from flowaccel.compat import AROUND_FORWARD
from flowaccel.errors import RecipeConflictError

Module = TypeVar("Module", bound=nn.Module)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def clone_sharing_parameters(module: Module, *, hooks: bool = True) -> Module:
    """Return a module tree like `module` that shares its parameters and buffers.

    Args:
        module: the module, which is not changed.
        hooks: whether to copy its forward hooks.

    Raises:
        RecipeConflictError: a submodule is compiled, or hooks of submodules move its weights.
    """
    kept = {name: _copied(value) for name, value in module.__dict__.items() if name not in AROUND_FORWARD}
    if kept.get("_compiled_call_impl") is not None:
        raise RecipeConflictError(f"the {type(module).__name__} is compiled; accelerate first, then compile")
    hooked = bool(getattr(module.__dict__.get("_diffusers_hook"), "hooks", None))  # pipelines leave empty ones
    if hooked or any(value.is_meta for value in module.parameters(recurse=False)):
        raise RecipeConflictError(
            f"the weights of a {type(module).__name__} are offloaded piece by piece, or it is cached by diffusers; "
            "accelerate first, then switch offloading on"
        )
    if not hooks:
        kept |= {name: OrderedDict() for name in _HOOKS if name in kept}
    kept["_modules"] = {
        name: None if child is None else clone_sharing_parameters(child, hooks=hooks)
        for name, child in module._modules.items()
    }
    clone = object.__new__(type(module))
    clone.__dict__.update(kept)
    return clone


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value
