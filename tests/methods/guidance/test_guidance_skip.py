"""GuidanceSkip: its configuration, its decisions against a sampling loop by hand, and what it says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
from families import CASES, assert_close
from flowaccel import (
    AdaptiveGuidance,
    FeatureCache,
    GuidanceInterval,
    GuidanceSkip,
    Recipe,
    RecipeConflictError,
    UnsupportedModelError,
    VelocityRefiner,
    accelerate,
    accelerated,
    cache_preset,
    report,
)
from flowaccel.caching.runtime import require_tensor
from flowaccel.hooks import FAMILIES, session_of
from flowaccel.methods.guidance.runtime import clean_sample
from flowaccel.recipe import preset

STEPS, SCALE = 8, 4.0


# -- configuration


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("guidance_skip", GuidanceSkip(AdaptiveGuidance(threshold=0.991, space="v", warmup=2), mode="drop")),
        ("guidance_skip:threshold=.9,space=x0,mode=hold", GuidanceSkip(AdaptiveGuidance(0.9, "x0"), "hold")),
        ("guidance_interval", GuidanceSkip(GuidanceInterval(0.0, 0.5))),
        ("guidance_interval:start=0.25,mode=extrapolate", GuidanceSkip("interval", "extrapolate", start=0.25)),
    ],
)
def test_presets_and_json(name: str, expected: GuidanceSkip, tmp_path: Any) -> None:
    recipe = preset(name)
    assert recipe.accelerators == (expected,)
    recipe.save_pretrained(tmp_path)
    assert Recipe.from_pretrained(tmp_path) == recipe
    assert recipe.to_dict()["accelerators"][0]["when"]["name"] == expected.when.name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, "threshold must be a cosine, above -1 and at most 1 .* got 1.5"),
        ({"threshold": True}, ValueError, "threshold must be a cosine"),
        ({"space": "eps"}, ValueError, "space must be 'v' or 'x0', got 'eps'"),
        ({"warmup": 1}, ValueError, "warmup must be a whole number of evaluations, at least 2, got 1"),
        ({"when": "interval", "start": 0.5, "stop": 0.5}, ValueError, "start < stop <= 1, got start=0.5, stop=0.5"),
        ({"mode": "linear"}, ValueError, "mode must be one of drop, hold, extrapolate, got 'linear'"),
        ({"when": "never"}, ValueError, "when must be one of adaptive, interval, got 'never'"),
        ({"when": 0.5}, TypeError, "when must be one of adaptive, interval or such an object, got 0.5"),
        (
            {"threshold": 0.9, "stop": 0.5},
            TypeError,
            "no chosen part has the option 'stop'; .* threshold, space",
        ),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GuidanceSkip(**options)


def test_an_interval_holds_as_many_evaluations_as_it_says() -> None:
    counted = {stop: sum(GuidanceInterval(0.0, stop).guides(step, 100) for step in range(100)) for stop in (0.29, 0.5)}
    assert counted == {0.29: 29, 0.5: 50}  # 0.29 * 100 is less than 29 in floating point
    assert [GuidanceInterval(0.2, 0.6).guides(step, 5) for step in range(5)] == [False, True, True, False, False]


def test_rules() -> None:
    skip, cache = GuidanceSkip(), FeatureCache("interval")
    Recipe([cache, skip])
    Recipe([VelocityRefiner(), skip])
    for first, second in ((skip, cache), (skip, cache_preset("adaptive_diffusion")), (skip, VelocityRefiner())):
        with pytest.raises(RecipeConflictError, match="must come before 'guidance_skip'"):
            Recipe([first, second])
    for unit in ("row", "batch"):
        for lonely in (FeatureCache("interval", decide=unit), cache_preset("adaptive_diffusion", decide=unit)):
            with pytest.raises(RecipeConflictError, match=r"not deciding per image.* excludes 'guidance_skip'"):
                Recipe([lonely, skip])


# -- decisions, against a loop by hand


def by_hand(image: int, when: AdaptiveGuidance | GuidanceInterval, mode: str) -> tuple[Tensor, list[float], int]:
    """Euler's method with guidance on one image: its latents, its cosines, and how many evaluations were guided."""
    pipe, arguments = tiny.sd3_pipeline(), tiny.sd3_arguments(1, STEPS, seed=3 + image)
    pipe.scheduler.set_timesteps(STEPS)
    sigmas, x = pipe.scheduler.sigmas, torch.randn(1, 4, 8, 8, generator=arguments["generator"][0])
    cosines: list[float] = []
    differences: list[tuple[Tensor, Tensor]] = []
    on = True
    for step, t in enumerate(pipe.scheduler.timesteps):

        def predict(which: str, x: Tensor = x, t: Tensor = t) -> Tensor:
            text, pooled = arguments[f"{which}prompt_embeds"], arguments[f"{which}pooled_prompt_embeds"]
            with torch.no_grad():
                return pipe.transformer(x, text, pooled, t[None], return_dict=False)[0]

        if isinstance(when, GuidanceInterval):
            on = when.start <= step / STEPS < when.stop
        v = cond = predict("")
        if on:
            uncond = predict("negative_")
            v = uncond + SCALE * (cond - uncond)
            differences.append((t, cond - uncond))
            clean = getattr(when, "space", "v") == "x0"
            pair = [x - sigmas[step] * one if clean else one for one in (cond, uncond)]
            cosines.append(float(torch.nn.functional.cosine_similarity(*(one.flatten(1) for one in pair))))
            if isinstance(when, AdaptiveGuidance) and step + 1 >= when.warmup:
                on = cosines[-1] < when.threshold
        elif mode != "drop" and differences:
            (last_time, added), (time, before) = differences[-1], differences[-2 if len(differences) > 1 else -1]
            if mode == "extrapolate" and time != last_time:
                added = added + (added - before) * (t - last_time) / (last_time - time)
            v = cond + (SCALE - 1) * added
        x = x + (sigmas[step + 1] - sigmas[step]) * v
    return x, cosines, len(cosines)


