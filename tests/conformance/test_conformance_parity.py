"""The parity forms beside the published code on the same tiny networks: diffusers' own caches, and the rules of others
written again in a few lines. What is compared are the latents of whole runs on shifted grids."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from torch import Tensor

import tiny
from families import CASES, made
from flowaccel import FeatureCache, UnsupportedModelError, accelerate, accelerated, report
from flowaccel.caching.feature_cache import cache_preset
from flowaccel.caching.gates import Easy, Interval
from flowaccel.caching.gates.teacache_fits import PUBLISHED
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Newton
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.caching.scopes import Output, Stack

RATIOS = tuple(FLUX_MAG_RATIOS.tolist())
MODULES = [r".*transformer_blocks\.\d+\.(attn|ff|ff_context|proj_mlp)", r"blocks\.\d+\.(attn\d|ffn)"]
"""Those that TaylorSeer caches; diffusers' default leaves out the feed-forward ones."""
FAMILY = pytest.mark.parametrize("name", ["flux", "wan21"])


def shifted(name: str) -> Any:
    """A pipeline on a grid that is far from even: mu = 1.15 for FLUX, a shift of 3 for Wan."""
    pipe = CASES[name].make()
    if name == "flux":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=1.15, max_shift=1.15)
    return pipe


def latents(pipe: Any, name: str, steps: int) -> Tensor:
    output = pipe(**CASES[name].arguments(steps=steps, batch=2) | {"output_type": "latent"})
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


@functools.cache
def untouched(name: str, steps: int) -> Tensor:
    return latents(shifted(name), name, steps)


def theirs(name: str, steps: int, config: Any) -> Tensor:
    pipe = shifted(name)
    pipe.transformer.enable_cache(config)
    return latents(pipe, name, steps)


def ours(name: str, steps: int, preset: str, **options: Any) -> Tensor:
    pipe = shifted(name)
    accelerate(pipe, cache_preset(preset, parity=True, **options))
    found = latents(pipe, name, steps)
    assert 0 < report(pipe).count("reused") < len(report(pipe).calls)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# -- diffusers' own caches


@FAMILY
@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_is_that_of_diffusers(name: str, order: int) -> None:
    config = TaylorSeerCacheConfig(
        max_order=order, taylor_factors_dtype=torch.float32, cache_identifiers=MODULES, cache_interval=3
    )
    expected = theirs(name, 12, config)
    options = {"order": order, "interval": 3, "phase": 4}
    assert distance(ours(name, 12, "taylorseer", **options), expected) < 1e-6
    assert distance(ours(name, 12, "taylorseer", axis="time", **options), expected) > 1e-4, "the axes are told apart"
    assert distance(expected, untouched(name, 12)) > 1e-4


@pytest.mark.parametrize(("name", "threshold"), [("flux", 0.3), ("wan21", 0.1)])
def test_first_block_cache_is_that_of_diffusers(name: str, threshold: float) -> None:
    expected = theirs(name, 12, FirstBlockCacheConfig(threshold=threshold))
    assert distance(ours(name, 12, "fbcache", threshold=threshold), expected) < 1e-6
    assert distance(expected, untouched(name, 12)) > 1e-4


@FAMILY
@pytest.mark.parametrize("steps", [12, 15])
def test_magcache_is_that_of_diffusers(name: str, steps: int) -> None:
    """At 12 steps a fifth of the run is 2.4 of them, which diffusers rounds to 2."""
    config = MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=steps, threshold=0.1)
    expected = theirs(name, steps, config)
    assert distance(ours(name, steps, "magcache", threshold=0.1, ratios=RATIOS), expected) < 1e-6
    if steps == 12:
        up = ours(name, steps, "magcache", threshold=0.1, ratios=RATIOS, rounding="up")
        assert distance(up, expected) > 1e-4


@pytest.mark.parametrize("name", CACHE_PRESETS)
def test_parity_forecasts_over_the_numbers_of_the_steps(name: str) -> None:
    """Every published rule counts steps; what is held needs no axis."""
    predictor = CACHE_PRESETS[name].as_published.predictor
    assert predictor.axis == "step" or predictor.anchors == 1
    assert CACHE_PRESETS[name].cache.predictor.axis == "time"


# -- AB-Cache: sum over i of (-1)^(i + 1) C(k, i) f_{n - i}, where the steps n - i were computed


def test_ab_cache_extrapolates_over_the_numbers_of_the_steps() -> None:
    """After the warm-up every third step is computed: 2 f_2 - f_1 at step 3, and lines over the gaps of 3 later on."""
    pipe, computed = shifted("flux"), []
    network, inner = pipe.transformer, pipe.transformer.forward
    calls = iter(range(24))

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(next(calls), 2)
        if branch == 0:
            computed[:] = [step < 3 or (step - 2) % 3 == 0 or step == 11]
        if computed[0]:
            output = inner(*args, **kwargs)
            values[branch] = [(step, output[0]), *values[branch]][:2]
            return output
        (newest, new), (older, old) = values[branch]
        return (new + (step - newest) / (newest - older) * (new - old),)

    values: list[list[tuple[int, Tensor]]] = [[], []]
    network.forward = forward
    expected = latents(pipe, "flux", 12)
    assert distance(ours("flux", 12, "ab_cache", interval=3), expected) < 1e-6
    assert distance(expected, untouched("flux", 12)) > 1e-4


