"""Two pipelines on one network, of which one is accelerated: in two threads, and one within a call of the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flowaccel import report
from flowaccel.hooks import networks
from flowaccel.recipe.presets import PRESETS
from shared_networks import NEUTRAL, STEPS, attention_of, pair


@contextmanager
def before_each_call(modules: list[nn.Module], act: Callable[[], None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(lambda *_: act()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Turns:
    """Two threads of which one runs at a time, handing over wherever `hand_over` is called."""

    def __init__(self) -> None:
        self.turn, self.going, self.handed = 0, {0, 1}, 0
        self.changed, self.own = threading.Condition(), threading.local()

    def hand_over(self) -> None:
        self.handed += 1
        self._give(1 - self.own.which)
        self._wait()

    def run(self, *acts: Callable[[], None]) -> None:
        failures: list[BaseException] = []

        def perform(which: int) -> None:
            self.own.which = which
            try:
                self._wait()
                acts[which]()
            except BaseException as error:
                failures.append(error)
            finally:
                self.going.discard(which)
                self._give(1 - which)

        threads = [threading.Thread(target=perform, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _give(self, which: int) -> None:
        with self.changed:
            self.turn = which
            self.changed.notify_all()

    def _wait(self) -> None:
        me = self.own.which
        with self.changed:
            assert self.changed.wait_for(lambda: self.turn == me or 1 - me not in self.going, timeout=60)


EVERY = pytest.mark.parametrize("name", PRESETS)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in NEUTRAL])
def test_the_presets_of_this_file_change_something(name: str) -> None:
    made, untouched = pair(name).alone
    assert not torch.equal(made, untouched)


@EVERY
def test_two_threads_on_a_shared_network_do_not_meet(name: str) -> None:
    found, made, turns = pair(name), {}, Turns()

    def act(which: int) -> Callable[[], None]:
        return lambda: made.__setitem__(which, found.make(which))

    with torch.random.fork_rng(), before_each_call(found.modules, turns.hand_over):
        if name == "sde":  # threads share the generator that it draws from: its noise is that of the order
            found = found._replace(alone=(torch.empty(0), found.alone[1]))
        turns.run(act(0), act(1))
    assert turns.handed >= 2 * STEPS
    assert name == "sde" or torch.equal(made[0], found.alone[0])
    assert torch.equal(made[1], found.alone[1])
    assert len(report(found.pipes[0]).steps) >= STEPS - 1


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "sde"])  # threads share its generator
def test_two_threads_that_run_freely_do_not_meet(name: str) -> None:
    found, made = pair(name), ([], [])

    def act(which: int) -> None:
        made[which].extend(found.make(which) for _ in range(20))

    threads = [threading.Thread(target=act, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in (0, 1):
        assert [torch.equal(each, found.alone[which]) for each in made[which]] == [True] * 20


@pytest.mark.slow
@EVERY
def test_a_pipeline_called_during_a_run_on_its_network_does_not_disturb_it(name: str) -> None:
    """Between two calls of the network, as callbacks do, and in the middle of one."""
    found, made, calls, busy = pair(name), [], {"between": 0, "within": 0}, []

    def nest(where: str) -> None:
        if busy:  # in the pipeline that is called here
            return
        calls[where] += 1
        if calls[where] in (2, 3):  # within: where TeaCache only looks at what goes into attention, too
            busy.append(where)
            with torch.random.fork_rng():
                made.append(found.make(1))
            busy.clear()

    network = next(iter(networks(found.pipes[0]).values()))
    with (
        before_each_call([network], lambda: nest("between")),
        before_each_call([attention_of(network)], lambda: nest("within")),
    ):
        assert torch.equal(found.make(0), found.alone[0])
    assert len(made) >= 3 and all(torch.equal(images, found.alone[1]) for images in made)
