"""The last computed values of some rows, and what a predictor makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowaccel.caching.predictors import Predictor

Value = tuple[Tensor | None, ...]
"""What is cached of one call: tensors with a leading rows axis; None where there is none to cache."""


class History:
    """At most `predictor.anchors` computed values per row. Tensors handed in or out are never written to."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._values: list[Value] = []  # newest first
        self._times: list[tuple[float, ...]] = []  # per row, of its own values, newest first

    @property
    def empty(self) -> bool:
        """Whether nothing was computed yet."""
        return not self._values

    @property
    def newest(self) -> Value:
        """The last computed value of every row."""
        return self._values[0]

    def covers(self, row: int) -> bool:
        """Whether there is something to predict this row from."""
        return not self.empty and bool(self._times[row])

    @property
    def bytes(self) -> int:
        """Held by the values."""
        return sum(t.numel() * t.element_size() for value in self._values for t in value if t is not None)

    def store(self, value: Value, time: float, rows: Tensor | None = None) -> None:
        """Take computed values in.

        A value for the time of the newest one takes its place: samplers of higher order ask twice.

        Args:
            value: of all rows, or of `rows` alone.
            time: when.
            rows: (n,) indices, on the CPU, of the rows that were computed; None for all.

        Raises:
            ValueError: `rows` given for an empty history.
        """
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
        """Predict nothing from what these rows computed so far; they must be computed next. `rows` are indices."""
        for row in rows.tolist():
            self._times[row] = ()
        self._values = [  # a weight of 0 does not make up for what is not a number
            tuple(None if tensor is None else tensor.index_fill(0, rows.to(tensor.device), 0) for tensor in value)
            for value in self._values
        ]

    def _shift(self, rows: list[int]) -> None:
        """Make room for a newer value in these rows."""
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

    def predict(self, time: float) -> Value:
        """The values of all rows at a time."""
        now = torch.tensor([time], dtype=torch.float64)
        weights = {
            times: self._predictor.weights(torch.tensor([times], dtype=torch.float64), now)[0].tolist()
            for times in set(self._times)
            if times
        }
        weights[()] = []  # of rows that forgot
        if len(set(self._times)) == 1:
            return _weighted(self._values, weights[self._times[0]])
        padded = [weights[times] + [0.0] * (len(self._values) - len(times)) for times in self._times]
        table = torch.tensor(padded, dtype=torch.float64)
        return tuple(_mixture([value[place] for value in self._values], table) for place in range(len(self._values[0])))


class PartialHistory:
    """Some rows of a history, by the numbers that they have in a narrowed call; the others keep what they have.

    Args:
        history: of all rows.
        kept: the rows of the history that are meant, ascending.
        full: how many rows the history has, or is to have.
    """

    def __init__(self, history: History, kept: Sequence[int], full: int) -> None:
        self._history, self._kept, self._full = history, torch.tensor(kept), full

    @property
    def empty(self) -> bool:
        """Whether nothing was computed yet for any row of the history."""
        return self._history.empty

    @property
    def newest(self) -> Value:
        """The last computed value of every row."""
        return self._of_kept(self._history.newest)

    def covers(self, row: int) -> bool:
        """Whether there is something to predict this row from."""
        return self._history.covers(int(self._kept[row]))

    def store(self, value: Value, time: float, rows: Tensor | None = None) -> None:
        """Take computed values in, of all rows or of `rows` alone; see `History.store`."""
        places = self._kept if rows is None else self._kept[rows]
        if not self._history.empty:
            self._history.store(value, time, places)
            return
        self._history.store(tuple(_placed(tensor, places, self._full) for tensor in value), time)
        self._history.forget(torch.tensor(sorted(set(range(self._full)) - set(places.tolist())), dtype=torch.long))

    def predict(self, time: float) -> Value:
        """The values of all rows at a time."""
        return self._of_kept(self._history.predict(time))

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
    """The weighted sum with the same weights in all rows; a value of weight 1 alone comes back as it is."""
    used = [(value, weight) for value, weight in zip(values, weights, strict=False) if weight != 0.0]
    if not used:  # no row has anything to predict from
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
    """The weighted sum with weights (rows, values)."""
    total: Tensor | None = None
    for tensor, column in zip(tensors, weights.unbind(dim=1), strict=True):
        if tensor is None:
            return None
        exact = torch.promote_types(tensor.dtype, torch.float32)  # weights are seldom exact in half precision
        term = tensor * column.to(tensor.device, exact).view(-1, *[1] * (tensor.dim() - 1))
        total = term if total is None else total + term
    newest = tensors[0]
    return None if total is None or newest is None else total.to(newest.dtype)
