"""FlowTurbo (arXiv 2409.18128): Heun steps, pseudo-corrector steps that reuse a velocity, and velocity-refiner
steps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowaccel.samplers.base import Evaluation, FlowSampler, FusedStep, TimeShift
from flowaccel.samplers.formulas import corrected, predicted

REFINER_MODES = ("released", "consistent", "single")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Numbers of steps of each kind in a run, in this order."""

    heun: int
    pseudo: int
    refine: int

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """Read a configuration string such as `H2P4R2`; each part may be missing, the order is fixed.

        Raises:
            ValueError: not of that form, no step at all, or refiner steps without a step that computes a velocity.
        """
        match = re.fullmatch(r"(?:H(\d+))?(?:P(\d+))?(?:R(\d+))?", text)
        if not text or not match:
            raise ValueError(
                "blocks must look like 'H2P4R2' (Heun, pseudo-corrector, refiner steps in this order, each optional), "
                f"got {text!r}"
            )
        blocks = cls(
            **{name: int(n or 0) for name, n in zip(("heun", "pseudo", "refine"), match.groups(), strict=True)}
        )
        if blocks.total == 0:
            raise ValueError(f"blocks must hold at least one step, got {text!r}")
        if blocks.refine and not blocks.heun + blocks.pseudo:
            raise ValueError(
                f"refiner steps need a velocity to refine: put at least one H or P step first, got {text!r}"
            )
        return blocks

    @property
    def total(self) -> int:
        """Number of steps."""
        return self.heun + self.pseudo + self.refine

    @property
    def kinds(self) -> str:
        """One letter per step, for example `HHPPPPRR`."""
        return "H" * self.heun + "P" * self.pseudo + "R" * self.refine


class Refinement(NamedTuple):
    """Inputs of a refiner evaluation: the network's output is `base + refiner([sample; feed])`."""

    feed: Tensor
    base: Tensor


