"""Policies for the digits generator (RAPID3, arXiv 2509.22323): their heads and their training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowaccel import zoo
from flowaccel.evaluation import Classes
from flowaccel.hooks import Pipeline
from flowaccel.methods.policy.accelerator import LearnedPolicy
from flowaccel.methods.policy.network import CACHE, COUNT, STEP, AccelerationPolicy
from flowaccel.methods.policy.train.discriminator import DiscriminatorConfig, DiscriminatorTraining, new_discriminator
from flowaccel.methods.policy.train.loop import (
    PolicyObjective,
    PolicySettings,
    PolicyTask,
    new_policy,
    references,
    set_costs,
)
from flowaccel.methods.policy.train.rewards import load_reward
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, accelerated
from flowaccel.recipe.sampler import Sampler
from flowaccel.training.loop import LoopConfig, Progress, train

STEPS = 30
TASK = PolicyTask(conditions=Classes(tuple(range(10))), size=512, steps=STEPS, seed=1)
SETTINGS = PolicySettings(groups=8, group_size=8, discount=0.97, fidelity=1.0)
REWARD = "accuracy:zoo:digits-features"
COST_BATCH = 25


@dataclass(frozen=True, kw_only=True)
class PolicyTraining:
    """Configuration of one policy and its training."""

    levels: tuple[str, ...] = (STEP, CACHE)
    counts: tuple[int, ...] = ()
    """Numbers of steps for a count head to choose from."""
    order: Literal[1, 2] = 1
    """Order of the policy's steps. With 2, images are to come near to where the network's differential equation leads
    (Heun's method), with 1 to what the pipeline's own steps make of it."""
    judged: bool = True
    """Whether a discriminator learns along."""
    updates: int = 500

    def loop(self, updates: int | None = None, learning_rate: float = 1e-3, seed: int = 0) -> LoopConfig:
        """Return the configuration of the training loop."""
        return LoopConfig(
            steps=updates or self.updates,
            learning_rate=learning_rate,
            cosine=True,
            ema_decay=0.95,
            save_every=25,
            seed=seed,
        )

    def goal(self, pipe: Pipeline, folder: Path) -> Tensor:
        """Return the reference images that a policy's images are to come near, kept in `folder`."""
        if self.order == 1:
            return references(pipe, TASK, folder)
        with accelerated(pipe, Recipe([Sampler("heun")])):
            return references(pipe, TASK, folder / "converged")

    def heads(self, pipe: Pipeline, work: Path, seed: int) -> AccelerationPolicy:
        """Create the heads, with the measured costs of their decisions, which are kept in `work`."""
        heads = new_policy(pipe, TASK, self.levels, seed, counts=self.counts, width=32, solver_order=self.order)
        set_costs(pipe, heads, TASK, work, COST_BATCH)
        return heads

    def objective(self, pipe: Pipeline, goal: Tensor, loop: LoopConfig) -> PolicyObjective:
        """Return the objective."""
        judge = None
        if self.judged:
            size: Any = tuple(goal.shape[1:])
            config = DiscriminatorConfig(learning_rate=1e-3, seed=loop.seed)
            judge = DiscriminatorTraining(new_discriminator("conv", size, loop.seed), goal, config)
        return PolicyObjective(pipe, TASK, load_reward(REWARD), SETTINGS, goal, loop.steps, judge, loop.seed)


TRAININGS = {
    "policy": PolicyTraining(),
    "second": PolicyTraining(order=2, judged=False, updates=300),
    "step": PolicyTraining(levels=(STEP,)),
    "one-shot": PolicyTraining(levels=(COUNT,), counts=(4, 6, 8, 10, 14, 20, 28)),
}
"""Policies: the paper's with two of its levels; the same over steps of second order; as TPDM (arXiv 2412.01243); as
AdaDiff."""


def digits_pipeline() -> Any:
    """Return the digits generator with diffusers' own Euler scheduler."""
    pipe = load_pipeline(zoo.folder("sit-digits"), torch_dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_policy(out: Path) -> Iterator[tuple[str, Progress, int]]:
    """Build the recipe with a policy for the digits pipeline of the zoo."""
    training, work = TRAININGS["second"], out / "training"
    pipe, loop = digits_pipeline(), training.loop()
    heads, goal = training.heads(pipe, work, loop.seed), training.goal(pipe, work)
    for progress in train(heads, training.objective(pipe, goal, loop), loop, work):
        yield "policy", progress, loop.steps
    save_policy(heads, pipe, out)


def save_policy(heads: AccelerationPolicy, pipe: Pipeline, folder: Path) -> None:
    """Save the policy as it is shipped, in float32, as heads always are."""
    recipe = Recipe([LearnedPolicy(heads.requires_grad_(False))], name="sit-digits-policy", num_inference_steps=STEPS)
    recipe.for_pipeline(pipe).save_pretrained(folder)
