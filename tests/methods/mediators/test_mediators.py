"""Networks with mediators on whole pipelines: how many each image has at each step, what is counted, saved, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import flowaccel
import tiny
from families import CASES, split_guidance
from flowaccel import (
    FeatureCache,
    GuidanceSkip,
    Mediators,
    MediatorSchedule,
    Recipe,
    RecipeConflictError,
    Sampler,
    VelocityRefiner,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.evaluation import count_macs
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.mediators.accelerator import mean_mediators
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel, mediator_layers, set_mediators
from tiers import Process

SIT = CASES["sit"]
STEPS = 6
FIXED = MediatorSchedule(fixed=((0.0, 1), (0.3, 4), (0.6, 16)))
DISTANCE = MediatorSchedule(start=1, distance=((0.95, 4), (0.78, 16)), first=1)
CHANGE = MediatorSchedule(start=1, change=((0.3, 4), (0.5, 16)))
SETTINGS: dict[str, dict[str, Any]] = {
    "most": {},
    "count": {"count": 4},
    "fixed": {"schedule": FIXED},
    "distance": {"schedule": DISTANCE},
    "change": {"schedule": CHANGE},
}
ALL = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def sit(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """A pipeline, and a network with mediators and weights of its own, large ones: rounding grows in it."""
    pipe = SIT.make().to(dtype)
    return pipe, mediated(pipe.transformer, **settings)


def mediated(base: Any, **settings: Any) -> Any:
    network = MediatorSiTTransformer2DModel.from_base(base, {"counts": (1, 4, 16), **settings}).eval()
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    tiny.random_weights(network, 4, 0.3)
    return network


def images(pipe: Any, batch: int = 4, seed: int = 3) -> Tensor:
    return SIT(pipe, batch=batch, steps=STEPS, seed=seed)


def of_images(call: Any) -> tuple[float, ...]:
    stats = call.stats.get("mediators")
    return () if stats is None else stats.counts


def numbers(pipe: Any) -> list[tuple[int, ...]]:
    return [of_images(call) for call in report(pipe).calls]


def counts(network: Any) -> list[Any]:
    return [(layer.count, layer.groups, layer.ran) for layer in mediator_layers(network).values()]


# -- what is computed


@pytest.mark.parametrize("config", [None, {"counts": None}], ids=["stock", "control"])
def test_a_form_without_mediators(config: Any) -> None:
    pipe = SIT.make()
    expected, before, base = images(pipe), tiny.snapshot(pipe), pipe.transformer
    network = MediatorSiTTransformer2DModel(**dict(base.config), mediator_config=config)
    network.load_state_dict(base.state_dict(), strict=config is None)
    for name, parameter in network.named_parameters():
        if name not in base.state_dict():
            torch.nn.init.zeros_(parameter)
    accelerate(pipe, Mediators(network.train()))
    assert pipe.transformer is network and not network.training
    found = images(pipe)
    assert torch.equal(found, expected) if config is None else torch.allclose(found, expected, atol=1e-4)
    assert set(numbers(pipe)) == {()} and not report(pipe).stats("mediators")
    assert "mediators" not in str(report(pipe)).replace("recipe 'mediators'", "")
    restore(pipe)
    assert pipe.transformer is base
    assert tiny.snapshot(pipe)["modules"] == before["modules"]
    assert torch.equal(images(pipe), expected)
    with pytest.raises(ValueError, match="count is for networks with mediators, and this one has none; leave it out"):
        accelerate(pipe, Mediators(network, count=4))
    with pytest.raises(ValueError, match="schedule is for networks with mediators"):
        accelerate(pipe, Mediators(network, schedule=FIXED))


def test_restored() -> None:
    pipe, network = sit()
    expected, before, base = images(pipe), tiny.snapshot(pipe), pipe.transformer
    with accelerated(pipe, Mediators(network, schedule=DISTANCE)):
        assert not torch.allclose(images(pipe), expected, atol=1e-2)
    assert pipe.transformer is base
    assert tiny.snapshot(pipe)["modules"] == before["modules"]
    assert torch.equal(images(pipe), expected)


@ALL
def test_an_image_depends_on_itself_alone(settings: dict[str, Any]) -> None:
    pipe, network = sit(torch.float64)
    accelerate(pipe, Mediators(network, **settings))
    together, used = images(pipe), numbers(pipe)
    for row in (0, 3):
        torch.testing.assert_close(together[row : row + 1], images(pipe, 1, 3 + row), atol=1e-8, rtol=0)
        assert [call[row] for call in used] == [call[0] for call in numbers(pipe)]
    if "schedule" in settings:
        assert set(used[0]) == {1} and 16 in used[-1] and used == sorted(used)
    if settings.get("schedule") in (DISTANCE, CHANGE):
        assert any(len(set(call)) > 1 for call in used), "images differ"


@pytest.mark.slow
@ALL
def test_split_guidance_makes_what_batched_guidance_does(settings: dict[str, Any]) -> None:
    pipe, network = sit(torch.float64)
    recipe = Mediators(network, **settings)
    with accelerated(pipe, recipe):
        expected, batched, used = images(pipe), report(pipe), numbers(pipe)
    accelerate(pipe, recipe)
    split_guidance(pipe)
    torch.testing.assert_close(images(pipe), expected, atol=1e-8, rtol=0)
    assert numbers(pipe) == [call for call in used for _ in range(2)]
    assert (report(pipe).macs, report(pipe).macs_saved) == (batched.macs, batched.macs_saved)


def test_the_whole_batch_decides() -> None:
    pipe, network = sit()
    schedule = MediatorSchedule(start=1, distance=((0.99, 4), (0.97, 16)), first=1, decide="batch")
    accelerate(pipe, Mediators(network, schedule=schedule))
    images(pipe)
    used = numbers(pipe)
    assert used[0] == (1,) * 4 and used[-1] == (16,) * 4
    assert all(len(set(call)) == 1 for call in used)


def test_runs_begin_anew() -> None:
    pipe, network = sit()
    accelerate(pipe, Mediators(network, schedule=DISTANCE))
    first, used = images(pipe), numbers(pipe)
    assert torch.equal(images(pipe), first) and numbers(pipe) == used
    SIT(pipe, batch=2, steps=2)
    assert numbers(pipe) == [(1, 1)] * 2


def test_waits_for_the_device() -> None:
    """One at a step that decides something, none elsewhere, and none for the last step's."""
    pipe, network = sit()
    for settings, least in ((SETTINGS["fixed"], 0), (SETTINGS["distance"], 1)):
        with accelerated(pipe, Mediators(network, **settings)):
            images(pipe)
            waits = [call.host_reads for call in report(pipe).calls]
            assert least <= sum(waits) <= (STEPS - 3) * least and waits[:2] == [0, 0] and waits[-1] == 0