class FlowTurboScheduler(FlowSampler):
    """Scheduler with the H, P and R steps of FlowTurbo (arXiv 2409.18128, section 3).

    With d, e the velocities at the start and at the predicted end of a step and c the carried velocity, every step
    ends in `x + width / 2 * (d + e)`:

    * H (Heun): d and e by the network; carries e.
    * P (pseudo-corrector): d = c, e by the network; carries e. The first step of a run, which has no c, is a Heun step.
    * R (refiner): d = c + r(x; c), e = d + r(x + width * d; c) by the refiner alone; carries d.

    An R evaluation still calls the transformer; the `VelocityRefiner` accelerator replaces it by the
    refiner, and without it an R step runs the base network. A begin index on the second evaluation of a step (image to
    image) starts the following step with the velocity found there.

    Args:
        blocks: the steps, such as `H2P4R2`; `num_inference_steps` must equal their sum.
        refiner_mode: `released`, the published code's R step above; `consistent`, in which the refiner always sees the
            velocity of the step before, as in its training (the second evaluation is fed d, and H and P hand d to the
            first R); `single`, one evaluation and an Euler step, the paper's equation 7.
        num_train_timesteps: factor between sigma and timestep.
        shift: SD3's time shift of the uniform grid; 1 leaves it uniform.
        use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, time_shift_type:
            resolution-dependent shifting, as in `FlowMatchEulerDiscreteScheduler`.
        grid: noise levels to step over, from 1 to 0, instead of the shifted uniform ones: taken as they are, with no
            shift, and for their own number of steps only (`flowaccel calibrate --method boss` searches them).

    Raises:
        ValueError: bad `blocks`, `refiner_mode` or `grid`.
    """

    begins_midway: ClassVar[bool] = True
    refiner: Any = None
    """Network that replaces the base network on R steps; set and removed by `VelocityRefiner`, read by compiled
    blocks."""

    @register_to_config
    def __init__(
        self,
        blocks: str = "H2P4R2",
        refiner_mode: Literal["released", "consistent", "single"] = "released",
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
        if refiner_mode not in REFINER_MODES:
            raise ValueError(f"refiner_mode must be one of {REFINER_MODES}, got {refiner_mode!r}")
        self.blocks: Blocks = Blocks.parse(blocks)
        if isinstance(grid, (list, tuple)) and len(grid) != self.blocks.total + 1:
            raise ValueError(
                f"grid must have {self.blocks.total + 1} levels for the {self.blocks.total} steps of {blocks!r}, got "
                f"{len(grid)}"
            )
        self._initialise()
        self._forget()

    @property
    def default_num_inference_steps(self) -> int:
        """The only number of steps that fits `blocks`."""
        return self.blocks.total

    def last_start(self, steps: int) -> int:
        """Return the last H or P step: an R step has nothing to refine at the start of a run."""
        if steps != self.blocks.total:
            raise ValueError(
                f"num_inference_steps must be {self.blocks.total} for blocks {self.config.blocks!r} (H + P + R), "
                f"got {steps}"
            )
        return self.blocks.heun + self.blocks.pseudo - 1

    @property
    def fused_steps(self) -> list[FusedStep]:
        """H, P and R steps of the current run; the first one is H if it has no velocity to reuse."""
        kinds: Any = self.blocks.kinds
        return [
            FusedStep(
                kind="H" if step == self.first_step else kinds[step],
                step=step,
                carries_start=self._carries_start(step),
                mode=self.config.refiner_mode,
            )
            for step in range(self.first_step, self.blocks.total)
        ]

    def _plan(self, steps: int) -> list[Evaluation]:
        plan = []
        for step, kind in list(enumerate(self.blocks.kinds))[self.first_step :]:
            stages = (1,) if kind == "P" and step > self.first_step else (0,) if self._is_single(kind) else (0, 1)
            plan += [Evaluation(step=step, stage=stage, sigma=self.grid[step + stage]) for stage in stages]
        return plan

    def _start_of(self, step: int) -> int:
        # A P step has no evaluation at its start, but the last one of the previous step is made there; a run that
        # begins with that one takes the P step as a Heun step.
        return max(i for i, e in enumerate(self.evaluations) if e.step + e.stage == step)

    def _why_not_from(self, step: int) -> str | None:
        last, steps = self.last_start(self.blocks.total), self.blocks.total
        if not last < step < steps:
            return None
        return (
            f"the run would begin at step {step} of {steps}, an R step, which has no velocity to refine; leave out at "
            f"most {last} steps: use a strength of {math.ceil(1000 * (steps - last) / steps) / 1000:g} or more"
        )

    def _is_single(self, kind: str) -> bool:
        return kind == "R" and self.config.refiner_mode == "single"

    def _forget(self) -> None:
        self._state: Tensor | None = None
        self._slope: Tensor | None = None
        self._cache: Tensor | None = None

    @property
    def state(self) -> Tensor | None:
        """State x at the start of the current step (None before the first evaluation and after the last)."""
        return self._state

    @property
    def velocity_cache(self) -> Tensor | None:
        """The carried velocity c (None if there is none yet)."""
        return self._cache

    @property
    def refinement(self) -> Refinement | None:
        """Inputs of the refiner at the next evaluation, or None if the base network is due."""
        if self._cache is None or self._step_index is None:
            return None
        evaluation = self.evaluations[self._step_index]
        if self.blocks.kinds[evaluation.step] != "R":
            return None
        if evaluation.stage == 0:
            return Refinement(feed=self._cache, base=self._cache)
        assert self._slope is not None
        feed = self._slope if self.config.refiner_mode == "consistent" else self._cache
        return Refinement(feed=feed, base=self._slope)

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        evaluation = self.evaluations[index]
        step, kind = evaluation.step, self.blocks.kinds[evaluation.step]
        if evaluation.stage == 0:
            return self._predict(step, kind, velocity, sample)
        if self._state is None or self._slope is None:  # the run begins here: only the velocity is used
            return self._hand_over(step, sample, velocity)
        state = corrected(self._state, self.width(step), self._slope, velocity)
        return self._hand_over(step, state, self._slope if self._carries_start(step) else velocity)

    def _predict(self, step: int, kind: str, velocity: Tensor, sample: Tensor) -> Tensor:
        ahead = predicted(sample, self.width(step), velocity)
        if self._is_single(kind):
            return self._hand_over(step, ahead, velocity)
        self._state, self._slope = sample, velocity
        if self._cache is None:
            self._cache = velocity
        return ahead

    def _hand_over(self, step: int, state: Tensor, carried: Tensor) -> Tensor:
        """Finish step `step` at `state`; returns the network's next input."""
        state = self._finished(step, state)
        self._state, self._slope, self._cache = state, None, carried
        if self._kind_after(step) != "P":
            return state
        self._slope = carried
        return predicted(state, self.width(step + 1), carried)

    def _carries_start(self, step: int) -> bool:
        consistent_next_r = self.config.refiner_mode == "consistent" and self._kind_after(step) == "R"
        return self.blocks.kinds[step] == "R" or consistent_next_r

    def _kind_after(self, step: int) -> str | None:
        return self.blocks.kinds[step + 1] if step + 1 < self.blocks.total else None
