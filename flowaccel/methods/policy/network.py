"""Learned acceleration policy: its heads, their inputs, and the likelihood of their choices (RAPID3).

RAPID3 is arXiv 2509.22323; its step head alone is TPDM, arXiv 2412.01243; one number of steps per image is AdaDiff's
idea.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowaccel.checks import is_whole
from flowaccel.methods.policy.heads import JUMP_MARGIN, DecisionHead, choice_distribution, jump_distribution, logits_of

STEP, CACHE, SPARSE, COUNT = "step", "cache", "sparse", "count"
LEVELS = (STEP, CACHE, SPARSE, COUNT)
"""Heads of a policy: jumps in time; blocks whose residual is reused; query-key pairs of attention; number of steps."""
TIMED = frozenset((STEP, COUNT))
"""Heads that choose the times of an image, of which there can be one."""
COMPUTE, REUSE = 0, 1
"""Choices of the cache head. Of the sparse head, 0 is dense and the others are its levels; of the count head, they are
the indices of `counts`."""
_JUMP_BIAS = (2.5, 1.0)
_AT_ONCE = 2**25
"""Numbers of a head's first layer that are held at once where likelihoods are taken: 128 MiB of float32."""
_REUSE_SHARE, _DENSE_SHARE = 0.1, 0.85


@dataclass(frozen=True)
class Choices:
    """Inputs and choices of one head, for R pairs of an image and a step. Forced decisions are not among them."""

    image: Tensor
    """(R,) which image of a rollout, from 0."""
    features: Tensor
    """(R, C, H, W)."""
    condition: Tensor
    """(R, D)."""
    action: Tensor
    """(R,) a share in (0, 1) of the step head, else the number of a choice."""

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Tensor | slice) -> Choices:
        """Return some of the pairs, by their indices."""
        return Choices(self.image[rows], self.features[rows], self.condition[rows], self.action[rows])

    def to(self, device: torch.device) -> Choices:
        """Return the choices on another device."""
        parts = (self.image, self.features, self.condition, self.action)
        return Choices(*(part.to(device) for part in parts))


