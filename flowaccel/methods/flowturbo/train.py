"""Training FlowTurbo's velocity refiner (arXiv 2409.18128, section 3.2): no ODE trajectories, no generated pairs.

Convention: SiT's (t = 1 data, velocity data - noise).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowaccel.data import ImageSet

DELTA_MAX = 0.12


@dataclass(frozen=True, kw_only=True)
class RefinerTerms:
    """Terms of one evaluation of the objective; velocities and offsets are (B, C, S, S)."""

    velocity: Tensor
    """The teacher's velocity at time t, which the refiner is fed."""
    next_state: Tensor
    """State after one Euler step of length delta."""
    next_time: Tensor
    """(B,) t + delta."""
    target: Tensor
    """Teacher's velocity at `next_state`."""
    offset: Tensor
    """The refiner's output."""
    loss: Tensor
    """(B,) mean square of velocity + offset - target."""


def refiner_terms(
    refiner: nn.Module,
    teacher: nn.Module,
    state: Tensor,
    t: Tensor,
    delta: Tensor,
    labels: Tensor,
    dropped: Tensor,
    *,
    null_label: int,
    guidance_scale: float = 1.0,
    drop_both: bool = False,
    clamp: bool = False,
) -> RefinerTerms:
    """Compute the terms of the objective for given draws.

    Args:
        refiner: the network being trained, called on [state; velocity].
        teacher: the frozen base network.
        state: (B, C, S, S) states at time t.
        t: (B,) times in [0, 1).
        delta: step length, (1,) for the whole batch or (B,).
        labels: (B,) classes.
        dropped: (B,) booleans: rows whose target and refiner are conditioned on the null label.
        null_label: the null class.
        guidance_scale: feed the refiner velocities guided by this scale, which is what it sees when sampling; 1 feeds
            the conditional one, as published.
        drop_both: let dropped rows be fed the teacher's null velocity, as the paper says; the published code keeps the
            label.
        clamp: keep t + delta at or below 1; the published code lets it reach 1.12.
    """
    seen = torch.where(dropped, null_label, labels)
    if clamp:
        delta = torch.minimum(delta.expand_as(t), 1 - t)
    with torch.no_grad():
        velocity = _teacher(teacher, state, t, seen if drop_both else labels, null_label, guidance_scale)
        next_state = state + delta.reshape(-1, 1, 1, 1) * velocity
        next_time = t + delta
        target = teacher(next_state, next_time, seen, return_dict=False)[0]
    offset = refiner(torch.cat([next_state, velocity], dim=1), next_time, seen, return_dict=False)[0]
    loss = (velocity + offset - target).float().square().flatten(1).mean(1)
    return RefinerTerms(
        velocity=velocity, next_state=next_state, next_time=next_time, target=target, offset=offset, loss=loss
    )


def _teacher(teacher: nn.Module, state: Tensor, t: Tensor, labels: Tensor, null_label: int, scale: float) -> Tensor:
    conditional = teacher(state, t, labels, return_dict=False)[0]
    if scale == 1:
        return conditional
    null = teacher(state, t, torch.full_like(labels, null_label), return_dict=False)[0]
    return null + scale * (conditional - null)


@dataclass(frozen=True, kw_only=True)
class RefinerObjective:
    """Training objective: `objective(refiner, generator)` -> the mean refiner loss of one freshly drawn batch.

    The defaults are the published recipe; the options are described in `refiner_terms`.
    """

    teacher: nn.Module
    data: ImageSet
    null_label: int
    batch_size: int = 18
    delta_min: float = 0.0
    delta_max: float = DELTA_MAX
    """Step lengths are uniform in [delta_min, delta_max); the widths 1/N of the configurations in mind should lie
    inside. The refiner does not see the length, so a narrow range makes a sharper refiner for fewer configurations."""
    label_drop: float = 0.1
    guidance_scale: float = 1.0
    drop_both: bool = False
    clamp: bool = False
    inside: bool = False
    """Draw t from [0, 1 - delta), so that t + delta never passes the data and every length is seen at every end
    point.
    """
    per_sample_delta: bool = False
    """Draw one step length per image instead of one per batch: the same expectation, less gradient noise."""
    trajectory_steps: int = 0
    """Number of steps of the teacher's own guided Euler trajectories that states come from; 0 for noised data."""

    def __post_init__(self) -> None:
        if not 0 <= self.delta_min < self.delta_max <= 1:
            raise ValueError(f"need 0 <= delta_min < delta_max <= 1, got {self.delta_min} and {self.delta_max}")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"label_drop must lie in [0, 1], got {self.label_drop}")
        if self.guidance_scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, got {self.guidance_scale}")
        if self.trajectory_steps < 0:
            raise ValueError(f"trajectory_steps must not be negative, got {self.trajectory_steps}")

    def __call__(self, refiner: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar; all randomness comes from `generator`."""
        batch = self.batch_size
        index = torch.randint(len(self.data), (batch,), generator=generator)
        images, labels = self.data.images[index], self.data.labels[index]
        noise = torch.randn(images.shape, generator=generator)
        t = torch.rand(batch, generator=generator)
        unit = torch.rand(batch if self.per_sample_delta else 1, generator=generator)
        delta = self.delta_min + unit * (self.delta_max - self.delta_min)
        if self.inside:
            t = t * (1 - delta)
        dropped = torch.rand(batch, generator=generator) < self.label_drop
        device = next(refiner.parameters()).device
        images, labels, noise, t, delta, dropped = (
            value.to(device) for value in (images, labels, noise, t, delta, dropped)
        )
        if self.trajectory_steps:
            state, t = self._trajectory(noise, t, labels)
        else:
            state = t.reshape(-1, 1, 1, 1) * images + (1 - t).reshape(-1, 1, 1, 1) * noise
        terms = refiner_terms(
            refiner,
            self.teacher,
            state,
            t,
            delta,
            labels,
            dropped,
            null_label=self.null_label,
            guidance_scale=self.guidance_scale,
            drop_both=self.drop_both,
            clamp=self.clamp,
        )
        return terms.loss.mean()

    @torch.no_grad()
    def _trajectory(self, noise: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return states of the teacher's Euler solution at the grid points just below `t`, and those times."""
        steps = self.trajectory_steps
        reached = (t * steps).floor()
        state = noise
        for k in range(int(reached.max())):
            time = torch.full_like(t, k / steps)
            velocity = _teacher(self.teacher, state, time, labels, self.null_label, self.guidance_scale)
            state = torch.where((reached > k).reshape(-1, 1, 1, 1), state + velocity / steps, state)
        return state, reached / steps
