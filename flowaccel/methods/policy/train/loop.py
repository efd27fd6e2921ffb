"""Training of learned policies with rewards of finished images (RAPID3, arXiv 2509.22323).

Rollouts are made in groups that share their noise, so that rewards differ by decisions alone, and the heads take one
clipped step after each.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowaccel.errors import CheckpointError
from flowaccel.evaluation import Conditions, sample_generator
from flowaccel.hooks import Block, Call, Identity, Pipeline, denoiser, session_of
from flowaccel.methods.policy.accelerator import base_of
from flowaccel.methods.policy.network import AccelerationPolicy, Choices
from flowaccel.methods.policy.train.discriminator import DiscriminatorTraining
from flowaccel.methods.policy.train.objective import (
    NO_STATS,
    PolicyStats,
    additive_reward,
    advantages,
    check_clip,
    check_discount,
    check_estimator,
    check_price,
    discounted_reward,
    early_entropy,
    early_limits,
    equivalent_steps,
    log_probs,
    policy_loss,
    positive,
)
from flowaccel.methods.policy.train.rewards import Reward
from flowaccel.methods.policy.train.rollout import Rollout, joined, measured_costs, roll_out, sampled
from flowaccel.recipe import Recipe, accelerated

REFERENCES, COSTS = "references.safetensors", "costs.json"
_SHARPNESS, _LEAST = 10.0, 1e-6


@dataclass(frozen=True, kw_only=True)
class PolicyTask:
    """Samples that a policy is trained on: a pool, each with a condition and noise of its own."""

    conditions: Conditions
    size: int
    """Samples in the pool."""
    steps: int = 28
    """Steps of unaccelerated images, and the most that accelerated ones take."""
    seed: int = 1
    """Seed of the noise; another one than evaluations take."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Further arguments of the pipeline, such as `guidance_scale`."""

    def generate(self, pipe: Any, ids: Sequence[int], steps: int | None = None) -> Tensor:
        """Generate samples (B, C, H, W) in [0, 1], each from its own noise, with `steps` steps or the task's."""
        output = pipe(
            **self.conditions.arguments(ids),
            num_inference_steps=steps or self.steps,
            generator=[sample_generator(self.seed, sample) for sample in ids],
            output_type="pt",
            **dict(self.arguments),
        )
        images: Tensor = output.images
        return images.float().cpu().clamp(0, 1)

    def asked(self, ids: Sequence[int]) -> list[Any]:
        """Return the conditions of samples: prompts or classes."""
        texts, labels = self.conditions.texts(ids), self.conditions.labels(ids)
        return list(texts) if texts is not None else [] if labels is None else labels.tolist()


def references(
    pipe: Pipeline, task: PolicyTask, folder: Path, batch: int = 32, notify: Callable[[int], None] | None = None
) -> Tensor:
    """Return the unaccelerated images (size, C, H, W) of a task, made once and kept in `folder`.

    Raises:
        CheckpointError: what lies there is damaged, or of another task.
    """
    path, meta = folder / REFERENCES, {"task": json.dumps(_described(pipe, task), sort_keys=True)}
    if path.exists():
        return _kept(path, meta)
    made = []
    for start in range(0, task.size, batch):
        made.append(task.generate(pipe, range(start, min(start + batch, task.size))))
        if notify is not None:
            notify(min(start + batch, task.size))
    folder.mkdir(parents=True, exist_ok=True)
    found = torch.cat(made).contiguous()
    save_file({"images": found}, path, meta)
    return found


def _described(pipe: Pipeline, task: PolicyTask) -> dict[str, Any]:
    """Return what the unaccelerated images depend on, except for the weights."""
    own = {
        "conditions": task.conditions.describe(),
        "size": task.size,
        "steps": task.steps,
        "seed": task.seed,
        "arguments": {name: str(value) for name, value in task.arguments},
    }
    return own | {"network": str(Identity.of(denoiser(pipe))), "scheduler": str(Identity.of(pipe.scheduler))}


def _kept(path: Path, meta: dict[str, str]) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            there, images = file.metadata() or {}, file.get_tensor("images")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); delete it") from error
    if there != meta:
        raise CheckpointError(
            f"{path} holds images of another task, {there.get('task')}; delete it, or use another --out"
        )
    return images


def new_policy(
    pipe: Pipeline, task: PolicyTask, levels: Sequence[str], seed: int = 0, **config: Any
) -> AccelerationPolicy:
    """Create trainable heads for a pipeline's network, on its device.

    Args:
        pipe: the pipeline, not accelerated.
        task: task of the training.
        levels: names of the heads.
        seed: seed of their weights.
        config: further arguments of `AccelerationPolicy`.

    Raises:
        UnsupportedModelError: the network has no blocks that an embedding modulates.
        ValueError: as `AccelerationPolicy`.
    """
    network: Any = denoiser(pipe)
    width = condition_width(pipe, task)
    torch.manual_seed(seed)
    policy = AccelerationPolicy(
        in_channels=network.config.in_channels,
        condition_dim=width,
        levels=levels,
        num_train_timesteps=pipe.scheduler.config.num_train_timesteps,
        max_steps=task.steps,
        base=base_of(network),
        **config,
    )
    policy.to(network.device).requires_grad_(True)
    return policy