# -- what is counted


@pytest.mark.slow
@ALL
def test_counted_multiply_adds(settings: dict[str, Any]) -> None:
    """The report's are those that a counter of the run sees, to the last one; and all of them, were it always most."""
    pipe, network = sit()
    with accelerated(pipe, Mediators(network, count=settings.get("count"))):
        whole = count_macs(lambda: images(pipe))
    accelerate(pipe, Mediators(network, **settings))
    counted = count_macs(lambda: images(pipe))
    found = report(pipe)
    assert found.macs == counted
    assert found.macs + found.macs_saved == whole
    assert (found.macs_saved > 0) == ("schedule" in settings)
    text, share = str(found), f"{found.macs_saved / whole:.0%} fewer multiply-adds"
    assert f"{mean_mediators(found.stats('mediators')):.1f} mediators on average" in text
    assert (share in text) == ("schedule" in settings)
    for call, line in zip(found.calls, text.splitlines()[2:], strict=False):
        alike = len(set(of_images(call))) == 1
        listed = str(of_images(call)[0]) if alike else " ".join(map(str, of_images(call)))
        assert line.endswith(f"computed, {listed} mediators")


def test_many_images_in_the_report() -> None:
    pipe, network = sit()
    accelerate(pipe, Mediators(network, schedule=DISTANCE))
    images(pipe, 17)
    assert "1 to 16 mediators" in str(report(pipe))


OWN = {"counts": (4, 1, 16), "per_layer": True}


