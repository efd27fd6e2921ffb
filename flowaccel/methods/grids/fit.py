"""Fitting of step grids to a pipeline: record its fine runs, search, and measure the grid on other images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowaccel.checks import is_whole
from flowaccel.errors import RecipeConflictError
from flowaccel.evaluation.metrics.pixel_metrics import rel_l2
from flowaccel.hooks import Pipeline, session_of
from flowaccel.methods.grids.search import (
    GRID_METHODS,
    METRICS,
    Metric,
    SearchedGrid,
    Trajectory,
    boss,
    cost_table,
    oss,
)
from flowaccel.recipe import Recipe, accelerated
from flowaccel.recipe.calibration import GridCalibration
from flowaccel.recipe.sampler import Sampler
from flowaccel.samplers import FlowRungeKuttaScheduler, FlowSampler, FlowSDEScheduler
from flowaccel.training.sampling import Notify, Sampling

Grid = tuple[float, ...]
"""Noise levels from 1 to 0."""


def calibrate_grid(
    pipe: Pipeline,
    method: str,
    steps: int,
    sampling: Sampling,
    *,
    held_out: int | None = None,
    metric: Metric = "state",
    base: Recipe | None = None,
    model: str | None = None,
    notify: Notify = lambda *_: None,
) -> Recipe:
    """Search a grid for the user's own runs, and see on other images what it does.

    Args:
        pipe: a flow pipeline that is not accelerated, whose scheduler takes Euler's steps.
        method: `boss` (arXiv 2312.16414), which needs the fine runs alone, or `oss` (arXiv 2503.21774), which evaluates
            the network at states of its own, fine steps x (steps - 1) times per image.
        steps: number of steps of the grid, at least 1.
        sampling: the fine runs.
        held_out: how many images the result is measured on, at least 1: those whose numbers follow `sampling`'s, so
            other seeds, and other conditions where there are more than samples. None takes as many as the search saw.
        metric: quantity that the search compares, `state` or `x0`; see `Trajectory.errors`.
        base: recipe that the grid is added to: another Euler sampler, another network; no hooks.
        model: the name of the pipeline, for the record.
        notify: called as work proceeds.

    Returns:
        `base` with a `Sampler` that holds the grid in the place of its scheduler; its `calibration` says what the grid
        does, beside the pipeline's own grid of as many steps.

    Raises:
        ValueError: an unknown method or metric, a count out of range, or a scheduler that is not Euler's.
        RecipeConflictError: `base` holds hooks, or the pipeline is accelerated.
        UnsupportedModelError: not a flow model, or one that keeps its scheduler.
    """
    if held_out is not None and held_out < 1:
        raise ValueError(f"held_out must be at least 1, got {held_out}")
    grids = search_grids(pipe, method, steps, sampling, metric=metric, base=base, notify=notify)
    return measured_grid(
        pipe, method, grids[-1], sampling, held_out=held_out, metric=metric, base=base, model=model, notify=notify
    )


def search_grids(
    pipe: Pipeline,
    method: str,
    steps: int,
    sampling: Sampling,
    *,
    metric: Metric = "state",
    base: Recipe | None = None,
    notify: Notify = lambda *_: None,
) -> tuple[Grid, ...]:
    """Search grids of 1, 2, ..., `steps` steps, for little more than the cost of the last; see `calibrate_grid`."""
    base = base or Recipe()
    _check(method, metric, steps, sampling.steps)
    _check_base(pipe, method, base)
    search = {"boss": _boss, "oss": _oss}[method]
    times, paths = search(pipe, base, steps, sampling, metric, notify)
    # Nine digits bring a 32-bit number back exactly.
    return tuple(tuple(float(f"{times[node]:.9g}") for node in path.nodes) for path in paths)


def measured_grid(
    pipe: Pipeline,
    method: str,
    grid: Sequence[float],
    sampling: Sampling,
    *,
    held_out: int | None = None,
    metric: Metric = "state",
    base: Recipe | None = None,
    model: str | None = None,
    notify: Notify = lambda *_: None,
) -> Recipe:
    """Return a grid as a recipe, measured on the samples that follow those of the search; see `calibrate_grid`."""
    base, steps = base or Recipe(), len(grid) - 1
    count = held_out or sampling.num_samples
    held = replace(sampling, first=sampling.first + sampling.num_samples, num_samples=count)
    with accelerated(pipe, base):
        fine = torch.cat(list(held.run(pipe, notify, "held out")))
        default = torch.cat(list(replace(held, steps=steps).run(pipe, notify, "default")))
    with accelerated(pipe, with_grid(base, grid)):
        searched = torch.cat(list(replace(held, steps=steps).run(pipe, notify, "searched")))
        facts = sampling.facts(pipe, steps, model)
    errors, default_errors = rel_l2(searched, fine), rel_l2(default, fine)
    calibration = GridCalibration(
        method=method,
        fine_steps=sampling.steps,
        metric=metric,
        held_out=count,
        rel_l2=_rounded(errors.mean()),
        default_rel_l2=_rounded(default_errors.mean()),
        difference_ci95=_interval(errors - default_errors),
        **facts,
    )
    return replace(with_grid(base, grid, calibration), name=f"{method}-{steps}")


def with_grid(base: Recipe, grid: Sequence[float], calibration: GridCalibration | None = None) -> Recipe:
    """Return a recipe whose scheduler takes Euler steps over a grid."""
    kept = [accelerator for accelerator in base.accelerators if accelerator.kind != "scheduler"]
    return Recipe([*kept, Sampler("euler", {"grid": list(grid)}, calibration)], name=base.name)


def _check(method: str, metric: str, steps: int, fine_steps: int) -> None:
    for name, value, allowed in (("method", method, GRID_METHODS), ("metric", metric, METRICS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if not is_whole(steps, 1, fine_steps):
        raise ValueError(f"steps must be a whole number in 1 .. {fine_steps} (the fine run's steps), got {steps!r}")


def _check_base(pipe: Pipeline, method: str, base: Recipe) -> None:
    """Refuse early a base recipe that would fail later or that a grid cannot be searched for."""
    hooks = [accelerator.name for accelerator in base.accelerators if accelerator.kind == "hook"]
    if hooks:
        raise RecipeConflictError(
            f"method {method!r} searches with every network call computed, but the recipe under it holds {hooks[0]!r}; "
            f"search first, and put {hooks[0]!r} on top of the result"
        )
    with accelerated(pipe, with_grid(base, (1.0, 0.0))):
        pass
    with accelerated(pipe, base):
        reason = _not_euler(pipe.scheduler)
        if reason is not None:
            raise ValueError(
                f"method {method!r} searches grids for Euler's method, but the {type(pipe.scheduler).__name__} "
                f"{reason}; put the recipe 'euler' under it (--recipe euler)"
            )


def _not_euler(scheduler: Any) -> str | None:
    """Return why a scheduler's steps are not x + width * velocity with one evaluation each, or None if they are."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return None  # `Sampler` has refused its stochastic form
    if isinstance(scheduler, FlowSDEScheduler):
        return "draws noise at every step, so that a run has no path to follow with fewer steps"
    if isinstance(scheduler, FlowRungeKuttaScheduler):
        evaluations = len(scheduler.tableau.c)
        return (
            None
            if evaluations == 1
            else f"({scheduler.config.solver}) evaluates the network {evaluations} times a step"
        )
    if isinstance(scheduler, FlowSampler) or scheduler.order == 1:
        return "goes by more than the velocity at the start of a step"
    return "evaluates the network more than once a step"


