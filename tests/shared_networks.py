"""Every preset on a pipeline whose network a second, untouched pipeline shares."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import tiny
from families import CASES, Case
from flowaccel import (
    AgentAttention,
    DynamicWidth,
    LearnedPolicy,
    Mediators,
    MediatorSchedule,
    MixtureOfExperts,
    Recipe,
    SparseAttention,
    accelerate,
)
from flowaccel.caching.level_cache import LEVELS
from flowaccel.hooks import ATTENTION, networks
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.policy import runtime
from flowaccel.recipe import resolve
from moe_parts import fitted
from policies import SMALL_BLOCKS, lively

NEUTRAL = ("none", *LEVELS)
"""What changes nothing here: levels never skip in so few steps."""
STEPS = 6
OPTIONS = {
    "fbcache": "threshold=2.0,warmup=1,last=0,max_run=2",
    "dbcache": "threshold=2.0,warmup=2,blocks=2,last=0",
    "magcache": "threshold=1.0,warmup=1",
    "easycache": "threshold=0.2,warmup=2",
    "adacache": "codebook=[[0.5,3],[1.0,2],[2.0,1]]",
    "adaptive_diffusion": "threshold=2.0",
}
"""With which the caches reuse something in so few steps."""


def refined(pipe: Any) -> Recipe:
    return tiny.flowturbo(tiny.random_refiner(pipe.transformer), "H1P3R2")


def sliced(pipe: Any) -> DynamicWidth:
    network = make_dynamic(pipe.transformer, {"normalise": True})
    torch.manual_seed(0)
    for gated in network.dynamic.gated_layers:
        gated.gate.router.weight.data.normal_()
        gated.gate.router.bias.data.normal_(std=0.3)
    return DynamicWidth(network)


def mediated(pipe: Any) -> Mediators:
    network = MediatorSiTTransformer2DModel.from_base(pipe.transformer, {"counts": (1, 4)}).eval()
    return Mediators(network, MediatorSchedule(start=1, change=((0.3, 4),)))


SPECIAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "flowturbo-BLOCKS": ("sit", refined),
    "dynamic_width": ("sit", sliced),
    "mediators": ("sit", mediated),
    "mixture_of_experts": ("sit", lambda pipe: MixtureOfExperts(fitted(pipe, lambda pipe: CASES["sit"](pipe)))),
    "learned_policy": ("sd3", lambda _: LearnedPolicy(lively(CASES["sd3"]))),
    "agent_attention": ("dit", lambda _: AgentAttention(stride=2, min_tokens=16, first=1)),
    "sparse_attention": (
        "flux",
        lambda _: SparseAttention(keep=0.5, dense_blocks=0, min_tokens=8, query_block=8, key_block=4),
    ),
}
"""Presets that need more than a name: on which pipeline, and what makes the recipe."""


def recipe_for(name: str) -> tuple[Case, Callable[[Any], Any]]:
    if name in SPECIAL:
        case, make = SPECIAL[name]
        return CASES[case], make
    return CASES["sd3"], lambda _: resolve(f"{name}:{OPTIONS[name]}" if name in OPTIONS else name)


def neighbour(pipe: Any) -> Any:
    """Another pipeline on the same networks, with a scheduler of its own."""
    other = tiny.silent(type(pipe)(**pipe.components))
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


class Pair(NamedTuple):
    """An accelerated pipeline and an untouched one, and what each makes alone."""

    case: Case
    pipes: tuple[Any, Any]
    alone: tuple[Tensor, Tensor]
    before: dict[str, Any]
    """`tiny.snapshot` of the first before it was accelerated."""

    def make(self, which: int) -> Tensor:
        torch.manual_seed(which)  # `sde` draws from it in pipelines that hand it no generator
        return self.case(self.pipes[which], batch=2, steps=STEPS)

    @property
    def modules(self) -> list[nn.Module]:
        """Every network, and an attention within it."""
        found = list({id(net): net for pipe in self.pipes for net in networks(pipe).values()}.values())
        return found + [attention_of(network) for network in found]


def attention_of(network: nn.Module) -> nn.Module:
    """The first one, which sparse attention and agents work in, too."""
    names = [name for name, _ in network.named_modules() if name.split(".")[-1] in (*ATTENTION, "attn1")]
    return network.get_submodule(names[0])


@functools.cache
def pair(name: str) -> Pair:
    case, make = recipe_for(name)
    pipe = case.make()
    found = Pair(case, (pipe, neighbour(pipe)), (torch.empty(0), torch.empty(0)), {})
    untouched, before = found.make(1), tiny.snapshot(pipe)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of levels, that nothing is calibrated for random weights
        patch.setattr(runtime, "SparseAttention", SMALL_BLOCKS)
        accelerate(pipe, make(pipe))
        return found._replace(alone=(found.make(0), untouched), before=before)
