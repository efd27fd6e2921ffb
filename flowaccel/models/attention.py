"""Transfer of the pipeline's attention backend to the networks of accelerators."""

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
"""Processors without a selectable backend: each computes in its own way, and none has weights."""


def attend_like(network: nn.Module, base: nn.Module) -> Callable[[], None]:
    """Set the attention backends of a network to those of the modules of the same name in `base`.

    Modules for which neither has a backend set are unchanged. On failure nothing is changed. Returns a function that
    restores the previous processors.

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
    if hasattr(layer, "try_backend"):  # layers that may support no backend
        layer.try_backend(backend)
    undo.callback(setattr, layer.processor, "_attention_backend", layer.processor._attention_backend)
    layer.processor._attention_backend = backend
