"""History of the computed values of rows, and predictions from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowaccel.caching.predictors import Predictor

Value = tuple[Tensor | None, ...]
"""Cached tensors of one call, with a leading rows axis; None for a tensor that is absent."""


class History:
    """Stores at most `predictor.anchors` computed values per row. Tensors passed in or returned are never modified."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._values: list[Value] = []  # newest first
        self._times: list[tuple[float, ...]] = []  # per row, of its own values, newest first

    @property
    def empty(self) -> bool:
        """Whether no value was stored yet."""
        return not self._values

    @property
    def newest(self) -> Value:
        """The last computed value of every row."""
        return self._values[0][:-1] if self._predictor.needs_signal else self._values[0]

    def covers(self, row: int) -> bool:
        """Return whether there is a value to predict this row from."""
        return not self.empty and bool(self._times[row])

    @property
    def bytes(self) -> int:
        """Size of the stored values."""
        return sum(t.numel() * t.element_size() for value in self._values for t in value if t is not None)

    def store(self, value: Value, time: float, rows: Tensor | None = None, signal: Tensor | None = None) -> None:
        """Store computed values.

        A value for the time of the newest one replaces it: samplers of higher order evaluate a time twice.

        Args:
            value: the values of all rows, or of `rows` only.
            time: the position of the values on the axis.
            rows: (n,) indices, on the CPU, of the rows that were computed; None for all.
            signal: what the gate read for the rows of `value`, for a predictor that needs it.

        Raises:
            ValueError: `rows` given for an empty history.
        """
        if self._predictor.needs_signal:
            value = (*value, signal)
        if self.empty:
            if rows is not None:
                raise ValueError("the first values must be those of all rows")
            self._times = [()] * next(tensor.shape[0] for tensor in value if tensor is not None)
            self._values = [value]
        computed = range(len(self._times)) if rows is None else rows.tolist()
        newer = [row for row in computed if self._times[row][:1] != (time,)]
        if any(self._times):
            self._shift(newer)
        self._values[0] = tuple(_replaced(old, new, rows) for old, new in zip(self._values[0], value, strict=True))
        for row in newer:
            self._times[row] = (time, *self._times[row])[: self._predictor.anchors]

    def forget(self, rows: Tensor) -> None:
        """Discard the values of these rows, which must be computed next; `rows` are indices."""
        for row in rows.tolist():
            self._times[row] = ()
        self._values = [  # 0 * NaN is NaN, so a weight of 0 is not enough
            tuple(None if tensor is None else tensor.index_fill(0, rows.to(tensor.device), 0) for tensor in value)
            for value in self._values
        ]

    def _shift(self, rows: list[int]) -> None:
        """Shift the values of these rows to make room for a newer one."""
        if not rows:
            return
        shifted = [self._values[0], *self._values][: self._predictor.anchors]
        if len(rows) < len(self._times):
            mask = torch.zeros(len(self._times), dtype=torch.bool)
            mask[rows] = True
            unshifted = [*self._values, self._values[-1]]
            shifted = [
                tuple(_mixed(mask, new, old) for new, old in zip(new_value, old_value, strict=True))
                for new_value, old_value in zip(shifted, unshifted, strict=False)
            ]
        self._values = shifted

    def predict(self, time: float, signal: Tensor | None = None) -> Value:
        """Predict the values of all rows at a time; `signal` is what the gate reads for every row at that time."""
        if signal is not None:
            table = self._weights_by_signal(time, signal)
            return tuple(_mixture(list(tensors), table) for tensors in zip(*self._values, strict=True))[:-1]
        now = torch.tensor([time], dtype=torch.float64)
        weights = {
            times: self._predictor.weights(torch.tensor([times], dtype=torch.float64), now)[0].tolist()
            for times in set(self._times)
            if times
        }
        weights[()] = []  # rows whose values were discarded
        if len(set(self._times)) == 1:
            return _weighted(self._values, weights[self._times[0]])
        padded = [weights[times] + [0.0] * (len(self._values) - len(times)) for times in self._times]
        table = torch.tensor(padded, dtype=torch.float64)
        return tuple(_mixture([value[place] for value in self._values], table) for place in range(len(self._values[0])))

    def _weights_by_signal(self, time: float, signal: Tensor) -> Tensor:
        """Return the weights (rows, values); rows with values of the same times are weighed together."""
        table = torch.zeros(len(self._times), len(self._values), dtype=torch.float64, device=signal.device)
        for times in set(self._times) - {()}:
            rows = torch.tensor([row for row, own in enumerate(self._times) if own == times], device=signal.device)
            known = [value[-1] for value in self._values[: len(times)]]
            signals = torch.stack([tensor[rows] for tensor in (signal, *known) if tensor is not None], dim=1)
            at = torch.tensor([times] * len(rows), dtype=torch.float64)
            now = torch.full((len(rows),), time, dtype=torch.float64)
            table[rows, : len(times)] = self._predictor.weights(at, now, signals).to(table)
        return table


