"""Order of calls, exact ratios and flags under a fake clock; real times are never asserted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
import torch

from flowaccel.evaluation.timing.latency import Timing, measure_latency

CPU = torch.device("cpu")


class FakeMachine:
    """A clock that only variants advance, and a record of who was called."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def variant(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds(self.calls.count(name))
            self.calls.append(name)

        return call

    def measure(self, costs: Mapping[str, Callable[[int], float]], **options: object) -> dict[str, Timing]:
        variants = {name: self.variant(name, cost) for name, cost in costs.items()}
        return measure_latency(variants, device=CPU, clock=self.clock, **options)  # type: ignore[arg-type]


def timing(seconds: Sequence[float]) -> Timing:
    return Timing(seconds=tuple(seconds), first_call_s=0.0)


def test_every_round_is_called_forwards_and_backwards() -> None:
    machine = FakeMachine()
    machine.measure({name: lambda _: 1.0 for name in "abc"}, rounds=2, max_warmup=0)
    assert "".join(machine.calls) == "abc" + "abccba" * 2


def test_one_value_per_round_is_the_mean_of_its_two_calls() -> None:
    machine = FakeMachine()
    found = machine.measure({"a": lambda call: [9.0, 1.0, 3.0, 5.0, 7.0][call]}, rounds=2, max_warmup=0)
    assert found["a"].seconds == (2.0, 6.0)
    assert found["a"].rounds == 2


def test_first_call_is_kept_apart() -> None:
    machine = FakeMachine()
    found = machine.measure({"a": lambda call: 40.0 if call == 0 else 2.0}, rounds=3, max_warmup=0)
    assert found["a"].first_call_s == 40.0
    assert found["a"].seconds == (2.0, 2.0, 2.0)


def test_ratio_is_exact_under_linear_drift() -> None:
    """The machine becomes slower with every call, both variants alike: the ratio of a round does not see it."""
    machine = FakeMachine()
    cost = lambda factor: lambda _: factor * (1.0 + 0.1 * len(machine.calls))  # noqa: E731
    found = machine.measure({"slow": cost(3.0), "fast": cost(1.0)}, rounds=8, max_warmup=0)
    ratio = found["slow"].ratio_to(found["fast"])
    assert ratio.value == pytest.approx(3.0)
    assert ratio.ci95 == pytest.approx((3.0, 3.0))
    assert found["fast"].ratio_to(found["slow"]).value == pytest.approx(1 / 3)


def test_warm_up_stops_when_two_rounds_agree() -> None:
    machine = FakeMachine()
    # first call, then warm-up rounds of 10, 5, 5 seconds, then the timed rounds
    found = machine.measure({"a": lambda call: 10.0 if call < 3 else 5.0}, rounds=2, max_warmup=9)
    assert len(machine.calls) == 1 + 2 * 3 + 2 * 2
    assert found["a"].seconds == (5.0, 5.0)


def test_warm_up_is_bounded() -> None:
    machine = FakeMachine()
    machine.measure({"a": lambda call: 2.0**-call}, rounds=2, max_warmup=4)
    assert len(machine.calls) == 1 + 2 * 4 + 2 * 2


def test_order_statistics() -> None:
    values = timing(range(1, 12))
    assert (values.median, values.p10, values.p90) == (6.0, 2.0, 10.0)


def test_throttled_compares_the_thirds() -> None:
    assert timing([1.0] * 6 + [1.06] * 3).throttled
    assert not timing([1.0] * 6 + [1.04] * 3).throttled
    assert not timing([1.0] * 8 + [9.0]).throttled  # one outlier is not a trend
    assert not timing([1.0, 2.0]).throttled


def test_interval_holds_the_value_and_is_reproducible() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (1 + 0.1 * torch.rand(12, generator=generator)).tolist()
    slow, fast = timing([2 * value for value in noise]), timing([1.0] * 12)
    ratio = slow.ratio_to(fast)
    assert ratio.ci95[0] <= ratio.value <= ratio.ci95[1]
    assert 2.0 < ratio.ci95[0] < ratio.ci95[1] < 2.2
    assert ratio == slow.ratio_to(fast)


def test_progress_hook() -> None:
    seen: list[tuple[int, int]] = []
    FakeMachine().measure(
        {"a": lambda _: 1.0}, rounds=3, max_warmup=2, on_round=lambda index, total: seen.append((index, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_only_inside_a_call(enabled: bool) -> None:
    inside: list[bool] = []
    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        measure_latency({"a": lambda: inside.append(gc.isenabled())}, rounds=2, device=CPU)
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if was_enabled else gc.disable()
    assert not any(inside)


def test_an_exception_passes_and_restores_garbage_collection() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure_latency({"a": lambda: 1 / 0}, device=CPU)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"rounds": 1}, "rounds must be at least 2.*got 1"),
        ({"max_warmup": -1}, "max_warmup must be 0.*got -1"),
        ({"agreement": 0.0}, "agreement must be above 0.*got 0.0"),
    ],
)
def test_wrong_use_is_explained(options: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"variants": {"a": lambda: None}, "device": CPU} | options
    with pytest.raises(ValueError, match=message):
        measure_latency(**given)  # type: ignore[arg-type]


def test_ratio_of_two_measurements_is_refused() -> None:
    with pytest.raises(ValueError, match="other has 3 rounds and this timing has 2"):
        timing([1.0, 1.0]).ratio_to(timing([1.0, 1.0, 1.0]))


def test_switching_on_and_off_is_not_timed() -> None:
    machine = FakeMachine()

    @contextmanager
    def switched() -> Iterator[None]:
        machine.calls.append("(")
        machine.now += 100.0
        yield
        machine.now += 100.0
        machine.calls.append(")")

    found = machine.measure({"a": lambda _: 1.0, "b": lambda _: 2.0}, rounds=2, max_warmup=0, within={"b": switched})
    assert "".join(machine.calls) == "a(b)" + "a(b)(b)a" * 2
    assert found["b"].first_call_s == 2.0
    assert found["a"].seconds == (1.0, 1.0) and found["b"].seconds == (2.0, 2.0)
