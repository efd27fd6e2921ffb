"""What the report says of a run with a cache."""

from __future__ import annotations

import pytest

from families import CASES, Case
from flowaccel import accelerate, report, restore
from flowaccel.evaluation import count_macs

MODULES = "taylorseer:parity,warmup=1,interval=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        pytest.param(case, recipe, id=f"{recipe}-{case.name}")
        for recipe in ("ab_cache:warmup=1", "fbcache:threshold=0.5", MODULES)
        for case in CASES.values()
        if case.counted and not (recipe == MODULES and case.family == "unet")
    ],
)
def test_multiply_adds_are_those_of_the_run(case: Case, recipe: str) -> None:
    pipe = case.make()
    rest = count_macs(lambda: case(pipe)) - _macs(pipe, case, "none")  # the decoder
    accelerate(pipe, recipe)
    counted = count_macs(lambda: case(pipe)) - rest
    found = report(pipe)
    assert found.macs is not None
    assert found.macs == pytest.approx(counted, rel=0.02)  # module scope leaves out a whole module, its norms included
    assert found.macs + (found.macs_saved or 0) == pytest.approx(_macs(pipe, case, "none"), rel=1e-6)


def _macs(pipe: object, case: Case, recipe: str) -> int:
    restore(pipe)
    accelerate(pipe, recipe)
    case(pipe)
    found = report(pipe).macs
    restore(pipe)
    assert found is not None
    return found


def test_every_number_of_a_run() -> None:
    case = CASES["sit"]
    pipe = case.make()
    accelerate(pipe, "ab_cache")  # steps 0, 1, 2, 4, 6 and the last
    case(pipe, batch=3, steps=8)
    found = report(pipe)
    assert [step.computed for step in found.steps] == [(step in (0, 1, 2, 4, 6, 7),) * 3 for step in range(8)]
    assert found.hit_rate == 2 / 8
    assert (found.count("computed"), found.count("reused")) == (6, 2)
    assert found.macs_saved is not None and found.macs == 3 * found.macs_saved
    assert found.cache_bytes == 2 * 2 * 3 * 8 * 8 * 4, "two values of two branches of three float32 images"
    assert found.near_ties == 0
    assert found.seconds_saved is not None
    text = str(found)
    assert "reused  rrr" in text and "computed  CCC" in text
    assert "Reused: 25% of the images and steps, 25% of the multiply-adds" in text


def test_images_decide_for_themselves_and_the_report_shows_it() -> None:
    case = CASES["dit"]
    pipe = case.make()
    accelerate(pipe, "fbcache:threshold=0.3")
    case(pipe, batch=2, steps=10)
    found = report(pipe)
    patterns = {step.computed for step in found.steps}
    assert patterns & {(True, False), (False, True)}
    assert found.count("mixed") > 0
    assert 0 < found.host_reads <= 9


def test_many_images_are_counted_instead_of_listed() -> None:
    case = CASES["sit"]
    pipe = case.make()
    accelerate(pipe, "ab_cache")
    case(pipe, batch=17, steps=5)
    assert "17 of 17 images" in str(report(pipe))


def test_why_nothing_was_saved() -> None:
    case = CASES["sit"]
    pipe = case.make()
    accelerate(pipe, "easycache:threshold=0")
    case(pipe)
    assert "'feature_cache' had every call computed" in (report(pipe).unsaved or "")
    assert report(pipe).hit_rate == 0


@pytest.mark.slow
def test_what_cannot_be_counted_is_absent() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    accelerate(pipe, "ab_cache")
    case(pipe, steps=5)
    assert report(pipe).macs is None
    assert "multiply-adds" not in str(report(pipe))
