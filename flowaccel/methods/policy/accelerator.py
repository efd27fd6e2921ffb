"""Learned policies, which decide per image and step what is computed (RAPID3, arXiv 2509.22323).

After AdaDiff, they can also decide once per image how many steps it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import Identity, Pipeline, denoiser, session_of
from flowaccel.methods.policy.network import TIMED, AccelerationPolicy, check_levels
from flowaccel.methods.policy.policy_decisions import DecisionSource, HeadSource
from flowaccel.methods.policy.runtime import PolicyRuntime
from flowaccel.methods.policy.stats import NAME
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.loading import beside, load_network
from flowaccel.recipe.sampler import swapped_scheduler
from flowaccel.recipe.serialization import learned
from flowaccel.samplers import PolicyScheduler

FOLDER = "policy"


@dataclass(frozen=True)
class LearnedPolicy(Accelerator):
    """Accelerator that lets a learned policy decide, image by image, what is computed.

    Its heads decide where in time to go next, or once for all how many steps to take, and whether blocks run.

    `num_inference_steps` of the pipeline is then the most steps that an image takes.

    Args:
        policy: the heads, or the folder they were saved to; None takes the folder `policy` beside the pipeline's
            components.
        levels: heads that are used; None for all that there are.

    Raises:
        TypeError: `policy` is none of these.
        ValueError: no levels, unknown ones, or both `step` and `count`.
    """

    name: ClassVar[str] = NAME

    policy: nn.Module | str | Path | None = learned(FOLDER, lambda folder: load_policy(folder), default=None)
    levels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.policy, nn.Module) and not isinstance(self.policy, AccelerationPolicy):
            raise TypeError(f"policy must be an AccelerationPolicy, got a {type(self.policy).__name__}")
        if not isinstance(self.policy, (nn.Module, str, Path, type(None))):
            raise TypeError(f"policy must be an AccelerationPolicy, a folder or None, got {self.policy!r}")
        if self.levels is not None:
            check_levels(self.levels)
            object.__setattr__(self, "levels", tuple(self.levels))

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, of a cache and of a scheduler, since it is both.

        Also whether images have times of their own, as far as that is known before it is loaded.
        """
        known = self.policy.levels if isinstance(self.policy, AccelerationPolicy) else tuple(TIMED)
        timed = TIMED & set(self.levels or known)
        return super().tags | {Tag.CACHE, Tag.SCHEDULER} | ({Tag.TIMES_PER_IMAGE} if timed else set())

    def attach(self, pipe: Pipeline) -> Detach:
        """Wrap the network's calls, and replace the scheduler where the policy has a head that chooses times.

        Raises:
            RecipeConflictError: a policy for another network or another scale of time.
            UnsupportedModelError: a pipeline or network of another kind.
            ValueError: levels that the policy does not have, or maps of another width.
        """
        policy = self.resolve(pipe)
        return attach_policy(pipe, policy, HeadSource(policy), self.levels)

    def resolve(self, pipe: Pipeline | None = None) -> AccelerationPolicy:
        """Return the policy as a module, loaded if a folder was given."""
        if isinstance(self.policy, AccelerationPolicy):
            return self.policy
        advice = "train one with `flowaccel train policy`, or pass LearnedPolicy(policy=FOLDER)"
        folder = beside(pipe, FOLDER, "policy", advice) if self.policy is None else Path(str(self.policy))
        return load_policy(folder)

    def loaded(self, pipe: Pipeline) -> LearnedPolicy:
        """Return this accelerator with the policy as a module."""
        return LearnedPolicy(self.resolve(pipe), self.levels)


def attach_policy(
    pipe: Pipeline,
    policy: AccelerationPolicy,
    source: DecisionSource,
    levels: Sequence[str] | None = None,
) -> Detach:
    """Attach a policy whose decisions come from `source`, as `LearnedPolicy` does with its own heads.

    Args:
        pipe: a pipeline with a session.
        policy: the policy, of which only the configuration is used.
        source: who decides.
        levels: about what; None for all that the policy can.

    Raises:
        as `LearnedPolicy.attach`.
    """
    levels = policy.levels if levels is None else tuple(levels)
    _check(pipe, policy, levels)
    config = policy.config
    with ExitStack() as undo:
        if TIMED & set(levels):
            options = {"max_steps": config.max_steps, "solver_order": config.solver_order}
            undo.callback(swapped_scheduler(pipe, PolicyScheduler, "a policy", **options))
        undo.callback(PolicyRuntime(source, levels, policy, session_of(pipe)).attach())
        return undo.pop_all().close


def _check(pipe: Pipeline, policy: AccelerationPolicy, levels: Sequence[str]) -> None:
    network, config = denoiser(pipe), policy.config
    missing = set(levels) - set(policy.levels)
    if missing:
        raise ValueError(f"levels must be among those of the policy, {list(policy.levels)}, got {sorted(missing)}")
    if TIMED & set(levels) and "mask_image" in inspect.signature(type(pipe).__call__).parameters:
        raise UnsupportedModelError(
            f"a {type(pipe).__name__} puts back what is to be kept at one noise level for all images, and a policy "
            "gives each its own; use it without its step and count heads, as by LearnedPolicy(levels=('cache',))"
        )
    present = base_of(network)
    if config.base is not None and config.base != present:
        raise RecipeConflictError(
            f"the policy was trained for {config.base}, and the pipeline has {present}; train one for this network "
            "with `flowaccel train policy`"
        )
    scale = pipe.scheduler.config.get("num_train_timesteps")
    if scale != config.num_train_timesteps:
        raise RecipeConflictError(
            f"the policy counts time from {config.num_train_timesteps}, and the pipeline's scheduler from {scale}; "
            "use the scheduler that it was trained with"
        )
    channels = network.config.get("in_channels")
    if channels != config.in_channels:
        raise ValueError(f"the policy looks at {config.in_channels} channels, and the network has {channels}")


def base_of(network: nn.Module) -> str:
    """Return the identity that a policy is bound to: the class of a network, and its configuration.

    Of a variant it is the stock class.
    """
    return str(Identity.of(network))


def load_policy(folder: Path) -> AccelerationPolicy:
    """Load a policy saved by `save_pretrained`; raises as `load_network` does, and a TypeError for another network."""
    found = load_network(folder, "policy")
    if not isinstance(found, AccelerationPolicy):
        raise TypeError(f"{folder} holds a {type(found).__name__}, no AccelerationPolicy")
    return found
