"""Base class of predictors: weights of the computed values whose sum replaces a value that is not computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flowaccel.checks import is_whole

Axis = Literal["time", "step"]
AXES: tuple[Axis, ...] = ("time", "step")
"""Axes of a predictor: the scheduler's timesteps, or the indices of the run's steps. The two differ on a grid with
uneven gaps, such as a shifted one."""


@dataclass(frozen=True)
class Predictor(ABC):
    """Abstract base class of predictors. A subclass is a frozen dataclass with a `name`, entered in `PREDICTORS`.

    A predicted value is a weighted sum of the last computed values. Values that were themselves predicted are never
    used: extrapolation from them is unstable.
    """

    name: ClassVar[str]
    """Name in recipes."""
    axis: ClassVar[Axis] = "time"
    """Axis along which values are placed."""
    needs_signal: ClassVar[bool] = False
    """Whether the weights depend on the gate's signal, which is then stored with every value."""

    def place(self, step: int, timestep: float) -> float:
        """Return the position of a step of the run on the axis."""
        return float(step) if self.axis == "step" else timestep

    @property
    @abstractmethod
    def anchors(self) -> int:
        """Maximum number of computed values that the predictor uses, at least 1."""

    @abstractmethod
    def weights(self, times: Tensor, now: Tensor, signals: Tensor | None = None) -> Tensor:
        """Return the weights of the computed values.

        Args:
            times: (rows, anchors) positions of the computed values on the axis, newest first; at least 1 and at most
                `anchors` of them, distinct within a row, float64.
            now: (rows,) the position to predict.
            signals: (rows, 1 + anchors, ...) what the gate reads now, and what it read at the computed values' steps,
                newest first; None unless `needs_signal`.

        Returns:
            (rows, anchors), each row's sum is 1.
        """


@dataclass(frozen=True)
class OrderedPredictor(Predictor):
    """Predictor that uses one value more than its order.

    Args:
        order: 0 to 4; 0 holds.

    Raises:
        ValueError: an order out of range.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if not is_whole(self.order, 0, 4):
            raise ValueError(f"order must be a whole number from 0 (hold) to 4, got {self.order!r}")

    @property
    def anchors(self) -> int:
        """Number of values, `order` + 1."""
        return self.order + 1


@dataclass(frozen=True)
class TimedPredictor(OrderedPredictor):
    """Predictor of a given order, along either axis.

    Args:
        order: 0 to 4; 0 holds.
        axis: `time` counts the scheduler's timesteps, `step` the steps of the run, as the published code does.

    Raises:
        ValueError: an order out of range, or an unknown axis.
    """

    axis: Axis = field(default="time", kw_only=True)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {self.axis!r}")


def lagrange_weights(times: Tensor, now: Tensor) -> Tensor:
    """Return the weights of the values in the polynomial through all of them."""
    count = times.shape[1]
    weights = torch.ones_like(times)
    for anchor in range(count):
        for other in range(count):
            if other != anchor:
                weights[:, anchor] *= (now - times[:, other]) / (times[:, anchor] - times[:, other])
    return weights


def hold_weights(times: Tensor) -> Tensor:
    """Return weights that repeat the newest value."""
    weights = torch.zeros_like(times)
    weights[:, 0] = 1
    return weights


def differences(times: Tensor) -> Tensor:
    """Return TaylorSeer's difference quotients of the newest value, each over the last gap, as weights of the values.
    Row i of (rows, anchors, anchors) is D_i with D_0 = f and D_i = (D_{i-1} now - D_{i-1} before) / last gap, which
    is the i-th derivative in the unit of the mean gap only where all gaps are alike.
    """
    rows, count = times.shape
    # level[:, j] holds the weights of D_i at anchor j (0 = newest).
    level = torch.eye(count, dtype=times.dtype, device=times.device).repeat(rows, 1, 1)
    gaps = times[:, :-1] - times[:, 1:]
    found = [level[:, 0]]
    for _ in range(1, count):
        level = (level[:, :-1] - level[:, 1:]) / gaps[:, : level.shape[1] - 1, None]
        found.append(level[:, 0])
    return torch.stack(found, dim=1)
