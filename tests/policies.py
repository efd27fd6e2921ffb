"""Learned policies whose heads look, and who else may decide in their place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from families import CASES, Case
from flowaccel import Recipe, Report, SparseAttention, accelerated
from flowaccel.hooks import CallRecord, denoiser
from flowaccel.methods.policy.accelerator import attach_policy
from flowaccel.methods.policy.network import CACHE, SPARSE, STEP, AccelerationPolicy
from flowaccel.methods.policy.policy_decisions import HeadSource
from flowaccel.methods.policy.stats import ImagePath, paths_of

FAMILIES = [CASES[name] for name in ("sit", "sd3", "flux")]
SMALL_BLOCKS = functools.partial(SparseAttention, query_block=4, key_block=4)
"""In the place of `SparseAttention` where a policy makes its own, for images of 16 tokens."""


_SAID = {STEP: ((1.0, 0.2), 0.3), CACHE: ((0.0, 0.0), 1.0), SPARSE: ((0.0, 0.0, 0.0), 1.0)}


def conditioned(pipe: Any) -> int:
    """Width of what modulates the blocks."""
    network = denoiser(pipe)
    return int(getattr(network, "inner_dim", 0) or network.pos_embed.shape[-1])


def policy_for(pipe: Any, seed: int = 0, **config: Any) -> AccelerationPolicy:
    """Heads that look: with larger weights, so that images are decided about differently."""
    torch.manual_seed(seed)
    network = denoiser(pipe)
    policy = AccelerationPolicy(
        in_channels=network.config.in_channels, condition_dim=conditioned(pipe), width=16, **config
    )
    with torch.no_grad():
        for head in policy.heads.values():
            for layer in (head.conv1, head.conv2, head.fc1, head.fc2):
                layer.weight.normal_(std=0.6)
            head.modulation.weight.normal_(std=0.3)
            head.fc2.weight.mul_(0.03)
    return policy.eval()


@functools.cache
def lively(case: Case, **config: Any) -> AccelerationPolicy:
    """All three heads, so that they decide now this way and now that: what they say of what they see in a run has the
    mean and the spread of `_SAID`. For any pipeline of the family.
    """
    everywhere = {"levels": (STEP, CACHE, SPARSE), "sparsity": (0.5, 0.25), "sparse_tokens": 1, "dense_blocks": 0}
    pipe, seen = pipeline(case), {}
    policy = policy_for(pipe, **{**everywhere, **config})
    source = HeadSource(policy, [np.random.default_rng(image) for image in range(4)], log=seen)
    driven(pipe, case, source, policy, batch=4, steps=12)
    with torch.no_grad():
        for level, head in policy.heads.items():
            said = torch.cat([policy(level, choices.features, choices.condition) for choices in seen[level]])
            means, spread = _SAID[level]
            scale = spread / said.std(0)
            head.fc2.weight.mul_(scale[:, None])
            head.fc2.bias.copy_(torch.tensor(means) + (head.fc2.bias - said.mean(0)) * scale)
    return policy


def pipeline(case: Case, seed: int = 0) -> Any:
    """With diffusers' Euler scheduler."""
    pipe = case.make(seed)
    if case.name == "sit":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    return pipe


@contextmanager
def decided_by(pipe: Any, source: Any, policy: AccelerationPolicy) -> Iterator[None]:
    """Within, `source` decides."""
    with accelerated(pipe, Recipe()):
        detach = attach_policy(pipe, policy, source)
        try:
            yield
        finally:
            detach()


def driven(pipe: Any, case: Case, source: Any, policy: AccelerationPolicy, **options: Any) -> Tensor:
    """One call in which `source` decides."""
    with decided_by(pipe, source, policy):
        return case(pipe, **options)


def image_paths(found: Report) -> tuple[ImagePath, ...]:
    """Where the policy led every image of a run."""
    return paths_of(found.stats("learned_policy"))


def sparsity(call: CallRecord) -> tuple[tuple[str, ...], int, int]:
    """Layers whose attention was sparse in a call, the pairs that they computed, and all that they have."""
    stats = call.stats.get("sparse_attention")
    return ((), 0, 0) if stats is None else (stats.layers, stats.pairs, stats.all_pairs)