# -- EasyCache: the conditional call decides for the pair


def test_easycache_is_the_published_rule() -> None:
    threshold, steps, warmup = 0.2, 12, 3
    case, pipe = CASES["wan21"], CASES["wan21"].make()
    network, inner = pipe.transformer, pipe.transformer.forward
    calls, state, kept = iter(range(2 * steps)), {"sum": 0.0, "rate": None}, [None, None]
    compute = True

    @functools.wraps(inner)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal compute
        step, branch = divmod(next(calls), 2)
        if branch == 0:
            compute = step < warmup or step == steps - 1
            if not compute:
                compute = state["rate"] is None
                if not compute:
                    moved = (hidden_states - state["input"]).abs().mean() / state["output"].abs().mean()
                    state["sum"] += float(state["rate"] * moved)
                    compute = state["sum"] >= threshold
            state["sum"] = 0.0 if compute else state["sum"]
            state["input"] = hidden_states
        if not compute:
            return (hidden_states + kept[branch],)
        output = inner(hidden_states, *args, **kwargs)
        if branch == 0:
            if "output" in state:
                change = (output[0] - state["output"]).abs().mean()
                state["rate"] = change / (hidden_states - state["computed"]).abs().mean()
            state["output"], state["computed"] = output[0], hidden_states
        kept[branch] = output[0] - hidden_states
        return output

    network.forward = forward
    one = case.arguments(steps=steps) | {"output_type": "latent"}
    expected = torch.as_tensor(pipe(**one).frames)
    pipe = case.make()
    accelerate(pipe, cache_preset("easycache", parity=True, threshold=threshold, warmup=warmup))
    found = torch.as_tensor(pipe(**case.arguments(steps=steps) | {"output_type": "latent"}).frames)
    assert 0 < report(pipe).count("reused") < 2 * (steps - warmup - 1)
    assert distance(found, expected) < 1e-6


# -- TeaCache on Wan: the time embedding, or with retained steps its projection, through the published polynomial


def like_fitted(pipe: Any, signal: str, change: float, steps: int) -> None:
    """Let the median change of the signal between steps be `change`, as in a network that was trained."""
    embedder = pipe.transformer.condition_embedder
    pipe.scheduler.set_timesteps(steps)
    layer = embedder.time_embedder.linear_2 if signal == "time_embedding" else embedder.time_proj
    place = 0 if signal == "time_embedding" else 1
    with torch.no_grad():
        layer.bias += 1.0
        for _ in range(4):
            found = embedder(pipe.scheduler.timesteps, torch.zeros(steps, 1, 16))[place]
            median = torch.stack([(b - a).abs().mean() / a.abs().mean() for a, b in itertools.pairwise(found)])
            layer.weight *= change / float(median.median())


class PublishedTeaCache:
    """TeaCache4Wan2.1 in a few lines; `decided` holds whether each call was computed."""

    def __init__(self, network: Any, name: str, threshold: float, steps: int) -> None:
        self.fit, self.threshold, self.steps = PUBLISHED[name], threshold, steps
        self.decided: list[bool] = []
        self.branches: tuple[dict[str, Any], ...] = ({}, {})
        place = 0 if self.fit.signal == "time_embedding" else 1
        network.condition_embedder.register_forward_hook(lambda _m, _a, output: self.decide(output[place]))
        for index, block in enumerate(network.blocks):
            block.forward = functools.partial(self.block, index, len(network.blocks) - 1, block.forward)

    def decide(self, signal: Tensor) -> None:
        step, branch = divmod(len(self.decided), 2)
        own = self.own = self.branches[branch]
        compute = step < self.fit.warmup or step >= self.steps - self.fit.last
        if not compute:
            change = (signal - own["signal"]).abs().mean() / own["signal"].abs().mean()
            own["sum"] += float(np.poly1d(self.fit.coefficients)(float(change)))
            compute = own["sum"] >= self.threshold
        own["sum"] = 0.0 if compute else own["sum"]
        own["signal"] = signal.clone()
        self.decided.append(compute)

    def block(self, index: int, last: int, forward: Callable[..., Tensor], tokens: Tensor, *args: Any) -> Tensor:
        if not self.decided[-1]:
            return tokens + self.own["added"] if index == 0 else tokens
        if index == 0:
            self.own["entry"] = tokens
        output = forward(tokens, *args)
        if index == last:
            self.own["added"] = output - self.own["entry"]
        return output


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.1-t2v-14b-ret"])
def test_teacache_on_wan_is_the_published_rule_and_saves_about_as_much(name: str) -> None:
    fit, steps, case = PUBLISHED[name], 30, CASES["wan21"]
    threshold, speedup = max(fit.speedups.items())
    assert speedup is not None
    low, high = fit.changes
    made = []
    for published in (True, False):
        pipe = case.make()
        like_fitted(pipe, fit.signal, (low * high) ** 0.5, steps)
        if published:
            rule = PublishedTeaCache(pipe.transformer, name, threshold, steps)
        else:
            accelerate(pipe, cache_preset("teacache", parity=True, coefficients=name, threshold=threshold))
        made.append(torch.as_tensor(pipe(**case.arguments(steps=steps) | {"output_type": "latent"}).frames))
    assert [call.what == "computed" for call in report(pipe).calls] == rule.decided
    assert distance(made[1], made[0]) < 1e-6
    assert 1 / 2.5 < steps / (sum(rule.decided) / 2) / speedup < 2.5


