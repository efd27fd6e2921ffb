"""Sources of a policy's decisions: its heads, or a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flowaccel.methods.policy.heads import jump_distribution, jump_mode
from flowaccel.methods.policy.network import STEP, AccelerationPolicy, Choices


@dataclass(frozen=True)
class Sight:
    """Inputs of a decision, for some images of a batch."""

    step: int
    """Index of the network evaluation in the run."""
    images: Sequence[int]
    """Indices of the R images."""
    features: Tensor
    """(R, C, H, W) what the head sees."""
    condition: Tensor
    """(R, D) what it sees besides."""


class DecisionSource(Protocol):
    """Source of decisions."""

    def jump(self, sight: Sight, levels: Sequence[float]) -> list[float]:
        """Return the noise level in [0, 1] that each image goes to next, below its present one in `levels`."""

    def choose(self, level: str, sight: Sight) -> list[int]:
        """Return a choice for each image, of the head `cache`, `sparse` or `count`."""


@dataclass
class HeadSource:
    """Decisions of the heads: the likeliest ones, or sampled ones.

    Args:
        policy: the heads.
        generators: one per image of the batch, to sample with, so that a rollout depends on its own alone; None takes
            the mode of the jump's density, and the likeliest choice.
        limits: the least and the largest share of its time that a step keeps.
        log: dictionary that receives all decisions, on the CPU; None keeps no log.
    """

    policy: AccelerationPolicy
    generators: Sequence[np.random.Generator] | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    log: dict[str, list[Choices]] | None = None

    def jump(self, sight: Sight, levels: Sequence[float]) -> list[float]:
        """Return floor(time * share), on the scale of the policy; see `DecisionSource.jump`."""
        raw = self._raw(STEP, sight)
        if self.generators is None:
            shares: list[float] = jump_mode(raw).tolist()
        else:
            beta = jump_distribution(raw)
            peaks = zip(sight.images, beta.concentration1.tolist(), beta.concentration0.tolist(), strict=True)
            shares = [float(self.generators[image].beta(a, b)) for image, a, b in peaks]
        self._note(STEP, sight, shares)
        return [self._next(level, share) for level, share in zip(levels, shares, strict=True)]

    def _next(self, level: float, share: float) -> float:
        config, (low, high) = self.policy.config, self.limits
        time = math.floor(round(level * config.num_train_timesteps) * min(max(share, low), high))
        return 0.0 if time < config.smallest else time / config.num_train_timesteps

    def choose(self, level: str, sight: Sight) -> list[int]:
        """See `DecisionSource.choose`."""
        raw = self._raw(level, sight)
        if self.generators is None:
            chosen: list[int] = raw.argmax(dim=1).tolist()
        else:
            shares = raw.double().softmax(dim=1).cumsum(dim=1)[:, :-1]
            drawn = torch.tensor([[self.generators[image].random()] for image in sight.images], dtype=torch.float64)
            chosen = (drawn >= shares).sum(dim=1).tolist()
        self._note(level, sight, chosen)
        return chosen

    @torch.no_grad()
    def _raw(self, level: str, sight: Sight) -> Tensor:
        if self.policy.device != sight.features.device:  # not at attach: an offloaded network is not where it computes
            self.policy.to(sight.features.device)
        found: Tensor = self.policy(level, sight.features, sight.condition).cpu()
        return found

    def _note(self, level: str, sight: Sight, chosen: Sequence[float]) -> None:
        if self.log is not None:
            seen = (sight.features.float().cpu(), sight.condition.float().cpu())
            self.log.setdefault(level, []).append(Choices(torch.tensor(sight.images), *seen, torch.tensor(chosen)))


@dataclass(frozen=True)
class ScriptSource:
    """Decisions from a script, per image of the batch (one entry: the same for all) and step.

    Past its end the last one is repeated.

    Args:
        levels: noise levels to go to.
        choices: per head, choices; 0 of a head that is not among them.
    """

    levels: Sequence[Sequence[float]] = ()
    choices: dict[str, Sequence[Sequence[int]]] | None = None

    def jump(self, sight: Sight, levels: Sequence[float]) -> list[float]:
        """See `DecisionSource.jump`."""
        return self._written(self.levels, sight)

    def choose(self, level: str, sight: Sight) -> list[int]:
        """See `DecisionSource.choose`."""
        return self._written((self.choices or {}).get(level, ((0,),)), sight)

    def _written(self, rows: Sequence[Sequence[Any]], sight: Sight) -> list[Any]:
        found = [rows[image if len(rows) > 1 else 0] for image in sight.images]
        return [row[min(sight.step, len(row) - 1)] for row in found]
