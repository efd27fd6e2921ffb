"""Execution of a policy in a run: its observations, the effects of its decisions, and the forced ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowaccel.caching.feature_cache import FeatureCache
from flowaccel.caching.gates import Gate, Step
from flowaccel.caching.gates.base import State, where
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold
from flowaccel.caching.runtime import require_tensor
from flowaccel.caching.scopes import Stack
from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import COND, EXTRA, Call, Run, Session, denoiser, lend
from flowaccel.methods.policy.network import CACHE, COUNT, REUSE, SPARSE, TIMED, AccelerationPolicy
from flowaccel.methods.policy.policy_decisions import DecisionSource, Sight
from flowaccel.methods.policy.stats import NAME, PathStats
from flowaccel.methods.sparse_attention.accelerator import SparseAttention, put_switch, switched, warn_idle

_CERTAIN = 2.0
"""The score of an image that is computed, well above the threshold 1."""


@dataclass
class _Walk:
    """State of one run."""

    images: int
    grid: tuple[int, int] | None
    """(H, W) of packed latents."""
    times: tuple[float, ...] = ()
    """Timesteps of the current call, per image."""
    latents: Tensor | None = None
    """(images, C, H, W) latents of the current call."""
    condition: Tensor | None = None
    """(images, D) embedding that modulates the blocks in the current call."""
    anchor: Tensor | None = None
    """(images, C, H, W) latents when blocks were last computed."""
    anchor_times: list[float] = field(default_factory=list)
    """Timesteps at which blocks were last computed, per image."""
    reused: list[int] = field(default_factory=list)
    """Number of steps since then, per image."""
    computing: list[bool] = field(default_factory=list)
    """Whether blocks are computed at the current step, per image."""
    sparsity: tuple[int, ...] = ()
    """Sparsity of attention at the current step, per image; 0 is dense, or none is computed."""
    grids: tuple[list[float], ...] = ()
    """Noise levels of the number of steps that was chosen for each image."""

    def of_images(self, tensor: Tensor) -> Tensor:
        """Return (images, ...) as maps (images, C, H, W)."""
        if tensor.dim() == 4:
            return tensor
        assert self.grid is not None
        return tensor.transpose(1, 2).unflatten(2, self.grid)


class PolicyRuntime:
    """Policy attached to a session.

    Args:
        source: who decides.
        levels: about what; see `flowaccel.methods.policy.network.LEVELS`.
        policy: the policy, of which only the configuration is used.
        session: the session.
    """

    def __init__(
        self, source: DecisionSource, levels: Sequence[str], policy: AccelerationPolicy, session: Session
    ) -> None:
        self._source, self._levels, self._config, self._session = source, tuple(levels), policy.config, session
        self._timed = bool(TIMED & set(levels))
        self._switch = SparseAttention(min_tokens=policy.config.sparse_tokens).switch()

    def attach(self) -> Callable[[], None]:
        """Wrap network calls, their blocks and the scheduler's steps, and return a function that undoes it.

        Raises:
            UnsupportedModelError: the network's blocks are not known.
        """
        scheduler = self._session.pipe.scheduler
        cache = FeatureCache(_HeadGate(self), Stack(), Hold(), Guard(warmup=1, last=0))
        with ExitStack() as undo:
            if SPARSE in self._levels:
                undo.callback(put_switch(denoiser(self._session.pipe), self._switch, self._config.dense_blocks))
                undo.callback(self._session.on_block(self._set_sparsity))  # inside the cache: for computed blocks only
            undo.callback(cache.running().attach(self._session))
            undo.callback(self._session.on_call(self._intercept_call))
            undo.callback(self._session.on_block(self._intercept_block))
            if self._timed:
                undo.callback(lend(scheduler, "decide", self._descend if COUNT in self._levels else self._jump))
                undo.callback(self._session.on_step(self._after_step))
            return undo.pop_all().close

    # -- calls

    def _intercept_call(self, call_next: Callable[..., Any], call: Call) -> Any:
        require_tensor(call, "a policy")
        walk = self._walk(call)
        times = self._times(walk, call)
        if COND in call.branches:
            walk.times = times
            walk.latents = walk.of_images(call.sample[call.rows_of(COND)])
        if self._timed:
            call.record.times = tuple(time or None for time in times)
            call = replace(
                call, arguments={**call.arguments, call.family.time_argument: _timestep(call, times, self._scale)}
            )
        stats = call.record.stats[NAME] = PathStats(call.record)
        if SPARSE not in self._levels:
            return call_next(call)
        with switched(self._switch, call, None):
            output = call_next(call)
        stats.sparsity = walk.sparsity
        if any(walk.sparsity):
            warn_idle(self._session.pipe, self._switch, self._config.dense_blocks, "the sparse head of a policy")
        return output

    def _walk(self, call: Call) -> _Walk:
        found: _Walk | None = call.run.state.get(self)
        if found is None:
            found = call.run.state[self] = _Walk(call.images, _grid(call))
            found.reused, found.computing = [0] * call.images, [True] * call.images
        return found

    def _times(self, walk: _Walk, call: Call) -> tuple[float, ...]:
        if not self._timed:
            return (call.timestep,) * walk.images
        scheduler = self._session.pipe.scheduler
        levels = torch.tensor(scheduler.levels(walk.images), dtype=torch.float32)
        return tuple((levels * scheduler.config.num_train_timesteps).tolist())

    def _intercept_block(self, call_next: Callable[..., Any], call: Call, block: Any) -> Any:
        if block.index == 0 and COND in call.branches and EXTRA not in call.branches:
            condition = block.condition[call.rows_of(COND)]
            if condition.shape[1] != self._config.condition_dim:
                raise RecipeConflictError(
                    f"the policy was trained for blocks that {self._config.condition_dim} numbers modulate, and those "
                    f"of this {type(call.module).__name__} have {condition.shape[1]}; train one for this network"
                )
            self._walk(call).condition = condition
        return call_next()

    # -- blocks

    def reuse(self, run: Run, step: int) -> list[bool]:
        """Return per image whether its blocks' residual is reused at this step; idle images reuse it."""
        walk: _Walk = run.state[self]
        found = [time == 0 and self._timed for time in walk.times]
        open_ = [
            image
            for image, idle in enumerate(found)
            if not idle and CACHE in self._levels and walk.reused[image] < self._config.max_reuse
        ]
        walk.computing, walk.sparsity = [not idle for idle in found], (0,) * walk.images
        if not open_:
            return found
        assert walk.latents is not None and walk.anchor is not None and walk.condition is not None
        gaps = [walk.anchor_times[image] - walk.times[image] for image in open_]
        gap = torch.tensor(gaps, dtype=walk.condition.dtype, device=walk.condition.device) / self._scale
        rows = torch.tensor(open_, device=gap.device)
        condition = torch.cat([walk.condition[rows], gap[:, None]], dim=1)
        sight = Sight(step, open_, (walk.latents - walk.anchor)[rows], condition)
        chosen = self._source.choose(CACHE, sight)
        for image, choice in zip(open_, chosen, strict=True):
            found[image] = choice == REUSE
            walk.computing[image] = not found[image]
        return found

    def note(self, run: Run, computed: Tensor) -> None:
        """Record which images' blocks were computed, (images,) bool."""
        walk: _Walk = run.state[self]
        assert walk.latents is not None
        flags = computed.tolist() if len(computed) == walk.images else computed.tolist() * walk.images
        walk.anchor = where(torch.tensor(flags), walk.latents, walk.anchor)
        before = walk.anchor_times or walk.times
        walk.anchor_times = [now if on else old for on, now, old in zip(flags, walk.times, before, strict=True)]
        walk.reused = [0 if on else count + 1 for on, count in zip(flags, walk.reused, strict=True)]

    def _set_sparsity(self, call_next: Callable[..., Any], call: Call, block: Any) -> Any:
        if block.index == 0 and EXTRA not in call.branches:
            walk = self._walk(call)
            if COND in call.branches:
                walk.sparsity = self._sparsity(walk, call.step)
            kept = (None, *self._config.sparsity)
            self._switch.keep = tuple(kept[walk.sparsity[image]] for image in call.row_images)
        return call_next()

    def _sparsity(self, walk: _Walk, step: int) -> tuple[int, ...]:
        computing = [image for image, on in enumerate(walk.computing) if on]
        assert walk.latents is not None and walk.condition is not None
        rows = torch.tensor(computing, device=walk.latents.device)
        sight = Sight(step, computing, walk.latents[rows], walk.condition[rows])
        chosen = dict(zip(computing, self._source.choose(SPARSE, sight), strict=True))
        return tuple(chosen.get(image, 0) for image in range(walk.images))

    # -- steps

    @property
    def _scale(self) -> int:
        scale: int = self._session.pipe.scheduler.config.num_train_timesteps
        return scale

    def _jump(self, velocity: Tensor, levels: tuple[float, ...]) -> list[float]:
        """Return the next noise levels, chosen step by step."""
        open_ = [image for image, level in enumerate(levels) if level > 0]
        sight = self._predicted(velocity, open_)
        found = [0.0] * len(levels)
        for image, level in zip(open_, self._source.jump(sight, [levels[image] for image in open_]), strict=True):
            found[image] = level
        return found

    def _descend(self, velocity: Tensor, levels: tuple[float, ...]) -> list[float]:
        """Return the next noise levels of the grids that were chosen at the first step."""
        walk = self._walked
        if not walk.grids:
            scheduler = self._session.pipe.scheduler
            chosen = self._source.choose(COUNT, self._predicted(velocity, range(len(levels))))
            steps = [min(self._config.counts[choice], scheduler.num_inference_steps) for choice in chosen]
            walk.grids = tuple(scheduler.usual_grid(count) for count in steps)
        return [
            max((below for below in grid if below < level), default=0.0)
            for grid, level in zip(walk.grids, levels, strict=True)
        ]

    @property
    def _walked(self) -> _Walk:
        assert self._session.run is not None
        walk: _Walk = self._session.run.state[self]
        return walk

    def _predicted(self, velocity: Tensor, images: Sequence[int]) -> Sight:
        """Return the inputs of heads that choose times, for some images."""
        run, walk = self._session.run, self._walked
        assert run is not None and walk.condition is not None
        rows = torch.tensor(images, device=velocity.device)
        condition = walk.condition[rows.to(walk.condition.device)]
        return Sight(run.steps_done, images, walk.of_images(velocity)[rows], condition)

    def _after_step(self, velocity: Tensor, sample: Tensor, result: Tensor) -> None:
        pipe, run = self._session.pipe, self._session.run
        if run is None or run.stopped or not pipe.scheduler.done:
            return
        run.stop()
        if hasattr(pipe, "_interrupt"):  # the pipeline's own way to leave out the rest of its loop
            pipe._interrupt = True
            run.at_end.append(lambda: setattr(pipe, "_interrupt", False))


