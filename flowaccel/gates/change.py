"""Gates that compare a signal with the same signal of an earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.gates.base import Gate, State, Step, check_threshold, relative_change, where


@dataclass(frozen=True)
class FirstBlock(Gate):
    """First Block Cache and DBCache: compute where the residual of the first blocks has moved.

    The first `blocks` blocks always run. Their residual is compared with that of the last computed step, as
    mean|new - old| / mean|old|.

    Args:
        threshold: compute from this relative change on.
        blocks: how many blocks run first, at least 1; in a shallow network at most as many as leave one to reuse.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "first_block"
    signal = "first_block"

    threshold: float = 0.08
    blocks: int = 1

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 1:
            raise ValueError(f"blocks must be a whole number of at least 1, got {self.blocks!r}")

    @property
    def probe(self) -> int:
        """`blocks`."""
        return self.blocks

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Relative change since the last computed step."""
        assert signal is not None
        return relative_change(signal, state["computed"]) / self.threshold, state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Keep the residual of the computed units."""
        assert signal is not None
        return {"computed": where(computed, signal, state.get("computed"))}


@dataclass(frozen=True)
class ModulatedInput(Gate):
    """TeaCache (arXiv 2411.19108): compute where the changes of the modulated input have added up.

    At every step the change since the step before, mean|new - old| / mean|old|, goes through a fitted polynomial and is
    added; a computed step starts from 0 again.

    Args:
        threshold: compute from this sum on.
        coefficients: of the polynomial, highest power first; fitted per model and number of steps by `flowaccel
            calibrate --method teacache`. The default takes the change as it is.
        fitted_range: changes seen by the fit; others are clipped to it, because such a polynomial means nothing
            outside. Negative values count as 0.

    Raises:
        ValueError: out of range, or no coefficients.
    """

    name: ClassVar[str] = "modulated_input"
    signal = "modulated_input"

    threshold: float = 0.25
    coefficients: Sequence[float] = (1.0, 0.0)
    fitted_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not self.coefficients:
            raise ValueError("coefficients must hold at least one number, the constant term")
        object.__setattr__(self, "coefficients", tuple(float(value) for value in self.coefficients))
        if self.fitted_range is not None and not 0 <= self.fitted_range[0] < self.fitted_range[1]:
            raise ValueError(f"fitted_range must be two rising numbers of at least 0, got {self.fitted_range!r}")

    def rescaled(self, change: Tensor) -> Tensor:
        """The polynomial of a relative change."""
        if self.fitted_range is not None:
            change = change.clamp(*self.fitted_range)
        value = torch.zeros_like(change)
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value.clamp(min=0)

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """The sum, this step's change included."""
        assert signal is not None
        total = state["total"] + self.rescaled(relative_change(signal, state["before"]))
        return total / self.threshold, state | {"total": total}

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Start from 0 where computed; keep the input of this step."""
        assert signal is not None
        total = state["total"] if "total" in state else torch.zeros(len(signal), device=signal.device)
        return {"before": signal, "total": where(computed, torch.zeros_like(total), total)}
