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


COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "flux-kontext": (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "cosmos": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "wan2.1-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": (-5784.54975, 5449.50912, -1811.16592, 256.271784, -13.0225240),
    "wan2.1-i2v-480p": (-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-720p": (-114.363465, 65.265245, -18.8222071, 4.91518089, -0.234126827),
}
"""Published by TeaCache (Apache-2.0) for these checkpoints, with thresholds of 0.25 to 0.8 for FLUX, 0.08 to 0.26 for
Wan."""


@dataclass(frozen=True)
class ModulatedInput(Gate):
    """TeaCache (arXiv 2411.19108): compute where the changes of the modulated input have added up.

    At every step the change since the step before, mean(abs(new - old)) / mean(abs(old)), goes through a fitted
    polynomial and is added; a computed step starts from 0 again.

    Args:
        threshold: compute from this sum on.
        coefficients: of the polynomial, highest power first; fitted per model and number of steps by `flowaccel
            calibrate --method teacache`. Or the name of a published fit, such as `flux` (see `COEFFICIENTS`), for that
            very checkpoint. The default takes the change as it is.
        fitted_range: changes seen by the fit; others are clipped to it, because such a polynomial means nothing
            outside. Negative values count as 0.

    Raises:
        ValueError: out of range, or no coefficients.
    """

    name: ClassVar[str] = "modulated_input"
    signal = "modulated_input"

    threshold: float = 0.25
    coefficients: str | Sequence[float] = (1.0, 0.0)
    fitted_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if isinstance(self.coefficients, str):
            if self.coefficients not in COEFFICIENTS:
                raise ValueError(
                    f"coefficients must be numbers or one of {', '.join(COEFFICIENTS)}, got {self.coefficients!r}"
                )
        elif not self.coefficients:
            raise ValueError("coefficients must hold at least one number, the constant term")
        else:
            object.__setattr__(self, "coefficients", tuple(float(value) for value in self.coefficients))
        if self.fitted_range is not None and not 0 <= self.fitted_range[0] < self.fitted_range[1]:
            raise ValueError(f"fitted_range must be two rising numbers of at least 0, got {self.fitted_range!r}")

    @property
    def _powers(self) -> Sequence[float]:
        return COEFFICIENTS[self.coefficients] if isinstance(self.coefficients, str) else self.coefficients

    def rescaled(self, change: Tensor) -> Tensor:
        """The polynomial of a relative change."""
        if self.fitted_range is not None:
            change = change.clamp(*self.fitted_range)
        value = torch.zeros_like(change)
        for coefficient in self._powers:
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
