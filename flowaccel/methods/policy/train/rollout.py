"""Runs of a pipeline under sampled decisions, and the cost of decisions (RAPID3, arXiv 2509.22323)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowaccel.evaluation import measure_latency
from flowaccel.hooks import COND, CallRecord, Pipeline, denoiser, session_of
from flowaccel.methods.policy.accelerator import attach_policy
from flowaccel.methods.policy.network import CACHE, COMPUTE, COUNT, REUSE, SPARSE, AccelerationPolicy, Choices
from flowaccel.methods.policy.policy_decisions import DecisionSource, HeadSource, Sight
from flowaccel.methods.policy.stats import NAME
from flowaccel.recipe import Recipe, accelerated

Generate = Callable[[], Any]
"""Calls the pipeline, once, and returns its images (B, C, H, W)."""
_ROUNDS = 5


@dataclass(frozen=True)
class Executed:
    """Executed decisions at R pairs of an image and a step, forced or not; idle images are not among them."""

    image: Tensor
    """(R,) which image, from 0."""
    reused: Tensor
    """(R,) bool, whether its blocks were not computed."""
    level: Tensor
    """(R,) how sparse its attention was, 0 for dense."""

    @property
    def steps(self) -> Tensor:
        """(B,) number of evaluations of each image."""
        return self.image.bincount()

    @property
    def computed(self) -> Tensor:
        """(B,) number of evaluations of each image whose blocks were computed."""
        return self.image[~self.reused].bincount(minlength=int(self.image.max()) + 1)


@dataclass(frozen=True)
class Rollout:
    """Batch of finished images with the decisions that led to them."""

    images: Tensor
    """(B, C, H, W) as `Generate` returned them."""
    choices: dict[str, Choices]
    """Choices of each head that were not forced."""
    executed: Executed


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts, numbering their images consecutively."""
    starts = list(itertools.accumulate((len(part.images) for part in parts[:-1]), initial=0))
    choices: dict[str, list[Choices]] = {}
    for start, part in zip(starts, parts, strict=True):
        for level, chosen in part.choices.items():
            choices.setdefault(level, []).append(replace(chosen, image=chosen.image + start))
    return Rollout(
        torch.cat([part.images for part in parts]),
        {level: _joined(chosen) for level, chosen in choices.items()},
        Executed(
            torch.cat([part.executed.image + start for start, part in zip(starts, parts, strict=True)]),
            torch.cat([part.executed.reused for part in parts]),
            torch.cat([part.executed.level for part in parts]),
        ),
    )


def roll_out(
    pipe: Pipeline,
    policy: AccelerationPolicy,
    generate: Generate,
    source: DecisionSource,
    levels: Sequence[str] | None = None,
) -> Rollout:
    """Make a batch of images in which `source` decides.

    Args:
        pipe: a pipeline that is not accelerated.
        policy: the policy, of which only the configuration is used.
        generate: calls the pipeline.
        source: who decides; a `HeadSource` whose `log` is a dictionary gives the choices.
        levels: about what; None for all that the policy can.
    """
    with accelerated(pipe, Recipe()):
        session = session_of(pipe)
        detach = attach_policy(pipe, policy, source, levels)
        try:
            images = generate()
            assert session.last_run is not None
            records = [record for record in session.last_run.records if COND in record.branches]
        finally:
            detach()
    return Rollout(images, _logged(source), executed(records))


def _sparsity(record: CallRecord) -> tuple[int, ...]:
    return record.stats[NAME].sparsity or (0,) * len(record.computed)


def executed(records: Sequence[CallRecord]) -> Executed:
    """Return the executed decisions at the conditional calls of a run."""
    rows = [
        (image, not record.computed[image], _sparsity(record)[image])
        for record in records
        for image in range(len(record.computed))
        if not record.times or record.times[image] is not None
    ]
    image, reused, level = zip(*rows, strict=True)
    return Executed(torch.tensor(image), torch.tensor(reused), torch.tensor(level))


