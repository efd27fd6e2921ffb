"""Linear layers that can compute with a part of their weights, and the cache of those parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

Part = tuple[Tensor, Tensor | None]
"""Weight and bias."""


class SlicedLinear(nn.Linear):
    """Linear layer that computes with a part of its rows and columns (`part`), or masks them (for training).

    Every plain `nn.Linear` can become one (`SlicedLinear.take_over`): parameters, hooks and names stay.
    """

    part: Part | Callable[[], Part] | None = None
    """Part that replaces weight and bias, or a function that cuts it when needed; None computes the whole."""
    row_mask: Tensor | None = None
    """(B, out_features), multiplies the output."""
    column_mask: Tensor | None = None
    """(B, columns), multiplies the input."""

    @staticmethod
    def take_over(linear: nn.Linear) -> SlicedLinear:
        """Convert `linear` to a `SlicedLinear` in place, unless it is one."""
        if not isinstance(linear, SlicedLinear):
            linear.__class__ = SlicedLinear
        assert isinstance(linear, SlicedLinear)
        return linear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer: (B, ..., columns) -> (B, ..., rows)."""
        if self.column_mask is not None:
            hidden_states = hidden_states * spread(self.column_mask, hidden_states)
        output = nn.functional.linear(hidden_states, *self.present)
        return output if self.row_mask is None else output * spread(self.row_mask, output)

    @property
    def whole(self) -> Part:
        """All rows and columns, as a part, for use without gradients."""
        # A product is folded, and so rounded, by whether its weight requires a gradient, even where none is made.
        weight = self.weight.detach().requires_grad_(self.weight.requires_grad)
        return weight, None if self.bias is None else self.bias.detach()

    @property
    def present(self) -> Part:
        """Weight and bias to compute with, in the dtype that the whole weights have now.

        With layer-wise casting a part may have been cut while the weights were stored in another dtype.
        """
        if self.part is None:
            return self.weight, self.bias
        weight, bias = self.part if isinstance(self.part, tuple) else self.part()
        return weight.to(self.weight.dtype), None if bias is None else bias.to(self.weight.dtype)

    def clear(self) -> None:
        """Restore the whole layer."""
        for name in ("part", "row_mask", "column_mask"):  # three assignments to a module are ten times as slow
            self.__dict__.pop(name, None)

    def cut(self, rows: Tensor | None, columns: Tensor | None) -> Part:
        """Return contiguous copies of some rows and columns of weight and bias; None takes all."""
        with torch.no_grad():
            weight, bias = self.weight.detach(), None if self.bias is None else self.bias.detach()
            if rows is not None:
                rows = rows.to(weight.device)
                weight, bias = weight.index_select(0, rows), None if bias is None else bias.index_select(0, rows)
            if columns is not None:
                weight = weight.index_select(1, columns.to(weight.device))
            return weight.contiguous(), bias


def spread(mask: Tensor, like: Tensor) -> Tensor:
    """Repeat (B, C) to multiply `like` (B * n, ..., C): video networks fold frames or places into the rows."""
    if len(like) != len(mask):
        mask = mask.repeat_interleave(len(like) // len(mask), dim=0)
    return mask.reshape(len(mask), *[1] * (like.dim() - 2), mask.shape[-1]).to(like.dtype)


class SliceCache:
    """Cache of parts of bounded size; what does not fit any more is cut again each time.

    Args:
        limit: bytes that may be kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        """Bytes that are kept."""
        self.passing = 0
        """Number of parts that were cut and not kept, because the bound was reached."""
        self._parts: dict[Hashable, tuple[Hashable, Part]] = {}

    def get(self, key: Hashable, weight: Tensor, cut: Callable[[], Part]) -> Part:
        """Return the part under `key`, cut from `weight` if there is none, or if the weight moved or changed.

        What was written through `weight.data` cannot be seen: `clear` then.
        """
        known, stamp = self._parts.get(key), _stamp(weight)
        if known is not None and known[0] == stamp:
            return known[1]
        if known is not None:
            self._drop(key)
        part = cut()
        size = _bytes(part)
        if self.held + size > self.limit:
            self.passing += 1
            return part
        self._parts[key] = (stamp, part)
        self.held += size
        return part

    def keep_only(self, keys: set[Hashable]) -> None:
        """Drop all parts but those with these keys."""
        for key in [key for key in self._parts if key not in keys]:
            self._drop(key)

    def bound(self, limit: int) -> None:
        """Set another limit; if more is held, all parts are dropped."""
        self.limit = limit
        if self.held > limit:
            self.clear()

    def clear(self) -> None:
        """Drop all parts."""
        self._parts.clear()
        self.held = self.passing = 0

    def _drop(self, key: Hashable) -> None:
        _, part = self._parts.pop(key)
        self.held -= _bytes(part)


def _stamp(weight: Tensor) -> Hashable:
    version = 0 if weight.is_inference() else weight._version
    return weight.device, weight.dtype, weight.data_ptr(), version


def _bytes(part: Part) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in part if tensor is not None)