def set_costs(pipe: Pipeline, policy: AccelerationPolicy, task: PolicyTask, folder: Path, images: int = 8) -> None:
    """Store the measured costs of a policy's decisions in its configuration.

    They are measured once for `batch` images and kept in `folder`, so that a resumed training goes on with the same.
    """
    file = folder / COSTS
    if not file.exists():
        found = measured_costs(pipe, policy, lambda steps: task.generate(pipe, range(images), steps))
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n")
    policy.register_to_config(costs=json.loads(file.read_text()))


def condition_width(pipe: Pipeline, task: PolicyTask) -> int:
    """Return the width of the embedding that modulates the network's blocks, by running one step of one image.

    Raises:
        UnsupportedModelError: there is none.
    """
    found: list[int] = []

    def look(call_next: Callable[..., Any], call: Call, block: Block) -> Any:
        if block.index == 0:
            found.append(block.condition.shape[1])
        return call_next()

    with accelerated(pipe, Recipe()), torch.no_grad():
        session_of(pipe).on_block(look)
        task.generate(pipe, [0], steps=2)
    return found[0]


def fidelity(images: Tensor, untouched: Tensor) -> Tensor:
    """Return exp(-10 e), with e the relative L2 error against unaccelerated images.

    Images are (B, C, H, W), the result is (B,) in [0, 1].
    """
    error = (images - untouched).flatten(1).norm(dim=1) / untouched.flatten(1).norm(dim=1).clamp_min(_LEAST)
    return torch.exp(-_SHARPNESS * error)


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of a policy's training.

    Raises:
        ValueError: out of range.
    """

    groups: int = 8
    """Samples of the pool per update."""
    group_size: int = 8
    """Rollouts of each."""
    discount: float = 0.97
    """lambda: what a dense step more leaves of the reward; lower makes faster."""
    price: float | None = None
    """Price of a step: the reward is score - price * steps, not the paper's discounted one; None for the latter."""
    realism: float = 1.0
    """omega: weight of the discriminator's score."""
    fidelity: float = 0.0
    """Weight of how near an image comes to the untouched one from the same noise, see `fidelity`; not the paper's, and
    a far stronger signal where a discriminator has nothing to see."""
    estimator: Literal["grpo", "rloo"] = "grpo"
    epochs: int = 1
    """Updates on the same rollouts; only from the second on is anything clipped."""
    clip: float = 0.2
    per_decision: bool = False
    entropy: float = 1e-3
    """Weight of the choices' entropy in the first third of the training."""
    batch_size: int = 32
    """Images that are made at once."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"group_size must be at least 2, got {self.group_size}: an image alone is not better than its group"
            )
        for name in ("groups", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("realism", "fidelity", "entropy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is a weight of at least 0, got {getattr(self, name)}")
        check_discount(self.discount)
        check_estimator(self.estimator)
        check_clip(self.clip)
        if self.price is not None:
            check_price(self.price)

    def check_pool(self, size: int) -> None:
        """Raise a ValueError unless a pool has as many samples as an update takes."""
        if size < self.groups:
            raise ValueError(f"groups must be at most the {size} samples of the pool, got {self.groups}")


@dataclass(frozen=True, kw_only=True)
class Update:
    """Statistics of one update, means over its images."""

    reward: float
    quality: float
    realism: float | None
    """The discriminator's score; None without one."""
    cost: float
    """Compute, in dense steps."""
    steps: float
    computed: float
    stats: PolicyStats


@dataclass(frozen=True, kw_only=True)
class _Experience:
    """Rollouts and their rewards."""

    choices: dict[str, Choices]
    old: dict[str, Tensor]
    advantages: Tensor
    seen: Update
    """But for its `stats`."""


