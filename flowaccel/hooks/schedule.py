"""Plan of a run as read from the pipeline's scheduler: its noise levels, first timestep and number of evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowaccel.hooks.families import Family
from flowaccel.hooks.pipeline import Pipeline


def levels(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the timesteps of a scheduler and the noise level at each of them; see `Run.sigmas`."""
    timesteps = tuple(map(float, torch.as_tensor(scheduler.timesteps).tolist()))  # one synchronisation with the GPU
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and len(sigmas) >= len(timesteps):
        return timesteps, tuple(sigmas[: len(timesteps)].tolist())
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(alphas, Tensor):
        kept = alphas[[min(int(value), len(alphas) - 1) for value in timesteps]].tolist()
        return timesteps, tuple(((1 - alpha) / alpha) ** 0.5 for alpha in kept)
    scale = scheduler.config.get("num_train_timesteps", 1000)
    return timesteps, tuple(value / scale for value in timesteps)


def span(pipe: Pipeline, timesteps: tuple[float, ...], timestep: Any, family: Family) -> tuple[int, int | None]:
    """Return the index of the run's first timestep, and the number of evaluations that the pipeline states.

    Image-to-image pipelines skip the first timesteps.
    """
    planned, listed = getattr(pipe, "_num_timesteps", None), len(timesteps)
    steps = getattr(pipe.scheduler, "num_inference_steps", None)
    if (
        not isinstance(planned, int)
        or planned < 1
        or planned == steps != listed  # a step takes several timesteps
        or (planned > listed and not by_token(timestep))  # counts several passes
    ):
        planned = None
    begin = getattr(pipe.scheduler, "begin_index", None)
    if begin is None:
        starts = _starts(pipe.scheduler, timesteps, timestep, family)
        rest = listed - (planned or listed)
        # A timestep may be listed twice; those that are left out at the end (a refiner goes on) come after.
        begin = rest if rest in starts or not starts else starts[0]
    return int(begin), planned


def by_token(timestep: Any) -> bool:
    """Return whether the timestep differs between frames or tokens."""
    return isinstance(timestep, Tensor) and timestep.dim() > 1


def _starts(scheduler: Any, timesteps: tuple[float, ...], timestep: Any, family: Family) -> list[int]:
    """Return the indices of the timestep that a network was called at."""
    if timestep is None:
        return []
    scale = scheduler.config.get("num_train_timesteps", 1000)
    value = float(torch.as_tensor(timestep).float().max())  # tokens of a given first frame have timestep 0
    if family.derived:  # unit unknown; an exact timestep can be recognised
        return [index for index, time in enumerate(timesteps) if time == value and value > 1]
    value = family.timestep_of(value, scale)
    nearest = min(timesteps, key=lambda time: abs(time - value))
    return [index for index, time in enumerate(timesteps) if time == nearest]
