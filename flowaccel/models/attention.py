"""The pipeline's choice of an attention backend, for the networks that accelerators bring along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import nn

_NAMELESS = (AttnProcessor2_0, JointAttnProcessor2_0, XFormersAttnProcessor, XFormersJointAttnProcessor)
"""Processors that have no backend to choose: each computes by its own, and none has weights."""


def attend_like(network: nn.Module, base: nn.Module) -> Callable[[], None]:
    """Let the attention of a network compute by what was chosen for that of the same name in `base`; what was chosen
    for neither is left. If that fails, nothing is changed. Undone by putting back what was there.

    Raises:
        ValueError: a backend that cannot add the position biases of a network with mediators.
    """
    chosen = {path: module.processor for path, module in base.named_modules() if hasattr(module, "processor")}
    with ExitStack() as undo:
        for path, module in network.named_modules():
            theirs, ours = chosen.get(path), getattr(module, "processor", None)
            if type(theirs) in _NAMELESS and type(ours) in _NAMELESS:
                undo.callback(setattr, module, "processor", ours)
                module.processor = theirs
            elif theirs is not ours and hasattr(ours, "_attention_backend"):
                _choose(module, getattr(theirs, "_attention_backend", None), undo)
        return undo.pop_all().close


def _choose(layer: Any, backend: Any, undo: ExitStack) -> None:
    if backend is None:
        return
    if hasattr(layer, "try_backend"):  # of layers that no backend may be able to compute
        layer.try_backend(backend)
    undo.callback(setattr, layer.processor, "_attention_backend", layer.processor._attention_backend)
    layer.processor._attention_backend = backend
