"""Copies of an accelerated pipeline, deep, shallow and pickled, are plain pipelines; the original keeps what it has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from flowaccel import is_accelerated, restore
from flowaccel.hooks import networks
from flowaccel.models.stand_in import StandIn
from flowaccel.recipe import PRESETS
from shared_networks import STEPS, pair

COPIES: dict[str, Callable[[Any], Any]] = {
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "pickled": lambda one: pickle.loads(pickle.dumps(one)),
}


@pytest.mark.parametrize("name", PRESETS)
def test_copies_are_plain_and_the_original_stays_accelerated(name: str) -> None:
    found = pair(name)
    pipe, untouched = found.pipes
    for kind, copied in COPIES.items():
        twin = copied(pipe)
        assert not is_accelerated(twin), kind
        assert restore(twin) is twin
        assert type(twin.scheduler) is type(untouched.scheduler), kind
        assert twin.config.scheduler == untouched.config.scheduler, kind
        assert [type(net) for net in networks(twin).values()] == [type(net) for net in networks(untouched).values()]
        if kind != "shallow":
            assert tiny.snapshot(twin)["modules"] == found.before["modules"], kind
            assert {"set_timesteps", "step"}.isdisjoint(vars(twin.scheduler)), kind
        torch.manual_seed(1)
        assert torch.equal(found.case(twin, batch=2, steps=STEPS), found.alone[1]), kind
    assert is_accelerated(pipe)
    assert torch.equal(found.make(0), found.alone[0])


@pytest.mark.parametrize("name", PRESETS)
def test_a_copied_network_or_scheduler_is_free_of_the_session(name: str) -> None:
    pipe = pair(name).pipes[0]
    for copied in (COPIES["deep"], COPIES["pickled"]):
        for owner in (*networks(pipe).values(), pipe.scheduler):
            twin = copied(owner)
            assert type(twin) is type(owner)
            assert {"forward", "set_timesteps", "step", "refiner", "decide", "__getstate__"}.isdisjoint(vars(twin))
            inner = twin.modules() if isinstance(twin, torch.nn.Module) else ()
            assert not [module for module in inner if {"forward", "__getstate__"} & set(vars(module))]
            stock = [getattr(module, "processor", None) for module in inner]
            assert not [processor for processor in stock if isinstance(processor, StandIn)]