@pytest.mark.parametrize("use_bias", [True, False], ids=["biases", "none"])
def test_a_number_for_each_layer(use_bias: bool) -> None:
    pipe, network = sit(torch.float64, **OWN, use_bias=use_bias)
    expected = images(pipe)
    accelerate(pipe, Mediators(network))
    counted = count_macs(lambda: images(pipe))
    found = report(pipe)
    assert (found.macs, found.macs_saved) == (counted, 0)
    assert set(numbers(pipe)) == {(7.0,) * 4} and mean_mediators(found.stats("mediators")) == 7
    assert "7 mediators\n" in str(found) and "7.0 mediators on average" in str(found)
    rows, width = sum(call.rows for call in found.calls), 16
    spared = sum(rows * 16 * width * (2 * 16 - 4 * layer.count - 9) for layer in mediator_layers(network).values())
    together = images(pipe)
    torch.testing.assert_close(together[3:], images(pipe, 1, 6), atol=1e-8, rtol=0)
    restore(pipe)
    assert torch.equal(images(pipe), expected)
    assert count_macs(lambda: images(pipe)) - counted == spared, "16 tokens: N D (2N - 4n - 9) by each layer's own n"


def test_a_number_for_each_layer_takes_no_other(tmp_path: Path) -> None:
    pipe, network = sit(**OWN)
    own = r"this network's layers have numbers of their own, \[4, 1, 16\], which they use when none is given"
    for options, said in (({"count": 4}, "count asks for 4"), ({"schedule": FIXED}, "schedule asks for 1")):
        with pytest.raises(ValueError, match=f"{said} mediators: there are biases for .*; {own}"):
            accelerate(pipe, Mediators(network, **options))
    assert not flowaccel.is_accelerated(pipe)
    with accelerated(pipe, Mediators(network)):
        expected = images(pipe)
    Recipe([Mediators(network)]).for_pipeline(pipe).save_pretrained(tmp_path)
    with accelerated(pipe, Recipe.from_pretrained(tmp_path)):
        assert torch.equal(images(pipe), expected)
    free = sit(**OWN, use_bias=False)[1]
    before = counts(free)
    with accelerated(pipe, Mediators(free, schedule=DISTANCE)):  # no biases, so any square that fits
        images(pipe)
        assert {number for call in numbers(pipe) for number in call} == {1, 4, 16}
    assert counts(free) == before == [(number, None, None) for number in (4, 1, 16)]


# -- what it goes together with

CACHES: dict[str, Any] = {
    scope: FeatureCache(gate=gate, scope=scope, threshold=threshold)
    for scope, gate, threshold in (
        ("output", "easy", 0.2),
        ("stack", "first_block", 0.15),
        ("module", "easy", 0.2),
    )
}


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_caches_that_decide_per_image(cache: Any) -> None:
    """Rows that a cache leaves out do not shift the others' numbers, and nothing is counted twice."""
    pipe, network = sit(torch.float64)
    accelerate(pipe, [Mediators(network, schedule=DISTANCE), cache])
    counted = count_macs(lambda: images(pipe))
    assert report(pipe).macs == pytest.approx(counted, rel=1e-4)
    together = images(pipe)
    found = report(pipe).calls
    assert any(len(set(call.computed)) == 2 and len(set(of_images(call))) > 1 for call in found)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], images(pipe, 1, 3 + row), atol=1e-8, rtol=0)


@pytest.mark.parametrize("scope", ["output", "stack"])
def test_steps_that_a_cache_leaves_out_are_seen(scope: Any) -> None:
    """The rule looks at the scheduler's steps, not at the network's calls: here the average is of a step that was left
    out, and so is the step that is compared with it."""
    pipe, network = sit()
    schedule = MediatorSchedule(start=1, distance=((1.5, 4),), first=1)
    accelerate(pipe, [Mediators(network, schedule=schedule), FeatureCache(gate="interval", interval=3, scope=scope)])
    images(pipe)
    used = numbers(pipe)
    assert [bool(call) for call in used] == [True, False, False, True, False, True]
    assert used[0] == (1,) * 4 and used[3] == (4,) * 4