def check_launch() -> None:
    """Raise a ValueError if a launcher started several processes: heads are trained in one."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"a policy is trained by one process, got {processes}; start it without a launcher")


class PolicyObjective:
    """Loss of a policy, for `flowaccel.training.loop.train`: every step, or every `epochs` steps, makes rollouts.

    Args:
        pipe: the pipeline, not accelerated, its network frozen.
        task: samples that are generated.
        reward: reward of the images.
        settings: settings of the training.
        untouched: (pool, C, H, W) from `references`.
        total: updates of the whole training.
        discriminator: says how unaccelerated images look, and learns to; None for none.
        seed: seed of the decisions.

    Raises:
        ValueError: a pool of fewer samples than an update takes, or several processes.
    """

    def __init__(
        self,
        pipe: Pipeline,
        task: PolicyTask,
        reward: Reward,
        settings: PolicySettings,
        untouched: Tensor,
        total: int,
        discriminator: DiscriminatorTraining | None = None,
        seed: int = 0,
    ) -> None:
        settings.check_pool(task.size)
        check_launch()
        self.pipe, self.task, self.reward, self.settings = pipe, task, reward, settings
        self.untouched, self.total, self.discriminator, self.seed = untouched, total, discriminator, seed
        self.last: Update | None = None
        self._experience: _Experience | None = None

    def at(self, step: int) -> Callable[[nn.Module, torch.Generator], Tensor]:
        """Return the loss function of update `step`."""
        return functools.partial(self._loss, step)

    def _loss(self, step: int, model: nn.Module, generator: torch.Generator) -> Tensor:
        policy: Any = model
        settings, progress = self.settings, step / self.total
        if step % settings.epochs == 0:
            self._experience = self._gather(policy, step, generator)
        if self._experience is None:
            raise ValueError(
                f"update {step} goes on with the rollouts of update {step - step % settings.epochs}, which no state "
                f"holds; let save_every be a multiple of epochs, {settings.epochs}"
            )
        loss, stats = policy_loss(
            policy,
            self._experience.choices,
            self._experience.old,
            self._experience.advantages,
            clip=settings.clip,
            per_decision=settings.per_decision,
            entropy=early_entropy(progress, settings.entropy),
        )
        self.last = replace(self._experience.seen, stats=stats)
        return loss

    def _gather(self, policy: AccelerationPolicy, step: int, generator: torch.Generator) -> _Experience:
        settings = self.settings
        chosen = torch.randperm(self.task.size, generator=generator)[: settings.groups].tolist()
        ids = [sample for sample in chosen for _ in range(settings.group_size)]
        with torch.no_grad():
            rollout = self._rollout(policy, step, ids)
            old = log_probs(policy, rollout.choices)
        quality = self.reward(rollout.images, self.task.asked(ids))
        score, realism = self._score(rollout.images, quality, ids)
        done = rollout.executed
        cost = equivalent_steps(done.image, done.reused, done.level, len(ids), policy.config.costs)
        rewards = self._rewards(score, cost)
        seen = Update(
            reward=float(rewards.mean()),
            quality=float(quality.mean()),
            realism=realism,
            cost=float(cost.mean()),
            steps=float(done.steps.float().mean()),
            computed=float(done.computed.float().mean()),
            stats=NO_STATS,
        )
        grouped = rewards.view(settings.groups, settings.group_size)
        return _Experience(
            choices=rollout.choices, old=old, advantages=advantages(grouped, settings.estimator), seen=seen
        )

    def _score(self, images: Tensor, quality: Tensor, ids: Sequence[int]) -> tuple[Tensor, float | None]:
        """Return the sum (B,) of quality, fidelity and realism, and the mean of the last; trains the discriminator."""
        settings, score = self.settings, positive(quality, self.reward.bounds)
        if settings.fidelity:
            score = score + settings.fidelity * fidelity(images, self.untouched[ids])
        if self.discriminator is None:
            return score, None
        realism = self.discriminator.score(images)
        self.discriminator.add(images, torch.tensor(ids))
        self.discriminator.update()
        return score + settings.realism * realism, float(realism.mean())

    def _rollout(self, policy: AccelerationPolicy, step: int, ids: Sequence[int]) -> Rollout:
        limits, size = early_limits(step / self.total), self.settings.batch_size
        parts = []
        for start in range(0, len(ids), size):
            rows = range(start, min(start + size, len(ids)))
            source = sampled(policy, [(self.seed, step, row) for row in rows], limits)
            generate = functools.partial(self.task.generate, self.pipe, [ids[row] for row in rows])
            parts.append(roll_out(self.pipe, policy, generate, source))
        return joined(parts)

    def _rewards(self, score: Tensor, cost: Tensor) -> Tensor:
        if self.settings.price is not None:
            return additive_reward(score, cost, self.settings.price)
        return discounted_reward(score, cost, self.settings.discount)

    def save(self, folder: Path) -> None:
        """Save the state of the discriminator, which a resumed run needs."""
        if self.discriminator is not None:
            self.discriminator.save(folder)

    def resume(self, folder: Path) -> None:
        """Load the state of the discriminator.

        Raises:
            CheckpointError: there is none.
        """
        if self.discriminator is not None and not self.discriminator.resume(folder):
            raise CheckpointError(f"{folder} holds no discriminator; the run had none, use another --out")
