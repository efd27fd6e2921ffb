"""Whose call it is: second runs on a busy pipeline, loops of the user's own, callbacks, runs that were left behind."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from families import CASES, Case
from flowaccel import PipelineBusyError, RecipeConflictError, accelerate, is_accelerated, restore
from flowaccel.hooks import Call, session_of

SD3 = CASES["sd3"]
TWO = pytest.mark.parametrize("case", [SD3, CASES["dit"]], ids=["checks inputs", "checks nothing"])


def in_thread(act: Callable[[], Any]) -> Any:
    """What `act` returns or raises in another thread."""
    found: list[Any] = []

    def perform() -> None:
        try:
            found.append(act())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=perform)
    thread.start()
    thread.join()
    return found[0]


def here(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except Exception as error:
        return error


def accelerated_pipe(case: Case) -> tuple[Any, Tensor, Tensor]:
    """A pipeline, and what it makes untouched and accelerated."""
    pipe = case.make()
    untouched = case(pipe, steps=6)
    accelerate(pipe, "ab_cache")
    made = case(pipe, steps=6)
    assert not torch.equal(made, untouched)
    return pipe, untouched, made


def during(pipe: Any, act: Callable[[], Any]) -> list[Any]:
    """Let `act` be done at the second call of the network in the next run; returns what it returned."""
    found: list[Any] = []
    calls = iter(range(2))

    def hook(*_: Any) -> None:
        if next(calls, None) == 1:
            handle.remove()
            found.append(act())

    handle = pipe.transformer.register_forward_pre_hook(hook)
    return found


@TWO
@pytest.mark.parametrize("where", [in_thread, here])
def test_a_second_run_on_a_busy_pipeline_is_refused_and_the_first_comes_out_right(case: Case, where: Any) -> None:
    pipe, _, made = accelerated_pipe(case)
    found = during(pipe, lambda: where(lambda: case(pipe, steps=3, guided=False)))
    assert torch.equal(case(pipe, steps=6), made)
    assert isinstance(found[0], PipelineBusyError)
    assert "copy.copy(pipe)" in str(found[0])
    assert torch.equal(in_thread(lambda: case(pipe, steps=6)), made)


def test_what_the_refusal_says_works() -> None:
    pipe, untouched, made = accelerated_pipe(SD3)

    def other() -> Tensor:
        other = copy.copy(pipe)
        other.scheduler = copy.deepcopy(other.scheduler)
        return SD3(other, steps=6)

    found = during(pipe, lambda: in_thread(other))
    assert torch.equal(SD3(pipe, steps=6), made)
    assert torch.equal(found[0], untouched)


@pytest.mark.parametrize("where", [in_thread, here])
@pytest.mark.parametrize("act", [restore, lambda pipe: accelerate(pipe, "heun")], ids=["restore", "accelerate"])
def test_verbs_are_refused_during_a_run(where: Any, act: Callable[[Any], Any]) -> None:
    pipe, untouched, made = accelerated_pipe(SD3)
    found = during(pipe, lambda: where(lambda: act(pipe)))
    assert torch.equal(SD3(pipe, steps=6), made)
    assert isinstance(found[0], (PipelineBusyError, RecipeConflictError))
    assert torch.equal(SD3(restore(pipe), steps=6), untouched)


@pytest.mark.parametrize("where", [in_thread, here])
def test_an_untouched_pipeline_is_not_accelerated_while_it_runs(where: Any) -> None:
    pipe, found = SD3.make(), []
    untouched = SD3(pipe)

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        found.append(where(lambda: accelerate(pipe, "heun")))
        return {}

    assert torch.equal(pipe(**SD3.arguments(), callback_on_step_end=callback).images, untouched)
    assert all(isinstance(error, PipelineBusyError) for error in found)
    assert not is_accelerated(pipe)


def test_of_threads_that_accelerate_at_once_one_does_and_restoring_twice_is_once() -> None:
    pipe = SD3.make()
    keys = set(vars(pipe))
    start = threading.Barrier(2)

    def both(act: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: (start.wait(), found.append(type(here(act))))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    for _ in range(3):
        assert set(both(lambda: accelerate(pipe, "fbcache"))) == {type(pipe), RecipeConflictError}
        assert both(lambda: restore(pipe)) == [type(pipe)] * 2
        assert set(vars(pipe)) == keys


def test_a_callback_that_calls_the_network_itself_does_not_disturb_the_run() -> None:
    pipe, _, made = accelerated_pipe(SD3)
    inputs: list[dict[str, Any]] = []
    session_of(pipe).on_call(lambda call_next, call: (inputs.append(call.arguments), call_next())[1])
    seen: list[int] = []

    def callback(pipe: Any, *_: Any) -> dict[str, Any]:
        before = len(inputs)
        with torch.no_grad():
            pipe.transformer(**inputs[0])
        seen.append(len(inputs) - before)
        return {}

    assert torch.equal(pipe(**SD3.arguments(steps=6), callback_on_step_end=callback).images, made)
    assert seen == [0] * 6


def test_a_call_of_the_network_in_another_thread_is_not_of_the_run() -> None:
    pipe, _, made = accelerated_pipe(SD3)
    inputs: list[Call] = []
    session_of(pipe).on_call(lambda call_next, call: (inputs.append(call), call_next())[1])
    during(pipe, lambda: in_thread(lambda: pipe.transformer(**inputs[0].arguments)))
    assert torch.equal(SD3(pipe, steps=6), made)
    assert len(inputs) == 6


def loop(pipe: Any) -> Iterator[None]:
    """A loop of the user's own, as far as its first steps."""
    pipe.scheduler.set_timesteps(6)
    latents = torch.zeros(1, 4, 8, 8)
    for time in pipe.scheduler.timesteps:
        yield
        latents = pipe.scheduler.step(latents, time, latents, return_dict=False)[0]


def test_a_loop_of_the_users_own_keeps_others_out_while_it_runs() -> None:
    pipe, _, made = accelerated_pipe(SD3)
    pipe.scheduler.set_timesteps(6)
    session = session_of(pipe)
    run = session.run
    assert isinstance(in_thread(lambda: SD3(pipe)), PipelineBusyError)
    assert session.run is run and not run.ended
    assert torch.equal(SD3(pipe, steps=6), made), "in the same thread it is a new start"


@pytest.mark.parametrize("where", [in_thread, here])
def test_a_loop_that_was_left_keeps_nobody_out(where: Any) -> None:
    pipe, _, made = accelerated_pipe(SD3)

    def leave() -> None:
        for step, _ in enumerate(loop(pipe)):
            if step == 2:
                raise KeyError

    assert isinstance(where(leave), KeyError)
    run = session_of(pipe).run
    assert not run.ended
    assert torch.equal(in_thread(lambda: SD3(pipe, steps=6)), made)
    assert run.failed


@pytest.mark.parametrize("first", [in_thread, here])
def test_a_run_that_died_in_a_thread_does_not_block_the_next(first: Any) -> None:
    pipe, _, made = accelerated_pipe(SD3)
    during(pipe, lambda: 1 / 0)
    assert isinstance(first(lambda: SD3(pipe, steps=6)), ZeroDivisionError)
    assert torch.equal(in_thread(lambda: SD3(pipe, steps=6)), made)
    assert torch.equal(SD3(pipe, steps=6), made)
    restore(pipe)