class PartialHistory:
    """View of some rows of a history, indexed as in a narrowed call; the other rows keep their values.

    Args:
        history: the history of all rows.
        kept: indices of the rows in the history, ascending.
        full: number of rows of the history.
    """

    def __init__(self, history: History, kept: Sequence[int], full: int) -> None:
        self._history, self._kept, self._full = history, torch.tensor(kept), full

    @property
    def empty(self) -> bool:
        """Whether no value was stored yet for any row of the history."""
        return self._history.empty

    @property
    def newest(self) -> Value:
        """The last computed value of every row."""
        return self._of_kept(self._history.newest)

    def covers(self, row: int) -> bool:
        """Return whether there is a value to predict this row from."""
        return self._history.covers(int(self._kept[row]))

    def store(self, value: Value, time: float, rows: Tensor | None = None, signal: Tensor | None = None) -> None:
        """Store computed values of all rows or of `rows` only; see `History.store`."""
        places = self._kept if rows is None else self._kept[rows]
        if not self._history.empty:
            self._history.store(value, time, places, signal)
            return
        *whole, signal = (_placed(tensor, places, self._full) for tensor in (*value, signal))
        self._history.store(tuple(whole), time, signal=signal)
        self._history.forget(torch.tensor(sorted(set(range(self._full)) - set(places.tolist())), dtype=torch.long))

    def predict(self, time: float, signal: Tensor | None = None) -> Value:
        """Predict the values of all rows at a time; see `History.predict`."""
        return self._of_kept(self._history.predict(time, _placed(signal, self._kept, self._full)))

    def _of_kept(self, value: Value) -> Value:
        return tuple(None if tensor is None else tensor[self._kept.to(tensor.device)] for tensor in value)


def _placed(tensor: Tensor | None, places: Tensor, full: int) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.new_zeros(full, *tensor.shape[1:]).index_copy(0, places.to(tensor.device), tensor)


def _replaced(old: Tensor | None, new: Tensor | None, rows: Tensor | None) -> Tensor | None:
    if new is None or rows is None:
        return new
    assert old is not None
    return old.index_copy(0, rows.to(old.device), new.to(old.dtype))


def _mixed(rows: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None or new is old:
        return new
    return torch.where(rows.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)


def _weighted(values: list[Value], weights: list[float]) -> Value:
    """Return the weighted sum with the same weights in all rows; a single value of weight 1 is returned unchanged."""
    used = [(value, weight) for value, weight in zip(values, weights, strict=False) if weight != 0.0]
    if not used:  # no row has a value to predict from
        return tuple(None if tensor is None else torch.zeros_like(tensor) for tensor in values[0])
    found: list[Tensor | None] = []
    for place, first in enumerate(used[0][0]):
        total = first if first is None or used[0][1] == 1.0 else first * used[0][1]
        for value, weight in used[1:]:
            tensor = value[place]
            total = total if total is None or tensor is None else torch.add(total, tensor, alpha=weight)
        found.append(total)
    return tuple(found)


def _mixture(tensors: list[Tensor | None], weights: Tensor) -> Tensor | None:
    """Return the weighted sum with weights (rows, values)."""
    total: Tensor | None = None
    for tensor, column in zip(tensors, weights.unbind(dim=1), strict=True):
        if tensor is None:
            return None
        exact = torch.promote_types(tensor.dtype, torch.float32)  # weights are seldom exact in half precision
        term = tensor * column.to(tensor.device, exact).view(-1, *[1] * (tensor.dim() - 1))
        total = term if total is None else total + term
    newest = tensors[0]
    return None if total is None or newest is None else total.to(newest.dtype)