def test_guidance_that_ends_image_by_image() -> None:
    pipe, network = sit(torch.float64)
    accelerate(pipe, [Mediators(network, schedule=DISTANCE), GuidanceSkip("interval", start=0.0, stop=0.5)])
    counted = count_macs(lambda: images(pipe))
    assert report(pipe).macs == counted
    assert any(len(set(of_images(call))) > 1 for call in report(pipe).calls[STEPS // 2 :])
    torch.testing.assert_close(images(pipe)[3:], images(pipe, 1, 6), atol=1e-8, rtol=0)


def test_together_with_a_refiner() -> None:
    pipe, network = sit()
    refiner = tiny.random_refiner(pipe.transformer)
    sampler = Sampler("flowturbo", {"blocks": "H1P1R1"})
    stock = MediatorSiTTransformer2DModel(**dict(pipe.transformer.config))
    stock.load_state_dict(pipe.transformer.state_dict())

    def made(*parts: Any) -> tuple[Tensor, list[bool]]:
        with accelerated(pipe, list(parts)):
            found = SIT(pipe, batch=2, steps=3)
            assert [call.what for call in report(pipe).calls] == ["computed"] * 3 + ["refined"] * 2
            return found, [("mediators" in call.stats) for call in report(pipe).calls]

    expected, _ = made(sampler, VelocityRefiner(refiner))
    assert torch.equal(made(sampler, Mediators(stock), VelocityRefiner(refiner))[0], expected)
    found, used = made(sampler, Mediators(network, schedule=FIXED), VelocityRefiner(refiner))
    assert not torch.equal(found, expected) and used == [True] * 3 + [False] * 2


def test_a_lora_on_the_projections() -> None:
    pipe, network = sit(torch.float64)
    accelerate(pipe, Mediators(network, schedule=DISTANCE))
    without = images(pipe)
    config = LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "style")
    counted = count_macs(lambda: images(pipe))
    together = images(pipe)
    assert report(pipe).macs == counted
    assert not torch.allclose(together, without, atol=1e-3)
    torch.testing.assert_close(together[:1], images(pipe, 1), atol=1e-8, rtol=0)
    pipe.transformer.delete_adapters("style")
    assert torch.equal(images(pipe), without)


def test_the_rules() -> None:
    pipe, network = sit()
    cache = FeatureCache(gate="interval", interval=2)
    Recipe([Sampler("ab2"), Mediators(network), cache])
    with pytest.raises(RecipeConflictError, match=r"'mediators' \(variant\) must come before 'feature_cache'"):
        Recipe([cache, Mediators(network)])
    with pytest.raises(RecipeConflictError, match="'dynamic_width' and 'mediators': a pipeline has one network"):
        Recipe([flowaccel.DynamicWidth(make_dynamic(pipe.transformer)), Mediators(network)])


# -- settings


def test_numbers_come_back() -> None:
    pipe, network = sit()
    set_mediators(network, 4)
    before = counts(network)
    with accelerated(pipe, Mediators(network)):
        assert counts(network) == [(16, None, None)] * 3, "what None means does not depend on it"
        images(pipe, 1)
        assert set(numbers(pipe)) == {(16,)}
    assert counts(network) == before == [(4, None, None)] * 3
    with accelerated(pipe, Mediators(network, schedule=DISTANCE)):
        images(pipe)
        assert counts(network) == [(16, None, None)] * 3
    assert counts(network) == before
    with pytest.raises(ValueError, match="asks for"):
        accelerate(pipe, Mediators(network, count=9))
    assert counts(network) == before and pipe.transformer is not network


def test_an_exception_within_a_call() -> None:
    pipe, network = sit()
    accelerate(pipe, Mediators(network, schedule=FIXED))
    layer = mediator_layers(network)["transformer_blocks.1.attn"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = layer.to_q.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        images(pipe)
    handle.remove()
    assert counts(network) == [(16, None, None)] * 3
    images(pipe)
    assert numbers(pipe)[0] == (1,) * 4


def test_bfloat16() -> None:
    pipe, network = sit()
    pipe.to(torch.bfloat16)
    accelerate(pipe, Mediators(network, schedule=DISTANCE))
    assert torch.isfinite(images(pipe)).all()
    assert {value.dtype for value in network.parameters()} == {torch.bfloat16}
    assert any(len(set(call)) > 1 for call in numbers(pipe))


def test_a_backend_that_cannot_add_the_biases() -> None:
    pipe, network = sit()
    _, free = sit(use_bias=False)
    refused = "'_native_flash' cannot add the position biases; take one of .*, or a network with use_bias=False"
    with accelerated(pipe, Mediators(network)):
        expected = images(pipe)
        with pytest.raises(ValueError, match=refused):
            network.set_attention_backend("_native_flash")
        assert torch.equal(images(pipe), expected), "nothing was set"
    layer = mediator_layers(network)["transformer_blocks.1.attn"]
    layer.processor._attention_backend = "_native_flash"
    with pytest.raises(ValueError, match=refused):
        accelerate(pipe, Mediators(network))
    assert pipe.transformer is not network
    with accelerated(pipe, Mediators(free, count=9)):  # no biases, so any square that fits
        free.set_attention_backend("_native_flash")
        free.set_attention_backend("native")
        images(pipe, 1)
        assert set(numbers(pipe)) == {(9,)}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"count": 5}, ValueError, "count: the number of mediators must be a square, such as 4, 16 or 64, got 5"),
        ({"count": True}, ValueError, "must be a square.* got True"),
        ({"count": 4, "schedule": FIXED}, ValueError, "schedule or count, not both"),
        ({"schedule": "fixed"}, TypeError, "schedule must be a MediatorSchedule or None, got 'fixed'"),
        ({"network": 3}, TypeError, "a module, a folder or None, got int"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Mediators(**settings)


def test_bad_networks(tmp_path: Path) -> None:
    pipe, network = sit()
    with pytest.raises(TypeError, match=r"must be a network with mediators, got a SiT.*from_base"):
        Mediators(pipe.transformer)
    with pytest.raises(WeightsNotFoundError, match=r"no network with mediators at .*mediators; .*network=FOLDER"):
        accelerate(pipe, Mediators())
    pipe.transformer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="must be a network with mediators, got a SiT"):
        accelerate(pipe, Mediators(tmp_path))
    with pytest.raises(ValueError, match="num_layers is 1, must be 3"):
        accelerate(pipe, Mediators(mediated(tiny.sit_network(num_layers=1))))
    schedule = MediatorSchedule(fixed=((0.0, 4), (0.5, 9)))
    for options, message in (
        ({"count": 9}, r"count asks for 9 mediators: there are biases for \[1, 4, 16\] mediators, got 9"),
        ({"schedule": schedule}, r"schedule asks for 9 mediators: there are biases for \[1, 4, 16\]"),
        ({"count": 64}, "count asks for 64 mediators: 64 mediators need a grid of at least 8 x 8 tokens, got 4 x 4"),
    ):
        with pytest.raises(ValueError, match=message):
            accelerate(pipe, Mediators(network, **options))
    assert not flowaccel.is_accelerated(pipe)


