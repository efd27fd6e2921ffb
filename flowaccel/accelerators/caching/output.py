"""The scope `output`: the network is not called at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowaccel.accelerators.caching.history import Value
from flowaccel.accelerators.caching.runtime import Cache, Moment, Proceed, Rules, not_run, packer, tensor_of
from flowaccel.accelerators.caching.scopes import Output
from flowaccel.hooks import Call


class OutputCache(Cache):
    """Forecasts of the network's output."""

    def __init__(self, rules: Rules, scope: Output) -> None:
        super().__init__(rules)
        self._residual = scope.residual
        self._packed: Callable[[Tensor], Any] = lambda tensor: (tensor,)

    def run(self, proceed: Proceed, moment: Moment) -> Any:
        """Call the network for the rows that are computed."""
        history, call = moment.history(), moment.call
        moment.require(history)
        rows = moment.computing
        not_run(call.record, "", call.rows - len(rows))
        if len(rows) == call.rows:
            output = proceed()
            self._packed = packer(output)
            self._store(moment, tensor_of(output), None)
            return output
        forecast = self._shifted(moment, _only(history.predict(moment.place)), 1)
        if len(rows):
            found = self._computed(proceed, call, rows)
            self._store(moment, found, rows)
            forecast = forecast.index_copy(0, rows.to(found.device), found)
        return self._packed(forecast)

    def _computed(self, proceed: Proceed, call: Call, rows: Tensor) -> Tensor:
        if not call.gathers:
            found = tensor_of(proceed())
            return found[rows.to(found.device)]
        with call.only(rows):
            return tensor_of(proceed(call.take(rows)))

    def _store(self, moment: Moment, output: Tensor, rows: Tensor | None) -> None:
        feature = self._shifted(moment, output, -1, rows)
        moment.history().store((feature,), moment.place, rows)
        if moment.rules.gate.feedback == "feature":
            moment.give_back(_only(moment.history().newest))

    def _shifted(self, moment: Moment, output: Tensor, sign: int, rows: Tensor | None = None) -> Tensor:
        """The output with the input added or taken away, where residuals are cached."""
        sample = moment.call.sample
        if not self._residual or not isinstance(sample, Tensor) or sample.shape[1:] != output.shape[1:]:
            return output
        sample = sample if rows is None else sample[rows.to(sample.device)]
        return torch.add(output, sample, alpha=sign)


def _only(value: Value) -> Tensor:
    assert value[0] is not None
    return value[0]
