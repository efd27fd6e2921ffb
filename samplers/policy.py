"""Steps to noise levels that a policy decides on, separately for every image (RAPID3, arXiv 2509.22323; TPDM, arXiv
2412.01243)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from flowaccel.samplers.base import Evaluation, FlowSampler, TimeShift
from flowaccel.samplers.formulas import extrapolated

Decide = Callable[[Tensor, tuple[float, ...]], Sequence[float]]
"""Function `decide(velocity, levels)` that returns the B noise levels to step to.

`velocity` (B, ...) is the network's guided output, and `levels` the B noise levels that it was evaluated at. Each
returned level is below the current one, or 0 if that is 0 (the image is done).
"""


class PolicyScheduler(FlowSampler):
    """Scheduler whose steps end where `decide` chooses during the run, image by image.

    `timesteps` are entries to loop over: their number is the most steps that a run takes, and the last one goes to 0.
    The times of images that are done sooner stay 0. The network must be called at `levels`, not at the listed
    timesteps; `flowaccel.LearnedPolicy` does so. Without `decide` it steps on the usual grid.

    Args:
        max_steps: the most entries, whatever number of steps is asked for; None for no bound.
        solver_order: 1 for Euler's method, as in the papers; 2 for Adams-Bashforth's of second order, which takes the
            velocity of the step before along and allows for steps of different width.
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
            time_shift_type: the grid, as in `FlowTurboScheduler`; only used without `decide` and by `usual_grid`.

    Raises:
        ValueError: another order.
    """

    decide: Decide | None = None

    @register_to_config
    def __init__(
        self,
        max_steps: int | None = None,
        solver_order: Literal[1, 2] = 1,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        time_shift_type: TimeShift = "exponential",
    ) -> None:
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 (Euler) or 2 (Adams-Bashforth), got {solver_order!r}")
        self._initialise()
        self._mu: float | None = None
        self._forget()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        first_step: int = 0,
    ) -> None:
        """Set the timesteps as every `FlowSampler` does, with at most `max_steps` steps.

        If `decide` is set, only the number of the given levels matters.
        """
        most, self._clipped = self.config.max_steps, False
        if self.decide is not None:
            num_inference_steps = (
                len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
            )
            sigmas = None
            if most is not None and num_inference_steps is not None:
                self._clipped = num_inference_steps > most
                num_inference_steps = min(num_inference_steps, most)
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, mu=mu, first_step=first_step)
        self._mu = mu

    def _why_not_from(self, step: int) -> str | None:
        if not self._clipped:
            return None
        return (
            f"a run that begins midway needs a number of steps that max_steps allows, or its steps are not those that "
            f"were asked for; use num_inference_steps={self.config.max_steps} or less"
        )

    def usual_grid(self, steps: int) -> list[float]:
        """Return the steps + 1 noise levels, from 1 to 0, of a run of `steps` steps without `decide`.

        They have the shift of this run, whatever its own number of steps.

        Raises:
            ValueError: fewer than 1, or called before `set_timesteps` if that sets the shift.
        """
        return self._usual(steps, None, self._mu)

    def _plan(self, steps: int) -> list[Evaluation]:
        return [Evaluation(step=step, stage=0, sigma=self.grid[step]) for step in range(self.first_step, steps)]

    def _forget(self) -> None:
        self._levels: tuple[float, ...] = ()
        self._previous: tuple[Tensor, Tensor] | None = None

    def levels(self, images: int) -> tuple[float, ...]:
        """Return the noise levels of the next network call, for a batch of `images` images."""
        if not self._levels:
            self._levels = (self.evaluations[self._first_entry].sigma,) * images
        return self._levels

    @property
    def done(self) -> bool:
        """Whether all images are done."""
        return bool(self._levels) and not any(self._levels)

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        if self._project is not None:
            raise ValueError("PolicyScheduler does not inpaint: its images are at different noise levels; use another")
        now = self.levels(len(sample))
        copies, images = len(sample) // len(now), len(now)
        if index + 1 == len(self.evaluations) or not any(now):
            after: tuple[float, ...] = (0.0,) * images
        elif self.decide is None:
            after = (self.evaluations[index + 1].sigma,) * images
        else:
            after = tuple(self.decide(velocity[:images], now))
            _check(now, after)
        self._levels = after
        width = torch.tensor(after, dtype=torch.float32) - torch.tensor(now, dtype=torch.float32)
        width = width.repeat(copies).to(sample.device).view(-1, *[1] * (sample.dim() - 1))
        return sample + width * self._slope(velocity, width)

    def _slope(self, velocity: Tensor, width: Tensor) -> Tensor:
        """Return the slope (B, ...) of this step; `width` (B, 1, ...) is 0 for images that are done."""
        before, self._previous = self._previous, (velocity, width)
        if self.config.solver_order == 1 or before is None:
            return velocity
        previous, last = before
        return extrapolated(velocity, previous, torch.where(last == 0, 0.0, width / last))


def _check(now: tuple[float, ...], after: tuple[float, ...]) -> None:
    falls = len(after) == len(now) and all(
        0 <= new < old or new == old == 0 for old, new in zip(now, after, strict=True)
    )
    if not falls:
        raise ValueError(
            f"decide must return a smaller noise level per image, or 0 for one that is done: {now}, {after}"
        )
