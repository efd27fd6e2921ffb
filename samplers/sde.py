"""SiT's stochastic samplers (arXiv 2401.08740): dx = (v + w * score) dt + sqrt(2 w) dW, on the linear path.

The maths runs in SiT's convention (t = 1 - sigma, velocity data - noise); the interface is diffusers'.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flowaccel.samplers.base import Evaluation, FlowSampler, Project
from flowaccel.samplers.paths import LINEAR, diffusion

LAST_STEPS = ("mean", "euler", "tweedie", "none")
FORMS = ("sigma", "linear", "decreasing", "constant")
Generators = torch.Generator | list[torch.Generator] | None


class FlowSDEScheduler(FlowSampler):
    """Euler-Maruyama or Heun scheduler for SiT's SDE on a uniform grid, closed by one deterministic step.

    N steps: N - 1 stochastic ones over t in [0, 1 - last_step_size], then the last. With `last_step="none"` all N are
    stochastic and reach t = 1. Given a list of generators, every image draws its noise from its own.

    Args:
        solver: `euler` (Euler-Maruyama, one evaluation a step) or `heun` (noise first, then one trapezoid step of the
            drift; two). `heun` needs `prepare_sample` before the first evaluation, which `SiTPipeline` calls.
        diffusion_form: w(t): `sigma` (1 - t), `linear` (1 - t), `decreasing` 0.25 (norm cos(pi t) + 1)^2, `constant`.
            It is half of the coefficient that the paper writes. SiT's `SBDM` is infinite at t = 0 on this path and
            therefore not offered.
        diffusion_norm: factor in w.
        last_step: `mean` (drift without noise), `euler` (velocity only), `tweedie` (posterior mean), `none`.
        last_step_size: length of the last step in t, in (0, 1).
        num_train_timesteps: factor between sigma and timestep.

    Raises:
        ValueError: an unknown option, or a `last_step_size` out of range.
    """

    @register_to_config
    def __init__(
        self,
        solver: Literal["euler", "heun"] = "euler",
        diffusion_form: Literal["sigma", "linear", "decreasing", "constant"] = "sigma",
        diffusion_norm: float = 1.0,
        last_step: Literal["mean", "euler", "tweedie", "none"] = "mean",
        last_step_size: float = 0.04,
        num_train_timesteps: int = 1000,
    ) -> None:
        for name, value, allowed in (
            ("solver", solver, ("euler", "heun")),
            ("diffusion_form", diffusion_form, FORMS),
            ("last_step", last_step, LAST_STEPS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if not 0 < last_step_size < 1:
            raise ValueError(f"last_step_size must lie in (0, 1), got {last_step_size}")
        self._initialise()
        self._forget()

    def _shift(self, sigma: float, mu: float | None) -> float:
        return sigma  # the published grid is uniform, whatever resolution-dependent shift a pipeline offers

    def _plan(self, steps: int) -> list[Evaluation]:
        closed = self.config.last_step != "none"
        if closed and steps < 2:
            raise ValueError(
                f"num_inference_steps must be at least 2 with last_step={self.config.last_step!r}, got {steps}"
            )
        if closed:
            reach = 1 - self.config.last_step_size
            self.grid = [1 - reach * k / (steps - 1) for k in range(steps)] + [0.0]
        stages = (0, 1) if self.config.solver == "heun" else (0,)
        stochastic = steps - 1 if closed else steps
        plan = [
            Evaluation(step=step, stage=stage, sigma=self.grid[step + stage])
            for step in range(self.first_step, stochastic)
            for stage in stages
        ]
        return [*plan, Evaluation(step=steps - 1, stage=0, sigma=self.grid[steps - 1])] if closed else plan

    def _forget(self) -> None:
        self._noised: Tensor | None = None
        self._drift: Tensor | None = None
        self._prepared = False

    def prepare_sample(
        self, sample: Tensor, generator: Generators = None, variance_noise: Tensor | None = None
    ) -> Tensor:
        """Return the input of the first evaluation.

        It is `sample` with the noise of the first step for `heun`, and otherwise `sample` itself.

        Args:
            sample: (B, ...) the state at the first timestep.
            generator: one generator, or one per image.
            variance_noise: (B, ...) standard normal noise to use instead.
        """
        self._prepared = True
        first = self.first_step
        noise_first = self.config.solver == "heun" and first < self._stochastic_steps
        return self._with_noise(first, sample, generator, variance_noise) if noise_first else sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        project: Project | None = None,
        variance_noise: Tensor | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Process one evaluation as `FlowSampler.step` does.

        `variance_noise` (B, ...) replaces the standard normal noise that this call would draw.
        """
        self._variance_noise = variance_noise
        return super().step(model_output, timestep, sample, generator, return_dict, project)

    def _advance(self, index: int, velocity: Tensor, sample: Tensor) -> Tensor:
        evaluation = self.evaluations[index]
        step, t, velocity = evaluation.step, 1 - evaluation.sigma, -velocity
        if self.config.last_step != "none" and step == len(self.grid) - 2:
            return self._finished(step, self._last(t, velocity, sample))
        drift = velocity + self._w(t) * self._score(velocity, sample, t)
        if self.config.solver == "euler":
            noised = self._with_noise(step, sample, self._generator, self._variance_noise)
            return self._finished(step, noised - self.width(step) * drift)
        if evaluation.stage == 0:
            if not self._prepared:
                raise ValueError(
                    "solver='heun' adds noise before the first evaluation: use SiTPipeline, or solver='euler'"
                )
            self._noised, self._drift = sample, drift
            return sample - self.width(step) * drift
        assert self._noised is not None and self._drift is not None
        state = self._finished(step, self._noised - self.width(step) / 2 * (self._drift + drift))
        stochastic_next = (
            index + 1 < len(self.evaluations) and self.evaluations[index + 1].step < self._stochastic_steps
        )
        return self._with_noise(step + 1, state, self._generator, self._variance_noise) if stochastic_next else state

    @property
    def _stochastic_steps(self) -> int:
        return len(self.grid) - (1 if self.config.last_step == "none" else 2)

    def _last(self, t: float, velocity: Tensor, sample: Tensor) -> Tensor:
        size = self.config.last_step_size
        score = self._score(velocity, sample, t)
        if self.config.last_step == "mean":
            return sample + size * (velocity + self._w(t) * score)
        if self.config.last_step == "euler":
            return sample + size * velocity
        return sample / t + (1 - t) ** 2 / t * score

    def _w(self, t: float) -> float:
        time = torch.tensor([t], dtype=torch.float64)
        return float(diffusion(LINEAR, time, self.config.diffusion_form, self.config.diffusion_norm))

    def _score(self, velocity: Tensor, sample: Tensor, t: float) -> Tensor:
        return (t * velocity - sample) / (1 - t)

    def _with_noise(self, step: int, sample: Tensor, generator: Generators, noise: Tensor | None) -> Tensor:
        """Return `sample` plus the Brownian increment of step `step`."""
        if noise is None:
            # Guided pipelines hand over both halves of a doubled batch: the same image gets the same noise in both.
            images = len(generator) if isinstance(generator, list) else sample.shape[0]
            noise = randn_tensor(
                (images, *sample.shape[1:]), generator=generator, device=sample.device, dtype=sample.dtype
            )
            noise = noise.repeat(sample.shape[0] // images, *[1] * (sample.dim() - 1))
        spread = (-2 * self._w(1 - self.grid[step]) * self.width(step)) ** 0.5
        return sample + spread * noise.to(sample.dtype)