def made(recipe: Any, batch: int = 2, seed: int = 3) -> tuple[Tensor, list[int]]:
    """The pipeline's latents, and per image how many evaluations were guided."""
    pipe = tiny.sd3_pipeline()
    accelerate(pipe, recipe)
    latents = pipe(**tiny.sd3_arguments(batch, STEPS, SCALE, seed) | {"output_type": "latent"}).images
    guided = [step.guided for step in report(pipe).steps]
    return latents, [sum(image) for image in zip(*guided, strict=True)]


@pytest.mark.parametrize("mode", ["drop", "hold", "extrapolate"])
@pytest.mark.parametrize("space", ["v", "x0"])
def test_guidance_ends_for_each_image_as_in_a_loop_by_hand(mode: Any, space: Any) -> None:
    never = AdaptiveGuidance(1.0, space)
    threshold = sum(by_hand(image, never, mode)[1][2] for image in (0, 1)) / 2
    when = AdaptiveGuidance(threshold, space, warmup=3)
    expected = [by_hand(image, when, mode) for image in (0, 1)]
    latents, guided = made(GuidanceSkip(when, mode))
    assert guided == [count for _, _, count in expected]
    assert min(guided) == 3 < max(guided), "one at its first chance, the other later"
    assert_close(latents, torch.cat([x for x, _, _ in expected]))


@pytest.mark.parametrize("mode", ["drop", "hold", "extrapolate"])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.25, 0.75)])
def test_an_interval_is_a_loop_that_switches_guidance_off(mode: Any, start: float, stop: float) -> None:
    when = GuidanceInterval(start, stop)
    expected = torch.cat([by_hand(image, when, mode)[0] for image in (0, 1)])
    latents, guided = made(GuidanceSkip(when, mode))
    assert guided == [4, 4]
    assert_close(latents, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clean_samples_of_models_of_noise(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    sample, output = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    scheduler.set_timesteps(10)
    timestep = int(scheduler.timesteps[3])
    expected = scheduler.step(output, timestep, sample).pred_original_sample
    alpha = float(scheduler.alphas_cumprod[timestep])
    call: Any = SimpleNamespace(sigma=((1 - alpha) / alpha) ** 0.5, module=nn.Identity())
    found = clean_sample(scheduler.config, call, sample, output)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), expected.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2), atol=1e-5, rtol=0)


def test_clean_samples_of_flows_point_from_data_to_noise_or_back() -> None:
    data, noise, sigma = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), 0.3
    sample = (1 - sigma) * data + sigma * noise
    for family, velocity in ((FAMILIES["sd3"], noise - data), (FAMILIES["sit"], data - noise)):
        call: Any = SimpleNamespace(sigma=sigma, module=nn.Identity(), family=family)
        torch.testing.assert_close(clean_sample({}, call, sample, velocity), data)
    with pytest.raises(UnsupportedModelError, match=r"Identity makes .* use space='v'"):
        clean_sample({}, call, sample[:, :2], velocity)


