"""Scope `module`: the outputs of attention and feed-forward modules are predicted one by one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowaccel.caching.history import Value
from flowaccel.caching.runtime import Cache, CachedCall, CallNext, not_run
from flowaccel.caching.scopes.base import Module
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import ATTENTION, FEED_FORWARD, Call, Session, in_rows

logger: logging.Logger = logging.getLogger(__name__)


class ModuleCache(Cache):
    """Cache of the outputs of modules within the blocks.

    If only some rows are computed, the modules run for all rows, and the others take their prediction.
    """

    def __init__(self, scope: Module, **parts: Any) -> None:
        super().__init__(**parts)
        self._kinds = (ATTENTION if scope.attention else ()) + (FEED_FORWARD if scope.feed_forward else ())
        self._cached: CachedCall | None = None
        self._calls: Counter[str] = Counter()  # number of calls per module in this network call
        self._said = False
        self._bare: dict[str, bool] = {}  # by path, whether the module returns a tensor rather than a tuple of them

    def attach(self, session: Session) -> Callable[[], None]:
        """Wrap network calls and modules."""
        removers = [session.on_module(self._intercept_module, self._kinds), super().attach(session)]
        return lambda: [remove() for remove in removers].clear()

    def run(self, call_next: CallNext, cached: CachedCall) -> Any:
        """Call the network with wrapped modules."""
        outer, self._cached = self._cached, cached
        self._calls.clear()
        try:
            output = call_next()
        finally:
            self._cached = outer
        if not self._said:
            self._said = True
            anchors = cached.cache.predictor.anchors
            most = cached.state.bytes * anchors / 1e6
            logger.info("scope 'module' will hold up to %.0f MB for each branch of a batch like this one", most)
        return output

    def _intercept_module(self, call_next: CallNext, call: Call, path: str) -> Any:
        if self._cached is None:
            return call_next()
        self._calls[path] += 1
        key = f"{path}#{self._calls[path]}"  # CogView4 calls one feed-forward for the image and for the text
        history = self._cached.history(key)
        self._cached.require(history)
        rows = self._cached.computing
        if len(rows) == call.rows or history.empty:
            output = call_next()
            self._bare[key] = not isinstance(output, tuple)
            self._cached.store(self._as_value(output, call, path), key)
            return output
        forecast = self._cached.predict(key)
        if not len(rows):
            if self._calls[path] == 1:
                not_run(call.record, path, call.rows)
            return _like(self._bare[key], forecast)
        output = self._as_value(call_next(), call, path)
        chosen: Value = tuple(None if tensor is None else tensor[rows.to(tensor.device)] for tensor in output)
        self._cached.store(chosen, key, rows)
        return _like(self._bare[key], tuple(map(_merged, forecast, chosen, [rows] * len(chosen))))

    def _as_value(self, output: Any, call: Call, path: str) -> Value:
        """Return a module's output as a value with the rows of the call.

        Raises:
            UnsupportedModelError: no tensors, or tensors without a rows axis although rows decide.
        """
        value = output if isinstance(output, tuple) else (output,)
        if not all(isinstance(tensor, Tensor | None) for tensor in value):
            raise UnsupportedModelError(
                f"{path} of the {type(call.module).__name__} returns something else than tensors, which the scope "
                "'module' cannot stand in for; use scope 'output'"
            )
        found = tuple(None if tensor is None else in_rows(tensor, call.rows) for tensor in value)
        odd = [len(tensor) for tensor in found if tensor is not None and len(tensor) != call.rows]
        alike = self.unit == "batch" or self.gate.static
        if odd and (min(odd) < call.rows or not alike):
            raise UnsupportedModelError(
                f"{path} of the {type(call.module).__name__} returns {odd[0]} rows in a call of {call.rows}, so images "
                f"cannot be told apart in it; let the batch decide (decide='batch'), or use scope 'output'"
            )
        return found


def _like(bare: bool, value: Value) -> Any:
    return value[0] if bare else value


def _merged(forecast: Tensor | None, chosen: Tensor | None, rows: Tensor) -> Tensor | None:
    if forecast is None or chosen is None:
        return chosen
    return torch.index_copy(forecast, 0, rows.to(forecast.device), chosen)