# -- the two searches: noise levels of the fine run, and paths through them


def _boss(
    pipe: Pipeline, base: Recipe, steps: int, sampling: Sampling, metric: Metric, notify: Notify
) -> tuple[Grid, tuple[SearchedGrid, ...]]:
    times: list[Grid] = []
    tables: list[Any] = []

    def price(trajectory: Trajectory) -> None:
        times.append(trajectory.times)
        tables.append(trajectory.images / sampling.num_samples * cost_table(trajectory, metric))

    watch_fine_runs(pipe, base, sampling, price, notify)
    return times[0], boss(sum(tables), steps)


def _oss(
    pipe: Pipeline, base: Recipe, steps: int, sampling: Sampling, metric: Metric, notify: Notify
) -> tuple[Grid, tuple[SearchedGrid, ...]]:
    batches: list[Trajectory] = []
    watch_fine_runs(pipe, base, sampling, batches.append, notify)
    whole = Trajectory(
        times=batches[0].times,
        states=torch.cat([batch.states for batch in batches], dim=1),
        velocities=torch.cat([batch.velocities for batch in batches], dim=1),
    )

    def velocity(states: Tensor, nodes: Sequence[int]) -> Tensor:
        return velocities_at(pipe, base, sampling, states, [whole.times[node] for node in nodes])

    paths = oss(velocity, whole, steps, metric, notify=lambda done, total: notify("searching", done, total))
    return whole.times, paths


