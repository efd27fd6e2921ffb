"""AdaptiveDiffusion's step skipping."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from families import CASES
from flowaccel import FeatureCache, Recipe, accelerate, cache_preset, report
from flowaccel.caching.gates import ThirdDifference
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Newton
from flowaccel.caching.scopes import Output
from flowaccel.hooks import session_of
from flowaccel.recipe import FILE_NAME

STEPS = 12


def skipping(threshold: float, **options: Any) -> FeatureCache:
    return cache_preset("adaptive_diffusion", threshold=threshold, **options)


def test_a_recipe_of_a_release_that_called_it_step_skip_is_read(tmp_path: Path) -> None:
    entries = [
        {"name": "step_skip"},
        {
            "name": "step_skip",
            "threshold": 0.02,
            "mode": "vector",
            "max_run": 2,
            "per_time": True,
            "predictor": {"name": "newton", "order": 1, "reach": 1.0},
            "decide": "row",
        },
    ]
    read = []
    for entry in entries:
        (tmp_path / FILE_NAME).write_text(json.dumps({"schema": 1, "name": "x", "accelerators": [entry]}))
        read += Recipe.from_pretrained(tmp_path).accelerators
    assert read[0] == cache_preset("adaptive_diffusion")
    gate, guard = ThirdDifference(0.02, "vector", True), Guard(warmup=4, last=0, max_run=2)
    assert read[1] == FeatureCache(gate, Output(), Newton(1, 1.0), guard, "row")


def test_the_decisions_are_those_of_the_published_rule_on_the_latents() -> None:
    """Worked out from the latents that the network would see; the first four steps and every fifth of a run compute."""
    case = CASES["sd3"]
    pipe = case.make()
    latents: list[Any] = []
    accelerate(pipe, skipping(0.05))

    def watch(call_next: Any, call: Any) -> Any:
        latents.append(call.sample[call.rows_of("cond")].double())
        return call_next()

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
    accelerate(pipe, skipping(10.0, max_run=3))
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
        cache_preset("adaptive_diffusion", **options)
