"""Base class of flow samplers: the step grid, its shifts, and the loop over network evaluations.

A sampler is a list of evaluations fixed before sampling and a `step` that consumes the network's output of one
evaluation and returns the input of the next. So any number of evaluations per step fits the ordinary diffusers loop,
at the price that some of the samples a callback sees are predictor points between two steps. Image to image leaves out
steps, not evaluations: see `FlowSampler.order`.

Convention: diffusers' own. sigma runs from 1 (noise) to 0 (data), timestep = `num_train_timesteps` * sigma, the
network's output is noise - data.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from flowaccel.checks import is_number
from flowaccel.compat import register_components
from flowaccel.samplers.formulas import noised

register_components()

TimeShift = Literal["exponential", "linear"]
Project = Callable[[Tensor, float], Tensor]
"""Function `project(state, sigma)` applied to the state (B, ...) at the end of a step; returns (B, ...)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a network."""

    step: int
    """Index of the step (0 .. num_inference_steps - 1) that the call belongs to."""
    stage: int
    """Position of the call within its step, from 0."""
    sigma: float
    """Noise level at which the network is evaluated."""


@dataclass(frozen=True, kw_only=True)
class FusedStep:
    """One whole step, for callers that run its evaluations as a single function."""

    kind: Literal["E", "H", "P", "R"]
    """Kind of the step: Euler; Heun; pseudo-corrector, whose first velocity is the carried one; refiner."""
    step: int
    """Index of the step, which runs from `grid[step]` to `grid[step + 1]`."""
    carries_start: bool = False
    """Whether the velocity at the start of this step is carried to the next one, instead of that at its predicted
    end."""
    mode: str = ""
    """The scheduler's `refiner_mode`, for a refiner step."""


