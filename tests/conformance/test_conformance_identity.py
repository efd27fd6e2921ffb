"""The promises of the seam, over all families and through their real pipelines, with a recipe that changes nothing.

`Identity` surrounds every network call and every block, binds their arguments, calls them by name, takes their outputs
apart and puts them together again: everything that a cache does, except caching.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import tiny
from families import CASES, STEPS, Case
from flowaccel import Accelerator, accelerate, accelerated, report, restore
from flowaccel.hooks import Block, Call, session_of
from neighbours import NEIGHBOURS, load_lora, unload_lora

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FEW = pytest.mark.parametrize("case", [CASES[name] for name in ("sd3", "flux", "wan22")], ids=["sd3", "flux", "wan22"])


@dataclass(frozen=True)
class Identity(Accelerator):
    """Computes everything, the long way."""

    name: ClassVar[str] = "identity"

    def attach(self, pipe: Any) -> Callable[[], None]:
        session = session_of(pipe)

        def intercept_call(call_next: Callable[..., Any], call: Call) -> Any:
            call.run.state["calls"] = call.run.state.get("calls", 0) + 1
            return call_next(call.arguments)

        def intercept_block(call_next: Callable[..., Any], call: Call, block: Block) -> Any:
            return block.pack(*block.unpack(call_next(block.arguments)))

        removers = [session.on_call(intercept_call), session.on_block(intercept_block)]
        return lambda: [remove() for remove in removers].clear()


@pytest.fixture(params=["empty", "identity"])
def recipe(request: pytest.FixtureRequest) -> Any:
    return [] if request.param == "empty" else Identity()


def keys(pipe: Any) -> dict[str, Any]:
    """Of every module, and of the pipeline; what a run itself leaves on a scheduler is not ours."""
    taken = tiny.snapshot(pipe)
    return {"pipe": taken["pipe"], "modules": taken["modules"], "scheduler": taken["scheduler"]}


# -- 1: nothing changes, and nothing stays


@ALL
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_output_is_bit_identical(case: Case, recipe: Any, guided: bool) -> None:
    pipe = case.make()
    expected = case(pipe, batch=2, guided=guided)
    before = keys(pipe)
    accelerate(pipe, recipe)
    assert torch.equal(case(pipe, batch=2, guided=guided), expected)
    restore(pipe)
    assert keys(pipe) == before
    assert torch.equal(case(pipe, batch=2, guided=guided), expected)
    restore(pipe)
    assert keys(pipe) == before


@FEW
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("order", ["accelerate first", "neighbour first"])
def test_beside_offloading_in_both_orders(case: Case, neighbour: Callable[[Any], Any], order: str) -> None:
    pipe, twin = case.make(), case.make()
    expected = case(pipe)
    if order == "accelerate first":
        accelerate(pipe, Identity())
    undo = neighbour(pipe)
    if order == "neighbour first":
        accelerate(pipe, Identity())
    assert torch.equal(case(pipe), expected)
    assert len(report(pipe).calls) == STEPS * len(case.branches)
    restore(pipe)
    neighbour(twin)
    case(twin)
    assert keys(pipe)["modules"] == keys(twin)["modules"]
    assert torch.equal(case(pipe), expected)
    undo()
    assert torch.equal(case(pipe), expected)
    assert not [name for name, module in pipe.transformer.named_modules() if _is_ours(vars(module).get("forward"))]


def _is_ours(method: Any) -> bool:
    while method is not None:
        if type(method).__module__ == "flowaccel.hooks.wrap":
            return True
        method = getattr(method, "__wrapped__", None)
    return False


@pytest.mark.slow
@FEW
@pytest.mark.parametrize("order", ["LoRA first", "accelerate first"])
def test_lora_can_come_and_go(case: Case, order: str) -> None:
    pipe, twin = case.make(), case.make()
    expected = case(pipe)

    load_lora(twin)
    with_lora = case(twin)
    assert not torch.equal(with_lora, expected)
    for step in (load_lora, lambda which: accelerate(which, Identity()))[:: 1 if order == "LoRA first" else -1]:
        step(pipe)
    assert torch.equal(case(pipe), with_lora)
    unload_lora(pipe)
    assert torch.equal(case(pipe), expected)
    load_lora(pipe)
    assert torch.equal(case(pipe), with_lora)
    restore(pipe)
    assert torch.equal(case(pipe), with_lora)
    unload_lora(pipe)
    assert torch.equal(case(pipe), expected)


# -- 2: an image does not depend on its batch


@ALL
def test_batch_of_two_is_two_runs(case: Case) -> None:
    pipe = case.make()
    alone = torch.cat([case(pipe, seed=3), case(pipe, seed=4)])
    accelerate(pipe, Identity())
    together = case(pipe, batch=2, seed=3)
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(torch.cat([case(pipe, seed=3), case(pipe, seed=4)]), alone, atol=1e-4)


# -- 3: nothing is left behind


@ALL
def test_aborted_run_leaves_nothing(case: Case) -> None:
    pipe = case.make()
    expected = case(pipe)
    accelerate(pipe, Identity())
    stop = session_of(pipe).on_call(_failing_at(2))
    with pytest.raises(RuntimeError, match="on purpose"):
        case(pipe)
    assert report(pipe).failed
    assert session_of(pipe).run.state == {}
    stop()
    assert torch.equal(case(pipe), expected)
    assert not report(pipe).failed


def _failing_at(step: int) -> Callable[..., Any]:
    def interceptor(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == step:
            raise RuntimeError("on purpose")
        return call_next()

    return interceptor


@ALL
def test_another_number_of_steps_starts_afresh(case: Case) -> None:
    pipe = case.make()
    counts = (6, 4, 8) if case.begins_at else (3, 2, 4)
    expected = [case(pipe, steps=steps) for steps in counts]
    accelerate(pipe, Identity())
    for steps, images in zip(counts, expected, strict=True):
        assert torch.equal(case(pipe, steps=steps), images)
        evaluations = steps // 2 if case.begins_at else steps
        assert [step.step for step in report(pipe).steps] == list(range(evaluations))


@ALL
def test_two_pipelines_do_not_affect_each_other(case: Case) -> None:
    first, second = case.make(0), case.make(1)
    expected = [case(first), case(second)]
    accelerate(first, Identity())
    accelerate(second, Identity())
    seen = session_of(first).on_call(lambda call_next, call: (call.run.state.setdefault("seen", 1), call_next())[1])
    assert torch.equal(case(second), expected[1])
    assert session_of(first).run is None
    assert torch.equal(case(first), expected[0])
    seen()
    restore(first)
    assert torch.equal(case(second), expected[1])
    assert torch.equal(case(first), expected[0])
    restore(second)
    assert torch.equal(case(second), expected[1])


def test_pipelines_in_threads_of_one_loop_do_not_mix() -> None:
    """Two runs that take turns, step by step, as a server does that interleaves requests."""
    case, turns = CASES["sd3"], []
    pipes = [case.make(seed) for seed in (0, 1)]
    expected = [case(pipe) for pipe in pipes]
    for pipe in pipes:
        accelerate(pipe, Identity())

    def nested(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 1:
            turns.append(case(pipes[1]))
        return call_next()

    session_of(pipes[0]).on_call(nested)
    assert torch.equal(case(pipes[0]), expected[0])
    assert torch.equal(turns[0], expected[1])
    assert [len(report(pipe).steps) for pipe in pipes] == [STEPS, STEPS]


@FEW
def test_copies_of_an_accelerated_network_are_free_of_it(case: Case) -> None:
    pipe = case.make()
    expected = case(pipe)
    with accelerated(pipe, Identity()):
        case(pipe)
        twin = copy.deepcopy(pipe.transformer)
    other = case.make(1)
    other.transformer = twin
    if len(case.networks) == 1:
        other.vae, other.scheduler = pipe.vae, pipe.scheduler
        assert torch.equal(case(other), expected)
    assert not [module for module in twin.modules() if _is_ours(vars(module).get("forward"))]
