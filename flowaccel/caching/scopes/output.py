"""Scope `output`: the network is not called at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowaccel.caching.history import Value
from flowaccel.caching.runtime import Cache, CachedCall, CallNext, not_run
from flowaccel.caching.scopes.base import Output
from flowaccel.hooks import Call, packer, require_rows, tensors_of

WHAT = "a cache of outputs"


class OutputCache(Cache):
    """Cache of the network's output."""

    def __init__(self, scope: Output, **parts: Any) -> None:
        super().__init__(**parts)
        self._residual = scope.residual
        self._packed: Callable[[tuple[Tensor, ...]], Any] = tuple

    def run(self, call_next: CallNext, cached: CachedCall) -> Any:
        """Call the network for the rows that are computed."""
        call = cached.call
        cached.require(cached.history())
        rows = cached.computing
        not_run(call.record, "", call.rows - len(rows))
        if len(rows) == call.rows:
            output = call_next()
            found = require_rows(call, output, WHAT)
            self._packed = packer(output)
            self._store(cached, found, None)
            return output
        forecast = self._shifted(cached, _all(cached.predict()), 1)
        if len(rows):
            found = self._computed(call_next, call, rows)
            self._store(cached, found, rows)
            forecast = tuple(
                expected.index_copy(0, rows.to(new.device), new) for expected, new in zip(forecast, found, strict=True)
            )
        return self._packed(forecast)

    def _computed(self, call_next: CallNext, call: Call, rows: Tensor) -> tuple[Tensor, ...]:
        if not call.gathers:
            return tuple(found[rows.to(found.device)] for found in require_rows(call, call_next(), WHAT))
        with call.only(rows):
            return tensors_of(call_next(call.take(rows)))

    def _store(self, cached: CachedCall, outputs: tuple[Tensor, ...], rows: Tensor | None) -> None:
        cached.store(self._shifted(cached, outputs, -1, rows), rows=rows)
        if cached.cache.gate.feedback == "feature":
            cached.give_back(_all(cached.history().newest)[0])

    def _shifted(
        self, cached: CachedCall, outputs: tuple[Tensor, ...], sign: int, rows: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the outputs with the input added to or subtracted from the first, if residuals are cached."""
        sample, output = cached.call.sample, outputs[0]
        if not self._residual or not isinstance(sample, Tensor) or sample.shape[1:] != output.shape[1:]:
            return outputs
        sample = sample if rows is None else sample[rows.to(sample.device)]
        return (torch.add(output, sample, alpha=sign), *outputs[1:])


def _all(value: Value) -> tuple[Tensor, ...]:
    """Return every output; the scope `output` caches no None."""
    return tuple(tensor for tensor in value if tensor is not None)