def shifted(sigma: float, shift: float) -> float:
    """Return SD3's time shift of a noise level in [0, 1] (arXiv 2403.03206, eq. 23); `shift` 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


class _StepOrder(int):
    """Type of `FlowSampler.order`."""

    def __new__(cls, sampler: FlowSampler) -> Self:
        order = super().__new__(cls, 1)
        order._sampler = sampler
        return order

    _sampler: FlowSampler

    def __mul__(self, count: int) -> int:
        return self._sampler._entries_before(count)

    __rmul__ = __mul__


class FlowSampler(SchedulerMixin, ConfigMixin):
    """Abstract base class of flowaccel's schedulers; subclasses define `_plan` and `_advance`."""

    _compatibles: ClassVar[list[str]] = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    begins_midway: ClassVar[bool] = False
    """Whether a run may begin at an evaluation that is not the first of its step."""

    timesteps: Tensor
    sigmas: Tensor

    def _initialise(self) -> None:
        """Initialise the state; called at the end of a subclass's constructor."""
        if self._fixed is not None:
            _check_grid(self._fixed)
        self.num_inference_steps: int | None = None
        self.grid: list[float] = []
        self.first_step = 0
        self.evaluations: list[Evaluation] = []
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._counts_entries = False
        self._asked: dict[int, str | None] = {}

    @property
    def order(self) -> int:
        """Number of timesteps per step, formally 1.

        Multiplied by a number of steps, it gives the index into `timesteps` at which the next step begins, however many
        evaluations each of the steps makes: stock image-to-image pipelines begin at
        `timesteps[steps_left_out * scheduler.order]`.
        """
        return _StepOrder(self)

    @abstractmethod
    def _plan(self, steps: int) -> list[Evaluation]:
        """Return the evaluations of `steps` steps on `self.grid` (steps + 1 levels), from `self.first_step` on."""

    @abstractmethod
    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        """Process the output of evaluation `index`; returns the input of the next one."""

    def _forget(self) -> None:
        """Reset everything that a run carries from one evaluation to the next."""

    @property
    def _fixed(self) -> Sequence[float] | None:
        """Grid that the scheduler was made with, if any."""
        return self.config.get("grid")

    @property
    def default_num_inference_steps(self) -> int | None:
        """The only number of steps that the scheduler supports, or None if it supports any."""
        return None if self._fixed is None else len(self._fixed) - 1

    def last_start(self, steps: int) -> int:
        """Return the largest `first_step` that a run of `steps` steps allows."""
        return steps - 1

    @property
    def fused_steps(self) -> list[FusedStep] | None:
        """Steps of the current run, or None if this sampler's steps are of other kinds than those of `FusedStep`."""
        return None

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` at which the next run starts, or None for the first."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the evaluation whose output `step` expects next; None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the next run at `timesteps[begin_index]` (image to image); with their number as index nothing is run.

        Raises:
            ValueError: out of range, or no run can begin there.
        """
        self._check_begin(begin_index)
        self._begin_index = begin_index

    def count_steps(self, count: int) -> int:
        """Return the number of steps for a pipeline that counts `timesteps`, and count this run's steps from then on.

        `count` is returned unchanged unless the pipeline counted entries of `timesteps`. `flowaccel.accelerate` calls
        this for image to image.
        """
        if not self._counts_entries or self.num_inference_steps is None:
            return count
        self._counts_entries = False
        return self.num_inference_steps

    def _entries_before(self, count: int) -> int:
        """Return the index into `timesteps` of the first evaluation after `count` steps, as the pipeline counts them.

        Pipelines that pass `sigmas` take the number of timesteps for the number of steps N. They leave out
        floor(N * (1 - strength)) of them, from which the steps follow if only one number of steps fits.
        """
        listed, steps = len(self.evaluations), len(self.grid) - 1 - self.first_step
        if not listed or count <= 0:
            return count
        low = high = count
        if self._counts_entries:
            low, high = count * steps // listed, -(-(count + 1) * steps // listed) - 1
        index = listed if low >= steps else self._start_of(self.first_step + low)
        if low != high:
            why: str | None = (
                f"this {type(self).__name__} makes {listed} evaluations in {steps} steps, and the pipeline takes them "
                "for its steps, so that the step to begin at cannot be told from the strength; call "
                "flowaccel.accelerate(pipe, []), which tells it, or use another strength"
            )
        else:
            why = self._why_not_from(self.first_step + low)
        self._asked.setdefault(index, why)  # the first query sets the start; later ones compute the progress bar
        return index

    def _start_of(self, step: int) -> int:
        """Return the index of the evaluation at the start of step `step`."""
        return next(i for i, e in enumerate(self.evaluations) if (e.step, e.stage) == (step, 0))

    def _why_not_from(self, step: int) -> str | None:
        """Return the reason why a run cannot begin at step `step`, or None."""
        return None

    @property
    def _first_entry(self) -> int:
        """Index at which the next run begins, as far as it is known before its first step."""
        if self._begin_index is not None:
            return self._begin_index
        return next((index for index in self._asked if index < len(self.evaluations)), 0)

    def _check_begin(self, index: int) -> None:
        if index == 0 or not self.evaluations:
            return
        if not 0 <= index <= len(self.evaluations):
            raise ValueError(f"begin index must be in 0 .. {len(self.evaluations)}, got {index}")
        why = self._asked.get(index)
        if why is not None:
            raise ValueError(why)
        if index < len(self.evaluations) and self.evaluations[index].stage and not self.begins_midway:
            starts = [i for i, other in enumerate(self.evaluations) if other.stage == 0]
            raise ValueError(f"{type(self).__name__} can only begin where a step starts, at {starts}; got {index}")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        first_step: int = 0,
    ) -> None:
        """Set the grid and the evaluations of the next run, and reset the state of the last one.

        Args:
            num_inference_steps: number of steps; may be left out where `sigmas` is given, or the scheduler was made
                with a grid.
            device: device of `timesteps`.
            sigmas: the noise levels that the steps start from, decreasing, in (0, 1]; they are shifted like the
                default ones, which are uniform: 1, 1 - 1/N, ..., 1/N.
            mu: strength of resolution-dependent shifting; needed where `use_dynamic_shifting` is set.
            first_step: steps of the grid to leave out at its noisy end (image to image). `timesteps` then holds the
                rest only, and its first step has no velocity to reuse: a pseudo-corrector step becomes a Heun step.

        Raises:
            ValueError: neither count nor levels, or both and they disagree, levels out of order, `mu` missing, a first
                step that is out of range or cannot be a first one.
        """
        if self._fixed is None:
            self.grid = self._usual(num_inference_steps, sigmas, mu)
        else:
            self.grid = _fixed_levels(self._fixed, num_inference_steps, sigmas)
        self.num_inference_steps = len(self.grid) - 1
        last = self.last_start(self.num_inference_steps)
        if not 0 <= first_step <= last:
            raise ValueError(
                f"first_step must be in 0 .. {last} for {self.num_inference_steps} steps, got {first_step}"
            )
        self.first_step = first_step
        self.evaluations = self._plan(self.num_inference_steps)
        levels = torch.tensor([evaluation.sigma for evaluation in self.evaluations], dtype=torch.float32)
        self.timesteps = (levels * self.config.num_train_timesteps).to(device)
        self.sigmas = torch.cat([levels, torch.zeros(1)])
        self._begin_index = None
        self._step_index = None
        self._counts_entries = sigmas is not None
        self._asked = {}
        self._forget()

    def _usual(self, count: int | None, sigmas: Sequence[float] | None, mu: float | None) -> list[float]:
        return [self._shift(level, mu) for level in _starting_levels(count, sigmas)] + [0.0]

    def _shift(self, sigma: float, mu: float | None) -> float:
        if not self.config.use_dynamic_shifting:
            return shifted(sigma, self.config.shift)
        if mu is None:
            raise ValueError("mu must be given to set_timesteps, because use_dynamic_shifting is set")
        exponential = self.config.time_shift_type == "exponential"
        return shifted(sigma, math.exp(mu) if exponential else mu)

    def width(self, step: int) -> float:
        """Return the change of sigma over step `step` (negative)."""
        return self.grid[step + 1] - self.grid[step]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        project: Project | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Process one evaluation of the network.

        Args:
            model_output: (B, ...) guided velocity, noise - data, at `sample` and `timestep`.
            timestep: the entry of `timesteps` that the network was evaluated at.
            sample: (B, ...) state that the network was evaluated at.
            generator: randomness of stochastic samplers, one generator or one per image.
            return_dict: return a `SchedulerOutput` rather than a 1-tuple.
            project: applied to the state, `project(state, sigma)`, if this evaluation is the last of its step
                (inpainting); the next step starts from its result.

        Returns:
            `prev_sample`: the input of the next evaluation, or after the last one the finished sample; computed in at
                least float32 and returned in the dtype of `model_output`.

        Raises:
            ValueError: called before `set_timesteps`, after the last evaluation, or at a timestep that is not in the
                list.
        """
        self._generator = generator
        self._project = project
        index = self._begin(timestep) if self._step_index is None else self._step_index
        if index >= len(self.evaluations):
            raise ValueError(
                f"step was called {index + 1} times for {len(self.evaluations)} evaluations; call set_timesteps"
            )
        precise = torch.promote_types(sample.dtype, torch.float32)
        advanced = self._advance(index, model_output.to(precise), sample.to(precise)).to(model_output.dtype)
        self._step_index = index + 1
        if self._step_index == len(self.evaluations):
            self._forget()
        return SchedulerOutput(prev_sample=advanced) if return_dict else (advanced,)

    def _finished(self, step: int, state: Tensor) -> Tensor:
        """Return the state at the end of step `step` with the projection of the caller applied."""
        return state if self._project is None else self._project(state, self.grid[step + 1])

    def _begin(self, timestep: float | Tensor) -> int:
        if not self.evaluations:
            raise ValueError("call set_timesteps before step")
        if self._begin_index is None:
            index = self._index_of(timestep)
            self._check_begin(index)
            if index and index not in self._asked and len(self.evaluations) != len(self.grid) - 1 - self.first_step:
                raise ValueError(
                    f"{type(self).__name__} lists {len(self.evaluations)} evaluations in `timesteps`, and the run left "
                    f"out {index} of them without asking where a step begins; slice by timesteps[steps_left_out * "
                    f"scheduler.order :], or call set_begin_index({index}) if this is what you want"
                )
            return index
        if self._begin_index >= len(self.evaluations):
            raise ValueError(f"begin index must be in 0 .. {len(self.evaluations) - 1}, got {self._begin_index}")
        return self._begin_index

    def _index_of(self, timestep: float | Tensor) -> int:
        """Return the index of the evaluation at `timestep`, that at the start of a step if there are several."""
        value = float(timestep)
        scale = self.config.num_train_timesteps
        matches = [
            i
            for i, e in enumerate(self.evaluations)
            if math.isclose(e.sigma * scale, value, rel_tol=1e-5, abs_tol=1e-4)
        ]
        if not matches:
            raise ValueError(f"timestep {value} is not one of this run's timesteps {self.timesteps.tolist()}")
        return next((i for i in matches if self.evaluations[i].stage == 0), matches[0])

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return `sample` unchanged: flow models take their state unscaled."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Return (1 - sigma) * `sample` + sigma * `noise` at `timestep` (a scalar or (B,)), for image to image."""
        level = torch.as_tensor(timestep, device=sample.device, dtype=sample.dtype) / self.config.num_train_timesteps
        level = level.reshape(-1, *[1] * (sample.dim() - 1))
        return noised(sample, level, noise)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _starting_levels(count: int | None, sigmas: Sequence[float] | None) -> list[float]:
    if sigmas is None:
        if count is None or count < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {count}")
        return [1 - k / count for k in range(count)]
    levels = [float(level) for level in sigmas]
    if count is not None and count != len(levels):
        raise ValueError(f"sigmas must have num_inference_steps = {count} entries, got {len(levels)}")
    if not levels or any(not 0 < level <= 1 for level in levels):
        raise ValueError(f"sigmas must lie in (0, 1], got {levels}")
    if any(later >= earlier for earlier, later in pairwise(levels)):
        raise ValueError(f"sigmas must decrease, got {levels}")
    return levels


def _fixed_levels(grid: Sequence[float], count: int | None, sigmas: Sequence[float] | None) -> list[float]:
    """Return the grid that a scheduler was made with, unless a run requests another one.

    Pipelines pass the uniform levels of their number of steps by default; any other levels are a request.
    """
    steps = len(grid) - 1
    asked = _starting_levels(steps if count is None and sigmas is None else count, sigmas)
    if len(asked) != steps:
        raise ValueError(
            f"this scheduler has a grid of {steps} steps, but num_inference_steps is {len(asked)}; call the pipeline "
            f"with num_inference_steps={steps}, or search a grid of {len(asked)} steps (flowaccel calibrate --method "
            f"boss --steps {len(asked)})"
        )
    if any(not math.isclose(level, 1 - k / steps, abs_tol=1e-5) for k, level in enumerate(asked)):
        raise ValueError(f"this scheduler has a grid of its own, {list(grid)}; leave sigmas out, got {list(asked)}")
    return [float(level) for level in grid]


def _check_grid(grid: Any) -> None:
    numbers = isinstance(grid, (list, tuple)) and all(is_number(level) for level in grid)
    # Written so that NaN fails too.
    if (
        not numbers
        or len(grid) < 2
        or (grid[0], grid[-1]) != (1, 0)
        or not all(earlier > later for earlier, later in pairwise(grid))
    ):
        raise ValueError(
            "grid must be a list of noise levels that decrease from exactly 1 (noise) to exactly 0 (data), such as "
            f"[1.0, 0.8, 0.3, 0.0], got {grid!r}"
        )