def sampled(
    policy: AccelerationPolicy, seeds: Sequence[Sequence[int]], limits: tuple[float, float] = (0.0, 1.0)
) -> HeadSource:
    """Return a source of the heads' sampled decisions, with a log.

    Image i draws from numpy's generator of `seeds[i]` alone.
    """
    return HeadSource(policy, [np.random.default_rng(list(seed)) for seed in seeds], limits, log={})


def _logged(source: DecisionSource) -> dict[str, Choices]:
    logged = getattr(source, "log", None) or {}
    return {level: _joined(parts) for level, parts in logged.items()}


def _joined(parts: Sequence[Choices]) -> Choices:
    return Choices(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("image", "features", "condition", "action"))
    )


# -- costs


@dataclass(frozen=True)
class _Overruled:
    """Source that evaluates the heads and ignores their decisions, so that their own time counts."""

    heads: HeadSource
    steps: int
    """Number of steps of the pipeline; at most the largest number of a count head."""
    cache: int
    """Choice of the cache head at all steps but the first."""
    sparse: int

    def jump(self, sight: Sight, levels: Sequence[float]) -> list[float]:
        self.heads.jump(sight, levels)
        return [1 - (sight.step + 1) / self.steps] * len(levels)

    def choose(self, level: str, sight: Sight) -> list[int]:
        self.heads.choose(level, sight)
        largest = len(self.heads.policy.config.counts) - 1
        return [{CACHE: self.cache, SPARSE: self.sparse, COUNT: largest}[level]] * len(sight.images)


def measured_costs(
    pipe: Pipeline,
    policy: AccelerationPolicy,
    generate: Callable[[int], Any],
    steps: tuple[int, int] = (2, 6),
    rounds: int = _ROUNDS,
) -> dict[str, Any]:
    """Measure the cost of decisions on this device, in computed dense steps, including the heads' own time.

    Text encoders, decoders and whatever else does not grow with the steps are left out.

    Args:
        pipe: a pipeline that is not accelerated.
        policy: the policy.
        generate: calls the pipeline with so many steps, and returns its images (B, C, H, W).
        steps: numbers of steps of the two runs that are timed; what both take alike is not due to the steps.
        rounds: number of interleaved rounds; medians are taken.

    Returns:
        `reuse`: of a step whose blocks are reused, if there was one; `sparse`: of a step at each level of the sparse
        head; `dense_seconds`: of a dense step of the batch.
    """
    short, long = steps

    def run(count: int, cache: int, sparse: int) -> Callable[[], Rollout]:
        source = _Overruled(HeadSource(policy), count, cache, sparse)
        return lambda: roll_out(pipe, policy, lambda: generate(count), source)

    calls = {"short": run(short, COMPUTE, 0), "dense": run(long, COMPUTE, 0)}
    if CACHE in policy.levels:
        calls["reuse"] = run(long, REUSE, 0)
    for level in range(1, 1 + len(policy.config.sparsity)):
        calls[f"sparse{level}"] = run(long, COMPUTE, level)
    # how many steps there are, and which of them the rails force, depends on the levels
    done = {name: call().executed for name, call in calls.items()}
    timings = {
        name: timing.median
        for name, timing in measure_latency(calls, rounds=rounds, device=denoiser(pipe).device).items()
    }
    few, many = (int(done[name].computed[0]) for name in ("short", "dense"))
    even = timings["dense"] / many
    growth = (timings["dense"] - timings["short"]) / (many - few) if many > few else even
    dense = growth if 0 < growth < even else even
    fixed = many * (even - dense)
    found: dict[str, Any] = {"dense_seconds": dense}
    if "reuse" in done and bool(done["reuse"].reused.any()):
        taken, computed = int(done["reuse"].steps[0]), int(done["reuse"].computed[0])
        found["reuse"] = max(0.0, ((timings["reuse"] - fixed) / dense - computed) / (taken - computed))
    if SPARSE in policy.levels:
        levels = [timings[name] for name in timings if name.startswith("sparse")]
        found["sparse"] = [max(0.0, (seconds - fixed) / dense / many) for seconds in levels]
    return found