def test_a_published_fit_brings_its_threshold_and_guard() -> None:
    plain = cache_preset("teacache", coefficients="wan2.1-i2v-480p-ret")
    assert (plain.gate.threshold, plain.guard.warmup, plain.guard.last) == (0.2, 5, 0)
    changed = cache_preset("teacache", coefficients="wan2.1-i2v-480p-ret", threshold=0.3, warmup=7)
    assert (changed.gate.threshold, changed.guard.warmup, changed.guard.last) == (0.3, 7, 0)
    assert cache_preset("teacache", coefficients=(1.0, 0.0)) == CACHE_PRESETS["teacache"].cache
    with pytest.raises(TypeError, match="no chosen part has the option 'coefficients'"):
        cache_preset("mask", coefficients="flux")


@pytest.mark.parametrize("name", [name for name, fit in PUBLISHED.items() if fit.signal != "modulated_input"])
def test_a_fit_to_a_signal_that_a_network_is_not_known_to_have_is_refused_before_the_run(name: str) -> None:
    pipe = tiny.flux_pipeline()
    with pytest.raises(UnsupportedModelError, match=f"has its {PUBLISHED[name].signal} is not known.*register_family"):
        accelerate(pipe, cache_preset("teacache", coefficients=name))


# -- CogVideoX


COGVIDEOX = CASES["cogvideox"]


def test_the_fits_of_cogvideox_read_its_time_embedding() -> None:
    pipe, name, emb, steps = COGVIDEOX.make(), "cogvideox1.5-5b", [], 12
    pipe.transformer.time_embedding.register_forward_hook(lambda _m, _a, output: emb.append(output))
    with accelerated(pipe, cache_preset("teacache", parity=True, coefficients=name, threshold=0.8)):
        made(COGVIDEOX, pipe, steps)
        found = [call.what == "computed" for call in report(pipe).calls]
    fit, total, expected = PUBLISHED[name], 0.0, []
    for step, now in enumerate(emb):
        if 0 < step < steps - 1:
            change = (now - emb[step - 1]).abs().mean() / emb[step - 1].abs().mean()
            total += float(np.polyval(fit.coefficients, float(change)))
        expected.append(step in (0, steps - 1) or total >= 0.8)
        total = 0.0 if expected[-1] else total
    assert found == expected and 2 < sum(found) < steps


class Alternating(Easy):
    """Image i reuses the steps of which 3 divides the number less i."""

    first = 0

    def score(self, state: Any, signal: Any, step: Any) -> Any:
        return 2.0 * (torch.arange(len(signal)) + self.first != step.index % 3), state

    def update(self, state: Any, signal: Any, feedback: Any, computed: Any, step: Any) -> Any:
        return {"seen": torch.ones(len(signal))}


def test_rows_of_cogvideox_that_compute_beside_rows_that_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is written, so blocks run for some of the rows alone."""
    pipe = COGVIDEOX.make()
    accelerate(pipe, FeatureCache(Alternating(), Stack(), Newton(1), Guard(warmup=3, last=0)))
    together = made(COGVIDEOX, pipe, 12, batch=2)
    assert report(pipe).count("mixed") > 0 and any(call.not_run for call in report(pipe).calls)
    alone = []
    for image, seed in enumerate((3, 4)):
        monkeypatch.setattr(Alternating, "first", image)
        alone.append(made(COGVIDEOX, pipe, 12, seed=seed))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


# -- the two axes


@pytest.mark.parametrize("scope", [Output(), Stack()], ids=["output", "stack"])
def test_the_axis_of_steps_sees_the_grid_as_even(scope: Any) -> None:
    """On an even grid both axes forecast the same, on a shifted one they do not."""
    for even in (True, False):
        made = []
        for axis in ("time", "step"):
            pipe = CASES["flux"].make()
            shift = {} if even else {"use_dynamic_shifting": True, "base_shift": 1.15, "max_shift": 1.15}
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(**shift)
            accelerate(pipe, FeatureCache(Interval(3), scope, Newton(2, axis=axis), Guard(warmup=3)))
            made.append(latents(pipe, "flux", 10))
        assert (distance(made[0], made[1]) < 1e-5) == even
