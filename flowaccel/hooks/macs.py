"""Multiply-adds of a network and its modules, counted without computing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from flowaccel.hooks.families import unwrapped


def shapes_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with tensors that have shapes and no data."""
    shapes: dict[str, Any] = tree_map(_shape, arguments)
    return shapes


def macs_by_module(network: nn.Module, shapes: dict[str, Any]) -> dict[str, int] | None:
    """Multiply-adds in matrix products, convolutions and attention of one call, of every module by its name in the
    network; "" is the network. None where they cannot be counted: compiled modules, or a forward that looks at values.

    Args:
        network: the network; it is not changed, and nothing is computed.
        shapes: from `shapes_of`.
    """
    network = unwrapped(network)
    if is_compiled(network):
        return None
    tensors = {name: _shape(value) for name, value in (*network.named_parameters(), *network.named_buffers())}
    counter = FlopCounterMode(display=False)
    try:
        with _without_hooks(network), counter, torch.no_grad():
            torch.func.functional_call(network, tensors, kwargs=shapes)
    except Exception:  # whatever a forward of somebody else's does with tensors that hold nothing
        return None
    root = type(network).__name__
    return {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }


def is_compiled(network: nn.Module) -> bool:
    """Whether a network, or any module of it, is compiled."""
    inner = unwrapped(network)
    compiled = any(module.__dict__.get("_compiled_call_impl") is not None for module in inner.modules())
    return compiled or inner is not network


@contextmanager
def _without_hooks(network: nn.Module) -> Iterator[None]:
    """Nobody who watches the network's modules sees a call that computes nothing."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = [(module, name, getattr(module, name)) for module in network.modules() for name in names]
    try:
        for module, name, _ in before:
            setattr(module, name, OrderedDict())
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)


def _shape(value: Any) -> Any:
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
