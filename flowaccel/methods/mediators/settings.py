"""Settings of mediator attention, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from flowaccel.checks import is_whole
from flowaccel.models.settings import settings_from


@dataclass(frozen=True, kw_only=True)
class MediatorSettings:
    """Settings of mediator attention (Attention Mediators, arXiv 2408.05710).

    Raises:
        ValueError: a value out of its range.
    """

    counts: tuple[int, ...] | None = (16,)
    """Numbers of mediators that one network can run with, squares. None is full attention with the same biases and
    convolution, the fair baseline of mediators."""
    layers: tuple[int, ...] | None = None
    """Blocks whose attention goes through mediators, by index from 0; None for all."""
    per_layer: bool = False
    """Whether `counts` holds one number for each layer with mediators instead, in the order of the blocks: the only
    one that it can run with."""
    use_bias: bool = True
    """Whether position biases are learned."""
    use_dwc: bool = True
    """Whether a depthwise convolution of the values is added."""

    def __post_init__(self) -> None:
        for name in ("counts", "layers"):
            given = getattr(self, name)
            if given is None:
                continue
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise ValueError(f"{name} must be a sequence of whole numbers, got {given!r}")
            lowest = 1 if name == "counts" else 0
            if any(not is_whole(value, lowest) for value in given):
                raise ValueError(f"{name} must hold whole numbers of at least {lowest}, got {list(given)}")
            ordered = tuple(sorted(set(given)))
            if self.per_layer and name == "layers" and tuple(given) != ordered:
                raise ValueError(f"layers must rise where per_layer gives each its number, got {list(given)}")
            object.__setattr__(self, name, tuple(given) if self.per_layer else ordered)
        if self.per_layer and self.counts is None:
            raise ValueError("per_layer is for numbers of mediators, got counts=None; leave it out")

    def blocks(self, count: int) -> dict[int, tuple[int, ...] | None]:
        """Return which of `count` blocks have mediators, and the numbers that each can run with; None as in `counts`.

        Raises:
            ValueError: an index that is not there; with `per_layer`, not as many numbers as layers.
        """
        layers = tuple(range(count)) if self.layers is None else self.layers
        if layers and layers[-1] >= count:
            raise ValueError(f"layers must be below the number of blocks, {count}, got {list(layers)}")
        if not self.per_layer or self.counts is None:
            return dict.fromkeys(layers, self.counts)
        if len(self.counts) != len(layers):
            raise ValueError(
                f"counts must hold one number for each of {len(layers)} layers, as per_layer says, got "
                f"{list(self.counts)}"
            )
        return {layer: (number,) for layer, number in zip(layers, self.counts, strict=True)}

    @classmethod
    def of(cls, given: Self | dict[str, Any] | None) -> Self:
        """Create the settings from a configuration.

        Raises:
            ValueError: an entry that is not known.
        """
        return settings_from(cls, given, "mediator_config")