# -- what it says


def test_the_report_says_who_was_guided_and_how_it_is_known() -> None:
    first, second = (by_hand(image, AdaptiveGuidance(1.0), "drop")[1][1] for image in (0, 1))
    pipe = tiny.sd3_pipeline()
    accelerate(pipe, GuidanceSkip(threshold=(first + second) / 2))
    pipe(**tiny.sd3_arguments(2, STEPS, SCALE))
    found = report(pipe)
    assert [call.what for call in found.calls[:3]] == ["computed", "computed", "partly guided"]
    ended = min(step.step for step in found.steps if step.guided != (True, True))
    assert ended == 2 and found.steps[1].calls[0].host_reads == 0 and found.steps[2].calls[0].host_reads == 1
    assert found.guided_rate == sum(map(sum, (step.guided for step in found.steps))) / (2 * STEPS)
    assert found.macs is not None and found.macs_saved is not None
    saved = found.macs_saved / (found.macs + found.macs_saved)
    assert saved == pytest.approx((1 - found.guided_rate) / 2), "half of a guided step is its unconditional rows"
    assert f"Not guided: {1 - found.guided_rate:.0%} of the images and steps, {saved:.0%} of the multiply" in str(found)
    assert "uncond+cond partly guided  " in str(found)
    assert found.unsaved is None and found.near_ties == 0 and found.hit_rate == 0


def test_cosines_within_a_percent_of_the_way_are_near_ties() -> None:
    cosine = by_hand(0, AdaptiveGuidance(1.0), "drop")[1][1]
    for part, near in ((0.995, 1), (0.9, 0)):
        pipe = tiny.sd3_pipeline()
        accelerate(pipe, GuidanceSkip(threshold=1 - (1 - cosine) * part))
        pipe(**tiny.sd3_arguments(1, STEPS, SCALE))
        assert report(pipe).steps[2].calls[0].near_ties == near


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_without_guidance_it_warns_once_and_changes_nothing(name: str) -> None:
    case = CASES[name]
    untouched = case(case.make(), guided=False)
    pipe = case.make()
    accelerate(pipe, "guidance_skip")
    with pytest.warns(UserWarning, match="guidance_skip can save nothing in this run") as caught:
        for _ in range(2):
            assert torch.equal(case(pipe, guided=False), untouched)
    assert sum("can save nothing" in str(warning.message) for warning in caught) == 1
    assert report(pipe).guided_rate is None


def test_a_derived_row_saves_what_the_written_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case, recipe = CASES["sd3"], "guidance_interval"
    pipe = case.make()
    with accelerated(pipe, recipe):
        expected, saved = case(pipe, batch=2), report(pipe).macs_saved
    monkeypatch.delitem(FAMILIES, "sd3")
    pipe = case.make()
    accelerate(pipe, recipe)
    for _ in range(2):
        assert_close(case(pipe, batch=2), expected)
    assert saved and report(pipe).macs_saved == saved


def test_a_unet_is_called_for_the_conditional_rows_alone_once_guidance_has_ended() -> None:
    pipe = tiny.unet_pipeline()
    arguments = tiny.unet_arguments(batch=2, steps=6)

    def end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1 + 1e-9 if step >= 2 else pipe._guidance_scale
        return tensors

    expected = pipe(**arguments, callback_on_step_end=end).images
    accelerate(pipe, "guidance_interval")
    assert_close(pipe(**tiny.unet_arguments(batch=2, steps=6)).images, expected)
    rows = [record.not_run.get("", 0) for record in session_of(pipe).run.records]
    assert rows == [0, 0, 0, 2, 2, 2]


def test_calls_beyond_guidance_pass() -> None:
    pipe = tiny.sd3_pipeline()
    accelerate(pipe, "guidance_interval")
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe(**tiny.sd3_arguments(2, STEPS, SCALE) | skipping)
    extra = [call for call in report(pipe).calls if call.branches == ("extra",)]
    assert len(extra) == STEPS - 1 and {call.what for call in extra} == {"computed"}
    assert all(not call.guided and not call.not_run for call in extra)


def test_a_network_of_lists_is_refused_by_name() -> None:
    call: Any = SimpleNamespace(sample=[[torch.zeros(1)]], module=nn.Identity())
    with pytest.raises(UnsupportedModelError, match="Identity is called with images in parts, and guidance skip needs"):
        require_tensor(call, "guidance skip")
