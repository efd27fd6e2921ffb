"""AdaptiveDiffusion's step skipping."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from families import CASES
from flowaccel import FeatureCache, accelerate, accelerated, report
from flowaccel.accelerators import ACCELERATORS, StepSkip
from flowaccel.accelerators.caching import Guard, Output
from flowaccel.gates import ThirdDifference
from flowaccel.hooks import session_of
from flowaccel.predictors import Hold, Newton

STEPS = 12


def test_it_is_a_cache_of_the_output_with_the_papers_gate() -> None:
    assert ACCELERATORS["step_skip"] is StepSkip
    assert StepSkip().cache == FeatureCache(ThirdDifference(0.01), Output(), Hold(), Guard(warmup=4, last=0, max_run=4))
    changed = StepSkip(0.02, "vector", 2, True, Newton(1), "row").cache
    assert changed.gate == ThirdDifference(0.02, "vector", True)
    assert (changed.guard.max_run, changed.predictor, changed.decide) == (2, Newton(1), "row")
    assert "cache" in StepSkip().tags


@pytest.mark.parametrize("name", ["sit", "flux", "wan21"])
def test_it_decides_and_makes_what_the_cache_does(name: str) -> None:
    case, pipe = CASES[name], CASES[name].make()
    found = []
    for chosen in (StepSkip(0.2), StepSkip(0.2).cache):
        with accelerated(pipe, chosen):
            found.append((case(pipe, batch=2, steps=STEPS), [call.computed for call in report(pipe).calls]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not all(all(computed) for computed in found[0][1])


def test_the_decisions_are_those_of_the_published_rule_on_the_latents() -> None:
    """Worked out from the latents that the network would see; the first four steps and every fifth of a run compute."""
    case = CASES["sd3"]
    pipe = case.make()
    latents: list[Any] = []
    accelerate(pipe, StepSkip(0.05))

    def watch(proceed: Any, call: Any) -> Any:
        latents.append(call.sample[call.rows_of("cond")].double())
        return proceed()

    session_of(pipe).on_call(watch)
    case(pipe, batch=1, steps=30)
    moves = [0.0] + [float((new - old).abs().mean()) for old, new in itertools.pairwise(latents)]
    expected, run = [], 0
    for step in range(30):
        skip = False
        if step >= 4:
            bend = abs((moves[step] + moves[step - 2]) / 2 - moves[step - 1])
            skip = bend <= 0.05 * moves[step - 1] and run < 4
        run = run + 1 if skip else 0
        expected.append((not skip,))
    assert [call.computed for call in report(pipe).calls] == expected
    assert 5 < sum(not computed for (computed,) in expected) < 25


def test_the_scheduler_steps_every_time_and_the_network_does_not_run() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    calls, steps = [], []
    pipe.transformer.register_forward_hook(lambda *_: None)
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    original = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return original(*args, **kwargs)

    pipe.scheduler.step = step
    accelerate(pipe, StepSkip(10.0, max_run=3))
    case(pipe, steps=STEPS)
    assert len(steps) == STEPS
    assert "".join(call.what[0] for call in report(pipe).calls) == "ccccrrrcrrrc"
    assert len(calls) == report(pipe).count("computed") == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1}, "threshold must be a finite number"),
        ({"mode": "norm"}, "mode must be 'scalar' or 'vector'"),
        ({"max_run": 0}, "max_run must be a whole number"),
        ({"decide": "all"}, "decide must be one of"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepSkip(**options)
