"""The promises of GuidanceSkip: every family through its real pipeline, alone and with caches and refiners."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from families import BATCHED, CASES, EVALUATIONS, Case, assert_close, made, split_guidance
from flowaccel import GuidanceSkip, Recipe, Sampler, VelocityRefiner, accelerate, accelerated, cache_preset, report
from flowaccel.evaluation import count_macs
from flowaccel.evaluation.timing.cost import CallCounter
from flowaccel.hooks import Call, networks, packer, session_of, tensors_of
from flowaccel.recipe.accelerator import Accelerator

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
APART = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.name != "auraflow"], ids=lambda c: c.name
)
"""Not AuraFlow, whose random weights hardly look at the text: its cosines are 1 to the last digits of float32."""
FEW = pytest.mark.parametrize("case", [CASES[name] for name in ("sit", "sd3", "wan22")], ids=lambda c: c.name)


class ByHand:
    """The same, done to whole calls from outside: every row is computed, and some are overwritten."""

    def __init__(
        self, pipe: Any, mode: str = "drop", threshold: float = 2.0, space: str = "v", span: tuple[int, int] = (0, 99)
    ) -> None:
        self.pipe, self.mode, self.threshold, self.space, self.span = pipe, mode, threshold, space, span
        self.cond: Tensor | None = None
        self.sample: Tensor | None = None
        self.stopped: dict[int, bool] = {}
        self.known: dict[int, dict[float, Tensor]] = {}
        """Per image, the differences by timestep."""
        self.cosines: list[list[float]] = []

    def __call__(self, call_next: Callable[..., Any], call: Call) -> Any:
        if "extra" in call.branches:
            return call_next()
        output = call_next()
        tensor = tensors_of(output)[0].clone()
        if "cond" in call.branches:
            self.cond, self.sample = tensor[call.rows_of("cond")].clone(), call.sample[call.rows_of("cond")]
        if "uncond" in call.branches:
            assert self.cond is not None
            uncond, off = tensor[call.rows_of("uncond")], dict(self.stopped)
            self.cosines.append([self._cosine(call, image, uncond[image]) for image in range(call.images)])
            for image in range(call.images):
                if not self.span[0] <= call.step < self.span[1] or off.get(image):
                    uncond[image] = self.cond[image] - self._difference(image, call.timestep)
                    continue
                known = self.known.setdefault(image, {})
                known[call.timestep] = self.cond[image] - uncond[image]
                self.stopped[image] = call.step >= 1 and self.cosines[-1][image] >= self.threshold
        return packer(output)((tensor,))

    def _difference(self, image: int, now: float) -> Tensor:
        known = list(self.known.get(image, {}).items())
        if self.mode == "drop" or not known:
            return torch.tensor(0.0)
        (time, last) = known[-1]
        if self.mode == "hold" or len(known) == 1:
            return last
        earlier, before = known[-2]
        return last + (last - before) * (now - time) / (time - earlier)

    def _cosine(self, call: Call, image: int, uncond: Tensor) -> float:
        assert self.cond is not None and self.sample is not None
        sample = self.sample[image]
        pair = [prediction[: sample.shape[0]] for prediction in (self.cond[image], uncond)]
        if self.space == "x0":
            pair = [self._clean(call, sample, prediction) for prediction in pair]
        first, second = (one.flatten().double() for one in pair)
        return float(first @ second / (first.norm() * second.norm()))

    def _clean(self, call: Call, sample: Tensor, prediction: Tensor) -> Tensor:
        if call.family.name in ("dit", "pixart"):
            alpha = self.pipe.scheduler.alphas_cumprod[int(call.timestep)]
            return (sample - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return sample - call.sigma * (-prediction if call.family.name == "sit" else prediction)


def by_hand(
    case: Case, parts: list[Accelerator] | None = None, batch: int = 2, **options: Any
) -> tuple[Tensor, ByHand]:
    pipe = case.make()
    accelerate(pipe, parts or [])
    hand = ByHand(pipe, **options)
    session_of(pipe).on_call(hand)
    return made(case, pipe, batch=batch), hand


@functools.cache
def parting(name: str, space: str = "v") -> float:
    """A threshold that one of two images reaches at the second step, and the other later or never."""
    first, second = by_hand(CASES[name], space=space)[1].cosines[1]
    assert abs(first - second) > 1e-5
    return (first + second) / 2


def guided(pipe: Any) -> list[tuple[bool, ...]]:
    return [step.guided for step in report(pipe).steps]


# -- what it makes


@ALL
def test_what_never_ends_changes_no_bit(case: Case) -> None:
    untouched = made(case, case.make(), batch=2)
    pipe = case.make()
    for never in (GuidanceSkip(threshold=1.0), GuidanceSkip("interval", start=0.0, stop=1.0)):
        with accelerated(pipe, never):
            assert torch.equal(made(case, pipe, batch=2), untouched)
            assert guided(pipe) == [(True, True)] * EVALUATIONS
            assert report(pipe).macs_saved == (0 if case.counted else None)
            assert "had every call computed" in (report(pipe).unsaved or "")
    assert torch.equal(made(case, pipe, batch=2), untouched)


@ALL
def test_an_interval_guides_its_steps_and_really_leaves_out_the_others(case: Case) -> None:
    span = (3, 7)
    pipe = case.make()
    with CallCounter(networks(pipe)) as counter:
        accelerate(pipe, GuidanceSkip("interval", start=0.3, stop=0.7))
        found = made(case, pipe, batch=2)
    assert guided(pipe) == [(span[0] <= step < span[1],) * 2 for step in range(EVALUATIONS)]
    assert sum(counter.rows.values()) == 2 * (EVALUATIONS + span[1] - span[0])
    made_calls = EVALUATIONS if len(case.branches) == 1 else EVALUATIONS + span[1] - span[0]
    assert sum(counter.calls.values()) == made_calls
    assert_close(found, by_hand(case, span=span)[0])


@APART
def test_images_end_by_themselves_as_by_hand(case: Case) -> None:
    threshold = parting(case.name)
    expected, _ = by_hand(case, mode="extrapolate", threshold=threshold)
    pipe = case.make()
    with CallCounter(networks(pipe)) as counter:
        accelerate(pipe, GuidanceSkip(threshold=threshold, mode="extrapolate"))
        found = made(case, pipe, batch=2)
    assert_close(found, expected)
    took = guided(pipe)
    assert took[:2] == [(True, True)] * 2 and sorted(took[2]) == [False, True]
    assert all(before or not now for image in zip(*took, strict=True) for before, now in pairwise(image))
    assert sum(counter.rows.values()) == 2 * EVALUATIONS + sum(map(sum, took))
    alone = []
    for image in (0, 1):
        alone.append(made(case, pipe, seed=3 + image))
        assert guided(pipe) == [(step[image],) for step in took]
    assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("name", ["sit", "dit", "wan21"])
def test_the_clean_samples_are_compared_as_by_hand(name: str) -> None:
    case, threshold = CASES[name], parting(name, "x0")
    expected, _ = by_hand(case, threshold=threshold, space="x0")
    pipe = case.make()
    accelerate(pipe, GuidanceSkip(threshold=threshold, space="x0"))
    assert_close(made(case, pipe, batch=2), expected)
    assert sorted(guided(pipe)[2]) == [False, True]
    assert abs(parting(name) - threshold) > 1e-5, "which is another comparison"


@pytest.mark.parametrize("case", [case for case in BATCHED if case.name != "auraflow"], ids=lambda c: c.name)
def test_split_guidance_makes_what_batched_guidance_does(case: Case) -> None:
    accelerator = GuidanceSkip(threshold=parting(case.name), mode="hold")
    pipes, found, took = [case.make(), case.make()], [], []
    for pipe in pipes:
        accelerate(pipe, accelerator)
        if pipe is pipes[1]:
            split_guidance(pipe)
        found.append(made(case, pipe, batch=2))
        took.append(guided(pipe))
    assert took[0] == took[1] and sorted(took[0][2]) == [False, True]
    assert_close(found[1], found[0])


@FEW
def test_a_run_after_an_aborted_one_is_as_fresh(case: Case) -> None:
    pipe, threshold = case.make(), parting(case.name)
    accelerate(pipe, GuidanceSkip(threshold=threshold, mode="extrapolate"))
    expected = made(case, pipe, batch=2)

    def fail(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 6:
            raise RuntimeError("on purpose")
        return call_next()

    with ExitStack() as undo:
        undo.callback(session_of(pipe).on_call(fail))
        with pytest.raises(RuntimeError, match="on purpose"):
            made(case, pipe, batch=2)
    assert session_of(pipe).run.state == {}
    made(case, pipe, 5, batch=1)
    assert torch.equal(made(case, pipe, batch=2), expected)


# -- together with caches: they see the rows that are left

CACHES: dict[str, Any] = {
    "output": lambda: cache_preset("ab_cache", warmup=2),
    "stack": lambda: cache_preset("fbcache", threshold=0.6, max_run=3),
    "module": lambda: cache_preset("taylorseer", parity=True, decide="image", warmup=1, interval=3),
}
WITH_CACHES = pytest.mark.parametrize("kind", CACHES)


@pytest.mark.parametrize("case", [CASES["sd3"], CASES["wan22"]], ids=lambda c: c.name)
@WITH_CACHES
def test_with_a_cache_an_interval_is_as_by_hand(case: Case, kind: str) -> None:
    """By hand the cache computes and forecasts all rows, so it would have them before `start` too; not so ours."""
    whole = case.make()
    with CallCounter(networks(whole)) as all_rows:
        accelerate(whole, CACHES[kind]())
        made(case, whole, batch=2)
    for span in ((0, 4), (3, 7)):
        pipe = case.make()
        with CallCounter(networks(pipe)) as counter:
            accelerate(pipe, [CACHES[kind](), GuidanceSkip("interval", start=span[0] / 10, stop=span[1] / 10)])
            found = made(case, pipe, batch=2)
        assert sum(counter.rows.values()) < sum(all_rows.rows.values())
        assert any(not all(step.computed) for step in report(pipe).steps)
        assert_close(found, torch.cat([made(case, pipe, seed=seed) for seed in (3, 4)]))
        if span[0] == 0:
            assert_close(found, by_hand(case, [CACHES[kind]()], span=span)[0])


@WITH_CACHES
def test_with_a_cache_split_guidance_makes_what_batched_guidance_does(kind: str) -> None:
    case, found = CASES["sd3"], []
    for accelerator in (GuidanceSkip("interval", start=0.3, stop=0.7), GuidanceSkip(threshold=parting(case.name))):
        for split in (False, True):
            pipe = case.make()
            accelerate(pipe, [CACHES[kind](), accelerator])
            if split:
                split_guidance(pipe)
            found.append(made(case, pipe, batch=2))
        assert_close(found[-1], found[-2])


def test_forecasts_of_a_cache_end_no_guidance() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    accelerate(pipe, [cache_preset("ab_cache", warmup=1, last=0, interval=4), GuidanceSkip(threshold=0.5)])
    made(case, pipe, batch=1)
    computed = [any(step.computed) for step in report(pipe).steps]
    first = guided(pipe).index((False,))
    assert computed[first - 1], "the cosine of a computed call ended it"
    assert first == 2 + computed[1:].index(True)


# -- together with samplers and the refiner


@pytest.mark.parametrize(("sampler", "mode"), [("heun", "hold"), ("ab2", "drop"), ("rk4", "extrapolate")])
def test_solvers_of_higher_order_are_as_by_hand(sampler: str, mode: Any) -> None:
    case, parts, threshold = CASES["sd3"], [Sampler(sampler)], 0.9965  # one image reaches it at once
    expected, _ = by_hand(case, [*parts], mode=mode, threshold=threshold)
    pipe = case.make()
    accelerate(pipe, [*parts, GuidanceSkip(threshold=threshold, mode=mode)])
    assert_close(made(case, pipe, batch=2), expected)
    assert (False, True) in guided(pipe) or (True, False) in guided(pipe)


@pytest.mark.parametrize("name", ["sit", "sd3", "flux"])
def test_with_a_refiner_its_offsets_end_being_guided_too(name: str) -> None:
    case = CASES[name]
    refiner = tiny.random_refiner(case.make().transformer)
    found: list[Tensor] = []
    took: list[tuple[bool, ...]] = []
    for skip in (True, False):
        pipe = case.make()
        parts = [Sampler("flowturbo", {"blocks": "H1P4R3"}), VelocityRefiner(refiner)]
        accelerate(pipe, [*parts, GuidanceSkip("interval", stop=0.5)] if skip else parts)
        if not skip:
            session_of(pipe).on_call(ByHand(pipe, span=(0, sum(map(any, took)))))
        found.append(case(pipe, batch=2, steps=8))
        took = guided(pipe) if skip else took
    assert 0 < sum(map(any, took)) < len(took)
    assert_close(found[0], found[1])


def test_with_a_refiner_images_end_by_themselves() -> None:
    """Refined velocities share their base, so that their cosine would end all guidance; it is not looked at."""
    for name in ("sit", "sd3", "flux"):
        case = CASES[name]
        refiner = tiny.random_refiner(case.make().transformer)
        pipe = case.make()
        skip = GuidanceSkip(threshold=parting(name), mode="hold")
        recipe = Recipe([Sampler("flowturbo", {"blocks": "H1P3R3"}), VelocityRefiner(refiner), skip])
        accelerate(pipe, recipe)
        together = case(pipe, batch=2, steps=7)
        took, what = guided(pipe), [call.what for call in report(pipe).calls]
        assert "refined" in what
        last = max(step.step for step in report(pipe).steps if step.calls[0].what != "refined")
        assert all(step == took[last + 1] for step in took[last + 1 :])
        assert_close(together, torch.cat([case(pipe, steps=7, seed=seed) for seed in (3, 4)]))


# -- the report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cached"), [("sit", True), ("pixart", False), ("flux", False), ("wan22", True)])
def test_multiply_adds_are_those_of_the_run(name: str, cached: bool) -> None:
    case = CASES[name]
    pipe = case.make()
    with accelerated(pipe, "none"):
        counted = count_macs(lambda: made(case, pipe, batch=2))
        whole = report(pipe).macs
    assert whole is not None
    decoder = counted - whole
    skip = GuidanceSkip(threshold=parting(case.name))
    accelerate(pipe, [cache_preset("ab_cache", warmup=2), skip] if cached else skip)
    counted = count_macs(lambda: made(case, pipe, batch=2)) - decoder
    found = report(pipe)
    assert found.macs == pytest.approx(counted, rel=1e-6)
    assert found.macs + (found.macs_saved or 0) == pytest.approx(whole, rel=1e-6)
    assert 0 < counted < whole