class AccelerationPolicy(ModelMixin, ConfigMixin):
    """Policy of up to three heads that decide, per image, what is computed; the network stays frozen.

    - `step` sees the predicted velocity and says which share of the time that is left the next step keeps.
    - `cache` sees how far the image has moved since its blocks were last computed and says whether what they added is
      reused.
    - `sparse` sees the image and says how many query-key pairs are left out.
    - `count`, in the place of `step`, sees the first predicted velocity and says, once, how many steps of the
      scheduler's usual grid the image takes. The idea is AdaDiff's, which looks at the prompt alone; the rest is a
      reconstruction. The first prediction costs nothing more, because it is the same for all counts.

    All but the last decide at every step, and all see the embedding that modulates the network's blocks, too.

    Args:
        in_channels: C of what the network takes and returns, as a map: 64 for FLUX, whose latents are packed.
        condition_dim: D of the embedding that modulates the blocks.
        levels: names of the heads.
        sparsity: the shares of key blocks that the levels of the sparse head keep, falling; needs the head.
        counts: the numbers of steps that the count head chooses from, whole and rising; needs the head. One that is
            above the number of steps of a run is cut to it.
        width: width of the heads.
        num_train_timesteps: the scale of time.
        max_steps: the most steps it was trained with; None for any number.
        max_reuse: the most steps in a row that blocks are not computed.
        smallest: times below this are taken for 0 by the step head, or its last steps would be tiny.
        sparse_tokens: the fewest tokens of an image whose attention is made sparse; below 4096 it does not pay.
        dense_blocks: so many of the network's first blocks, and of its last, keep full attention.
        solver_order: order of the steps between chosen times: 1 for Euler's, as in the papers, 2 for Adams-Bashforth's.
        costs: costs of decisions, in computed dense steps: `reuse`, and `sparse`, one per level; measured by the
            training.
        base: the network that it was trained for, by class and a hash of its configuration; None for any.

    Raises:
        ValueError: no levels, unknown ones, or both `step` and `count`; sparsity that does not fall, counts that do not
            rise, either without its head; numbers out of range.
    """

    _keep_in_fp32_modules: ClassVar[list[str]] = ["heads"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        condition_dim: int = 1536,
        levels: Sequence[str] = (STEP, CACHE),
        sparsity: Sequence[float] = (),
        counts: Sequence[int] = (),
        width: int = 128,
        num_train_timesteps: int = 1000,
        max_steps: int | None = 28,
        max_reuse: int = 4,
        smallest: int = 10,
        sparse_tokens: int = 4096,
        dense_blocks: int = 2,
        solver_order: int = 1,
        costs: dict[str, Any] | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        check_levels(levels)
        _check_sparsity(SPARSE in levels, sparsity)
        _check_counts(COUNT in levels, counts)
        for name, value, lowest in (
            ("max_reuse", max_reuse, 1),
            ("smallest", smallest, 1),
            ("max_steps", max_steps, 1),
        ):
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 (Euler) or 2 (Adams-Bashforth), got {solver_order!r}")
        dense = logits_of(_DENSE_SHARE, *[(1 - _DENSE_SHARE) / len(sparsity)] * len(sparsity)) if sparsity else ()
        made = {
            STEP: (0, _JUMP_BIAS),
            # and the time since it was computed
            CACHE: (1, logits_of(1 - _REUSE_SHARE, _REUSE_SHARE)),
            SPARSE: (0, dense),
            COUNT: (0, (0.0,) * len(counts)),
        }
        self.heads: nn.ModuleDict = nn.ModuleDict(
            {
                level: DecisionHead(in_channels, condition_dim + made[level][0], made[level][1], width)
                for level in LEVELS
                if level in levels
            }
        )

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the heads."""
        return tuple(self.heads)

    def forward(self, level: str, features: Tensor, condition: Tensor) -> Tensor:
        """Return the outputs of one head, (R, C, H, W) and (R, D) -> (R, outputs) in float32, see `policy_heads`."""
        with torch.autocast(features.device.type, enabled=False):
            numbers: Tensor = self.heads[level](features, condition)
        return numbers

    def distribution(self, level: str, features: Tensor, condition: Tensor) -> Any:
        """Return the distribution of a head's decision, as in torch.distributions."""
        raw = self(level, features, condition)
        return jump_distribution(raw) if level == STEP else choice_distribution(raw)

    def weigh(self, level: str, choices: Choices) -> tuple[Tensor, Tensor]:
        """Return (R,) log-likelihoods of the choices, and (R,) entropies of the distributions in nats.

        Where there are many large maps, heads see some at a time, and see them again when gradients are taken.
        """
        *_, height, width = choices.features.shape
        at_once = max(1, _AT_ONCE // (self.config.width * height * width))
        if len(choices) <= at_once:
            return self._weigh(level, choices)
        parts = [choices.take(slice(start, start + at_once)) for start in range(0, len(choices), at_once)]
        found = [checkpoint(self._weigh, level, part, use_reentrant=False) for part in parts]
        likely, entropy = zip(*found, strict=True)
        return torch.cat(likely), torch.cat(entropy)

    def _weigh(self, level: str, choices: Choices) -> tuple[Tensor, Tensor]:
        seen = choices.to(self.device)
        distribution = self.distribution(level, seen.features, seen.condition)
        action = seen.action.clamp(JUMP_MARGIN, 1 - JUMP_MARGIN) if level == STEP else seen.action
        return distribution.log_prob(action), distribution.entropy()


def check_levels(levels: Sequence[str]) -> None:
    """Raise a ValueError unless there is at least one level, all are known, and at most one of them chooses times."""
    if isinstance(levels, str) or not levels or set(levels) - set(LEVELS):
        raise ValueError(f"levels must hold at least one of {', '.join(LEVELS)}, got {levels!r}")
    if set(levels) >= TIMED:
        raise ValueError(
            f"levels must not hold both 'step' and 'count', which choose the same times, got {levels!r}; leave one out"
        )


def _check_sparsity(head: bool, sparsity: Sequence[float]) -> None:
    falls = all(later < earlier for earlier, later in itertools.pairwise(sparsity))
    if not falls or any(not 0 < share < 1 for share in sparsity):
        raise ValueError(f"sparsity must hold shares in (0, 1) that fall, such as (0.75, 0.6, 0.5), got {sparsity!r}")
    if bool(sparsity) != head:
        raise ValueError(f"sparsity and the level 'sparse' come together, got sparsity={sparsity!r}")


def _check_counts(head: bool, counts: Sequence[int]) -> None:
    whole = all(is_whole(count, 1) for count in counts)
    if not whole or any(later <= earlier for earlier, later in itertools.pairwise(counts)):
        raise ValueError(
            f"counts must hold whole numbers of at least 1 that rise, such as (4, 6, 8, 12, 20), got {counts!r}"
        )
    if bool(counts) != head:
        raise ValueError(f"counts and the level 'count' come together, got counts={counts!r}; give both or neither")