# -- what is saved

AGAIN = """
import sys
sys.path.insert(0, {tests!r})
from families import CASES
from flowaccel.pipelines import AcceleratedPipeline
from safetensors.torch import save_file

pipe = AcceleratedPipeline.from_pretrained({folder!r}, vae=None)
pipe.set_progress_bar_config(disable=True)
save_file({{"images": CASES["sit"](pipe, batch=4, steps=6).contiguous()}}, {folder!r} + "/made.safetensors")
"""


def test_the_same_image_in_a_fresh_process(tmp_path: Path, process: Process) -> None:
    pipe, network = sit()
    accelerate(pipe, Mediators(network, schedule=DISTANCE))
    expected = images(pipe)
    pipe.save_pretrained(tmp_path)
    assert '"SiTTransformer2DModel"' in (tmp_path / "transformer" / "config.json").read_text()
    script = AGAIN.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process("-c", script)
    assert Recipe.from_pretrained(tmp_path).accelerators[0].schedule == DISTANCE
    assert torch.equal(load_file(tmp_path / "made.safetensors")["images"], expected)


def test_recipes_and_names(tmp_path: Path) -> None:
    pipe, network = sit()
    part = Mediators(network, MediatorSchedule(fixed=((0.0, 4), (0.5, 16))))
    Recipe([part]).for_pipeline(pipe).save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again.accelerators[0].to_dict() == part.to_dict()
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with accelerated(pipe, part):
        expected = images(pipe, 1)
    with accelerated(pipe, "mediators:fixed=[[0.0,4],[0.5,16]]"):
        assert pipe.transformer is not network
        assert torch.equal(images(pipe, 1), expected)
    with accelerated(pipe, "mediators:count=4+fbcache"):
        images(pipe, 1)
        assert numbers(pipe)[0] == (4,)
    with accelerated(pipe, "mediators:start=1,distance=[[0.99,4],[0.97,16]],first=1,decide=image"):
        images(pipe, 1)
        assert numbers(pipe)[-1] == (16,)
    with pytest.raises(ValueError, match=r"preset 'mediators': .* unexpected keyword argument 'tokens'"):
        accelerate(pipe, "mediators:tokens=4")
    with pytest.raises(RecipeConflictError, match="made for a SiTTransformer2DModel"):
        accelerate(tiny.sit_pipeline(num_layers=2), again)