@dataclass(frozen=True)
class _HeadGate(Gate):
    """Cache head as a gate: it asks the runtime at the first block, where the condition is known."""

    name: ClassVar[str] = "policy"
    signal: ClassVar[Any] = "condition"

    runtime: PolicyRuntime

    def score(self, state: State, signal: Tensor | None, step: Step) -> tuple[Tensor, State]:
        """Return the score of every image, 0 for images that reuse."""
        reuse = self.runtime.reuse(self._run, step.index)
        return torch.tensor([0.0 if reused else _CERTAIN for reused in reuse]), state

    def update(
        self, state: State, signal: Tensor | None, feedback: Tensor | None, computed: Tensor, step: Step
    ) -> State:
        """Record which images' blocks were computed."""
        self.runtime.note(self._run, computed)
        return {"computed": computed}

    @property
    def _run(self) -> Run:
        run = self.runtime._session.run
        assert run is not None
        return run


def _timestep(call: Call, times: Sequence[float], scale: int) -> Tensor:
    """Return the network's `timestep` argument for the rows of a call, in the convention of its family."""
    given = torch.as_tensor(call.arguments[call.family.time_argument])
    found = torch.tensor([times[image] for image in call.row_images], dtype=torch.float32)
    found = found.to(given.dtype) if call.family.time == "sigma" else found  # pipelines divide in this dtype
    return call.family.argument_of(found, scale).to(given.device, given.dtype)


def _grid(call: Call) -> tuple[int, int] | None:
    """Return the grid (H, W) of latents that are packed into tokens; None for maps."""
    sample = call.sample
    if sample.dim() == 4:
        return None
    grid = call.grid
    if sample.dim() != 3 or grid is None:
        raise UnsupportedModelError(
            f"a policy looks at images (rows, C, H, W), or tokens with img_ids as FLUX has them; the "
            f"{type(call.module).__name__} takes {tuple(sample.shape)}"
        )
    height, width = grid
    return height, width
