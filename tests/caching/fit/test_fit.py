"""Replaying recorded signals, and finding the threshold that meets a target."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from flowaccel import Recipe, accelerate, accelerated
from flowaccel.caching.fit.calibrate import Observation, find_method, fitted, observe_methods
from flowaccel.caching.fit.methods import as_path, polynomial, spread
from flowaccel.caching.fit.observe import Seen, Trace
from flowaccel.caching.fit.search import least, replay, speedup
from flowaccel.caching.gates import Easy, Interval
from flowaccel.caching.gates.base import relative_change
from flowaccel.caching.guard import Guard
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.evaluation import Classes
from flowaccel.hooks import session_of
from flowaccel.training.sampling import Sampling

METHODS = {name: find_method(name) for name, preset in CACHE_PRESETS.items() if preset.fit}

STEPS, IMAGES = 5, 3  # Heun: ten evaluations
SAMPLING = Sampling(conditions=Classes((0, 1, 2)), steps=STEPS, num_samples=IMAGES, batch_size=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sit_pipeline()


@pytest.fixture(scope="module")
def observation(pipe: Any) -> Observation:
    return observe_methods(pipe, SAMPLING, list(METHODS.values()))


def decisions(pipe: Any, recipe: Any) -> tuple[Tensor, Tensor]:
    """(images, evaluations) what a run computed, and its images."""
    computed, images = [], []
    with accelerated(pipe, recipe):
        for made in SAMPLING.run(pipe, lambda *_: None, ""):
            run = session_of(pipe).run
            assert run is not None
            computed.append(torch.tensor([record.computed for record in run.records]).T)
            images.append(made)
    return torch.cat(computed), torch.cat(images)


def test_observing_changes_nothing(pipe: Any, observation: Observation) -> None:
    untouched = torch.cat(list(SAMPLING.run(pipe, lambda *_: None, "")))
    assert torch.equal(observation.images, untouched)
    assert (observation.trace.steps, observation.trace.images) == (2 * STEPS, IMAGES)
    assert all(value.shape[:2] == (IMAGES, 2 * STEPS) for value in observation.trace.kept.values())


@pytest.mark.parametrize("name", list(METHODS))
def test_replay_decides_as_a_run(name: str, pipe: Any, observation: Observation) -> None:
    """Exactly, until the first reuse changes the path; where nothing is read, to the end."""
    method = METHODS[name]
    cache = fitted(method, observation, 1.4)
    fit = method.fit(observation.trace) if method.fit else None
    predicted = replay(cache.gate, cache.guard, observation.trace, fit.seen if fit else lambda _: Seen(None, None))
    computed, _ = decisions(pipe, dataclasses.replace(cache, calibration=None))
    if cache.gate.static:
        assert torch.equal(predicted, computed)
    for image in range(IMAGES):
        until = int(predicted[image].int().argmin()) + 1
        assert not predicted[image, until - 1]
        assert torch.equal(predicted[image, :until], computed[image, :until])


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("target", [1.1, 1.4])
def test_the_target_is_met_by_the_replay(name: str, target: float, observation: Observation) -> None:
    found = fitted(METHODS[name], observation, target).calibration
    assert found is not None and found.predicted_speedup >= target


@pytest.mark.parametrize("name", list(METHODS))
def test_out_of_reach(name: str, observation: Observation) -> None:
    with pytest.raises(ValueError, match=rf"speed-up of 9 .* out of reach: {name} with Guard\(.* allows 1\.\d\d at"):
        fitted(METHODS[name], observation, 9, guard=Guard(warmup=4, last=2))


def test_least_is_the_least() -> None:
    assert least(lambda threshold: 1 + (threshold >= 0.3123), 2, "it") == 0.313
    dips = least(lambda threshold: 1 + (threshold >= 0.3123) - (0.31299 < threshold < 0.31301), 2, "it")
    assert dips == pytest.approx(0.3123)


def test_networks_are_decided_for_apart() -> None:
    trace = Trace(times=(3.0, 2.0, 1.0, 0.0), networks=("a", "b", "a", "b"), images=1)
    computed = replay(Interval(9), Guard(warmup=0, last=0), trace, lambda _: Seen(None, None))
    assert computed.tolist() == [[True, True, False, False]]
    assert speedup(computed) == 2


def test_every_image_is_decided_for_on_its_own() -> None:
    still, moving = torch.ones(6), torch.arange(1.0, 7.0)
    signals = torch.stack([still, moving])
    trace = Trace(times=tuple(range(6)), networks=("a",) * 6, images=2)
    guard = Guard(warmup=2, last=0)
    computed = replay(Easy(0.1), guard, trace, lambda i: Seen(signals[:, i, None], moving[i].expand(2, 1)))
    assert computed[1].all()


def test_a_path_has_the_changes() -> None:
    changes = torch.rand(4, 9)
    path = as_path(changes)[..., None]
    found = torch.stack([relative_change(path[:, i], path[:, i - 1]) for i in range(1, 9)], dim=1)
    torch.testing.assert_close(found, changes[:, 1:], rtol=1e-4, atol=1e-6)


def test_polynomial_is_recovered() -> None:
    x = torch.linspace(0.01, 0.2, 40).double().numpy()
    wanted = (30.0, -4.0, 2.0, -0.5, 0.1)
    y = sum(c * x ** (4 - power) for power, c in enumerate(wanted))
    coefficients, r_squared = polynomial(x, y)
    assert coefficients == pytest.approx(wanted, rel=1e-5)
    assert r_squared == pytest.approx(1)


@pytest.mark.parametrize(("x", "degree"), [([0.1, 0.1, 0.1], 0), ([0.1, 0.2, 0.2], 1), ([0.0, 0.0], 0)])
def test_few_points_give_a_lower_degree(x: list[float], degree: int) -> None:
    points = torch.tensor(x).double().numpy()
    coefficients, _ = polynomial(points, points + 1)
    assert len(coefficients) == degree + 1


def test_no_points_are_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to fit to"):
        polynomial([], [])


@pytest.mark.parametrize(("target", "computed"), [(1.25, 16), (2, 10), (2.5, 8)])
def test_spread_reuses_evenly(target: float, computed: int) -> None:
    mask = spread(20, Guard(warmup=1, last=1), target, "it").mask
    assert sum(mask) == computed  # type: ignore[arg-type]
    assert mask[0] == mask[-1] == 1
    runs = "".join(map(str, mask)).split("1")
    assert max(map(len, runs)) <= -(-(20 - computed) // (computed - 1))


def test_methods_need_no_empty_recipe() -> None:
    """On top of another accelerator the trace is that of the accelerated run."""
    pipe = tiny.sit_pipeline()
    accelerate(pipe, Recipe())
    with pytest.raises(ValueError, match="accelerated already"):
        observe_methods(pipe, SAMPLING, [METHODS["ab_cache"]])
