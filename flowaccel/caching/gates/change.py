"""Gates that compare a signal with the same signal of an earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowaccel.caching.gates.base import Gate, Signal, State, Step, check_threshold, relative_change, where
from flowaccel.caching.gates.teacache_fits import PUBLISHED, UNUSABLE
from flowaccel.checks import check_whole


@dataclass(frozen=True)
class FirstBlock(Gate):
    """First Block Cache and DBCache: compute where the residual of the first blocks has moved.

    The first `blocks` blocks always run. Their residual is compared with that of the last computed step, as
    mean(abs(new - old)) / mean(abs(old)).

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
        check_whole(self, blocks=1)

    @property
    def probe(self) -> int:
        """Number of blocks that run before the gate decides, `blocks`."""
        return self.blocks

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the relative change since the last computed step, over the threshold."""
        assert signal is not None
        return relative_change(signal, state["computed"]) / self.threshold, state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Store the residual of the computed units."""
        assert signal is not None
        return {"computed": where(computed, signal, state.get("computed"))}


@dataclass(frozen=True)
class ModulatedInput(Gate):
    """TeaCache (arXiv 2411.19108): compute where the changes of the modulated input have added up.

    At every step the change since the step before, mean(abs(new - old)) / mean(abs(old)), goes through a fitted
    polynomial and is added; a computed step starts from 0 again. Some published polynomials were fitted to the changes
    of the time embedding or of its projection, which are then read instead.

    Args:
        threshold: compute from this sum on.
        coefficients: polynomial coefficients, highest power first; fitted per model and number of steps by `flowaccel
            calibrate --method teacache`. Or the name of a published fit, such as `flux` (see `PUBLISHED`), for
            that checkpoint only. The default takes the change as it is.
        fitted_range: changes seen by the fit; others are clipped to it, because the polynomial is not valid
            outside. None takes that of a published fit, if it is one.
        bounded: clip changes to the range and count negative values of the polynomial as 0. False takes the polynomial
            as it is, like the published code, so that sums can fall; then the range has no effect.

    Raises:
        ValueError: out of range, no coefficients, or a published fit that cannot be used.
    """

    name: ClassVar[str] = "modulated_input"

    threshold: float = 0.25
    coefficients: str | Sequence[float] = (1.0, 0.0)
    fitted_range: tuple[float, float] | None = None
    bounded: bool = True

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if isinstance(self.coefficients, str):
            if self.coefficients in UNUSABLE:
                raise ValueError(
                    f"coefficients {self.coefficients!r} cannot be used: {UNUSABLE[self.coefficients]}; fit your own "
                    "with flowaccel calibrate --method teacache"
                )
            if self.coefficients not in PUBLISHED:
                raise ValueError(
                    f"coefficients must be numbers or one of {', '.join(PUBLISHED)}, got {self.coefficients!r}"
                )
        elif not self.coefficients:
            raise ValueError("coefficients must hold at least one number, the constant term")
        else:
            object.__setattr__(self, "coefficients", tuple(float(value) for value in self.coefficients))
        if self.fitted_range is not None and not 0 <= self.fitted_range[0] < self.fitted_range[1]:
            raise ValueError(f"fitted_range must be two rising numbers of at least 0, got {self.fitted_range!r}")

    @property
    def signal(self) -> Signal:  # type: ignore[override]
        """Signal that the polynomial was fitted to."""
        return PUBLISHED[self.coefficients].signal if isinstance(self.coefficients, str) else "modulated_input"

    def rescaled(self, change: Tensor) -> Tensor:
        """Return the polynomial of a relative change."""
        if isinstance(self.coefficients, str):
            fit = PUBLISHED[self.coefficients]
            coefficients: Sequence[float] = fit.coefficients
            fitted_range: tuple[float, float] | None = self.fitted_range or fit.changes
        else:
            coefficients, fitted_range = self.coefficients, self.fitted_range
        if self.bounded and fitted_range is not None:
            change = change.clamp(*fitted_range)
        value = torch.zeros_like(change)
        for coefficient in coefficients:
            value = value * change + coefficient
        return value.clamp(min=0) if self.bounded else value

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the sum with this step's change, over the threshold; it can be negative if not `bounded`."""
        assert signal is not None
        total = state["total"] + self.rescaled(relative_change(signal, state["before"]))
        return total / self.threshold, state | {"total": total}

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Reset the sum of the computed units to 0, and store the input of this step."""
        assert signal is not None
        total = state["total"] if "total" in state else torch.zeros(len(signal), device=signal.device)
        return {"before": signal, "total": where(computed, torch.zeros_like(total), total)}
