"""Multiply-adds of a network and its modules, counted without computing anything."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from flowaccel.compat import AROUND_FORWARD
from flowaccel.hooks.families import unwrapped


def shapes_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call with every tensor replaced by one on the meta device."""
    shapes: dict[str, Any] = tree_map(_shape, arguments)
    return shapes


def macs_by_module(network: nn.Module, shapes: dict[str, Any]) -> dict[str, int] | None:
    """Count the multiply-adds of one call in matrix products, convolutions and attention, for every module by its name.

    The name "" is the network. Returns None if they cannot be counted: compiled modules, or a forward that reads
    values.

    Args:
        network: the network; it is neither called nor changed, and nothing is computed.
        shapes: from `shapes_of`.
    """
    network = unwrapped(network)
    if is_compiled(network):
        return None
    counter = FlopCounterMode(display=False)
    try:
        replica = _replica(network)
        with counter, torch.no_grad():
            replica(**shapes)
    except Exception:  # custom forwards may raise anything on meta tensors
        return None
    root = type(network).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }


def is_compiled(network: nn.Module) -> bool:
    """Return whether a network, or any module of it, is compiled."""
    inner = unwrapped(network)
    compiled = any(module.__dict__.get("_compiled_call_impl") is not None for module in inner.modules())
    return compiled or inner is not network


def _replica(network: nn.Module) -> nn.Module:
    """Return a copy of a network on the meta device, with everything that its modules refer to.

    What a forward stores on the way (a table of positions, a cache) is stored in the copy. Hooks and wrappers of the
    network's modules, such as an offloader's, do not see the copy's calls.
    """
    clones = {module: object.__new__(type(module)) for module in network.modules()}
    memo: dict[int, Any] = {id(module): clone for module, clone in clones.items()}
    with _WithoutData():
        for module, clone in clones.items():
            unwatched = {name: value for name, value in nn.Module().__dict__.items() if "hook" in name}
            left_out = (*unwatched, *AROUND_FORWARD)
            state = {name: value for name, value in module.__dict__.items() if name not in left_out}
            generators = [value for value in state.values() if isinstance(value, torch.Generator)]
            memo |= {id(one): torch.Generator(one.device) for one in generators}  # their states are tensors with data
            clone.__dict__.update(copy.deepcopy(state, memo) | unwatched)
            forward = inspect.unwrap(module.forward, stop=inspect.ismethod)
            if getattr(forward, "__self__", None) is module:  # a forward set on the instance, or that of the class
                clone.forward = forward.__func__.__get__(clone)
    return clones[network]


class _WithoutData(TorchFunctionMode):
    """Mode in which copied tensors are on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.__deepcopy__, Tensor.clone):
            return _shape(args[0])
        return function(*args, **(kwargs or {}))


def _shape(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