def watch_fine_runs(
    pipe: Pipeline,
    base: Recipe,
    sampling: Sampling,
    take: Callable[[Trajectory], None],
    notify: Notify = lambda *_: None,
) -> None:
    """Run `sampling` with `base`, and yield the trajectory of every batch, float32 on the CPU.

    Raises:
        ValueError: the runs do not begin with pure noise, or not all of their steps were seen.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(velocity: Tensor, sample: Tensor, result: Tensor) -> None:
        seen.append((velocity.float().cpu(), sample.float().cpu(), result.float().cpu()))

    with accelerated(pipe, base), ExitStack() as undo:
        session = session_of(pipe)
        undo.callback(session.on_step(keep))
        for _ in sampling.outputs(pipe, notify, "fine runs", output_type="latent"):
            run = session.last_run
            if run is None or not run.sigmas or len(seen) != len(run.timesteps) or abs(run.sigmas[0] - 1) > 1e-6:
                raise ValueError(
                    "a grid is searched in runs that begin with pure noise, in each of whose steps the pipeline calls "
                    f"its scheduler, but {len(seen)} of {sampling.steps} such steps of this {type(pipe).__name__} were "
                    "seen; leave out what makes it begin midway (strength) or bypass the scheduler (compile_blocks)"
                )
            take(
                Trajectory(
                    times=(1.0, *run.sigmas[1:], 0.0),
                    states=torch.stack([*(sample for _, sample, _ in seen), seen[-1][2]]),
                    velocities=torch.stack([velocity for velocity, _, _ in seen]),
                )
            )
            seen.clear()


def velocities_at(pipe: Pipeline, base: Recipe, sampling: Sampling, states: Tensor, times: Sequence[float]) -> Tensor:
    """Return the velocities of the pipeline's guided network at given states.

    The pipeline itself is run, over a grid of these noise levels, and whenever it steps it is handed the next of the
    states in place of the step's result. So text encoding, guidance, two networks and packing are as in any run of it;
    only what depends on the number of the step, rather than on the noise level, differs. The first step, at the noise
    that the pipeline draws, is not used.

    Args:
        pipe: the pipeline.
        base: recipe that it runs with; its scheduler is replaced.
        sampling: conditions, seed and batches of the images.
        states: (M, B, ...) with B images.
        times: M noise levels, decreasing, below 1 and above 0.

    Returns:
        (M, B, ...) float32 on the CPU.
    """
    found = []
    with accelerated(pipe, with_grid(base, [1.0, *times, 0.0])):
        session = session_of(pipe)
        runs = replace(sampling, steps=len(times) + 1).outputs(pipe, lambda *_: None, "", output_type="latent")
        for batch in states.split(sampling.batch_size, dim=1):
            asked = _Asked(batch)
            with ExitStack() as undo:
                undo.callback(session.on_step(asked))
                next(runs)
            found.append(torch.stack(asked.answers[1:]))
    return torch.cat(found, dim=1)


class _Asked:
    """Callback that hands the pipeline one state after the other and keeps the network's outputs."""

    def __init__(self, states: Tensor) -> None:
        self.states, self.answers = states, list[Tensor]()

    def __call__(self, velocity: Tensor, sample: Tensor, result: Tensor) -> Tensor | None:
        self.answers.append(velocity.float().cpu())
        index = len(self.answers) - 1
        return self.states[index] if index < len(self.states) else None


def _rounded(value: Any) -> float:
    return float(f"{float(value):.4g}")


def _interval(differences: Tensor) -> tuple[float, float] | None:
    """Return the 95% interval of the mean of (N,) differences: 1.96 standard errors to either side."""
    if len(differences) < 2:
        return None
    mean, margin = float(differences.mean()), 1.96 * float(differences.std()) / len(differences) ** 0.5
    return _rounded(mean - margin), _rounded(mean + margin)
