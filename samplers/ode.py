"""Deterministic samplers on the uniform (or shifted) grid, with both ends evaluated: explicit Runge-Kutta and
Adams-Bashforth.

diffusers' own FlowMatch schedulers run 1 .. 1/1000 .. 0 instead, and their Heun ends in an Euler step; SiT (arXiv
2401.08740) and FlowTurbo (arXiv 2409.18128) use the grid made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowaccel.samplers.base import Evaluation, FlowSampler, FusedStep, TimeShift
from flowaccel.samplers.formulas import extrapolated, predicted


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: nodes c, lower-triangular weights a, final weights b (Butcher's notation)."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        if abs(sum(self.b) - 1) > 1e-12:
            raise ValueError(f"the final weights must sum to 1, got {self.b}")
        if any(abs(sum(row) - node) > 1e-12 for row, node in zip(self.a, self.c, strict=True)):
            raise ValueError(f"every row of a must sum to its node: {self.a}, {self.c}")


TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2),
    # Kutta's 3/8 rule, which is what torchdiffeq calls rk4
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (0.125, 0.375, 0.375, 0.125), 4
    ),
}
_FUSED: dict[str, Literal["E", "H"]] = {"euler": "E", "heun": "H"}


class FlowRungeKuttaScheduler(FlowSampler):
    """Explicit Runge-Kutta schedulers: `euler`, `heun`, `midpoint`, `rk4` (1, 2, 2 and 4 evaluations a step).

    Heun is SiT's deterministic sampler: the explicit trapezoid, at the last step too, which evaluates the network at
    sigma = 0.

    Args:
        solver: the method.
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
            time_shift_type, grid: the grid, as in `FlowTurboScheduler`.

    Raises:
        ValueError: unknown solver, or a grid that does not decrease from 1 to 0.
    """

    @register_to_config
    def __init__(
        self,
        solver: Literal["euler", "heun", "midpoint", "rk4"] = "heun",
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: TimeShift = "exponential",
        grid: list[float] | None = None,
    ) -> None:
        if solver not in TABLEAUS:
            raise ValueError(f"solver must be one of {sorted(TABLEAUS)}, got {solver!r}")
        self.tableau: Tableau = TABLEAUS[solver]
        self._initialise()
        self._forget()

    @property
    def fused_steps(self) -> list[FusedStep] | None:
        """Steps of `euler` and `heun`; None for the other solvers."""
        kind = _FUSED.get(self.config.solver)
        if kind is None:
            return None
        return [FusedStep(kind=kind, step=step) for step in range(self.first_step, len(self.grid) - 1)]

    def _plan(self, steps: int) -> list[Evaluation]:
        return [
            Evaluation(step=step, stage=stage, sigma=self.grid[step] + node * self.width(step))
            for step in range(self.first_step, steps)
            for stage, node in enumerate(self.tableau.c)
        ]

    def _forget(self) -> None:
        self._state: Tensor | None = None
        self._slopes: list[Tensor] = []

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        step, stage = self.evaluations[index].step, self.evaluations[index].stage
        if stage == 0:
            self._state, self._slopes = sample, []
        assert self._state is not None
        self._slopes.append(velocity)
        last = stage + 1 == len(self.tableau.c)
        weights = self.tableau.b if last else self.tableau.a[stage + 1]
        terms = [weight * slope for weight, slope in zip(weights, self._slopes, strict=True) if weight]
        state = predicted(self._state, self.width(step), torch.stack(terms).sum(0))
        return self._finished(step, state) if last else state


class FlowAdamsBashforthScheduler(FlowSampler):
    """Second-order Adams-Bashforth scheduler (AB2): one evaluation a step, the previous velocity is reused.

    The step sizes may differ; the first step of a run is an Euler step.

    Args:
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
            time_shift_type, grid: the grid, as in `FlowTurboScheduler`.

    Raises:
        ValueError: a grid that does not decrease from 1 to 0.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: TimeShift = "exponential",
        grid: list[float] | None = None,
    ) -> None:
        self._initialise()
        self._forget()

    def _plan(self, steps: int) -> list[Evaluation]:
        return [Evaluation(step=step, stage=0, sigma=self.grid[step]) for step in range(self.first_step, steps)]

    def _forget(self) -> None:
        self._previous: Tensor | None = None

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        step = self.evaluations[index].step
        width = self.width(step)
        slope = velocity
        if self._previous is not None:
            slope = extrapolated(velocity, self._previous, width / self.width(step - 1))
        self._previous = velocity
        return self._finished(step, predicted(sample, width, slope))
