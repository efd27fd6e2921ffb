"""Dynamic width on whole pipelines: plans, slices, what is saved, and what it goes together with."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

import flowaccel
import tiny
from families import CASES, Case
from flowaccel import (
    DynamicWidth,
    FeatureCache,
    GuidanceSkip,
    Recipe,
    RecipeConflictError,
    Sampler,
    UnsupportedModelError,
    VelocityRefiner,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.hooks import Identity
from flowaccel.methods.dynamic_width.adapter import WidthAdapter
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.plan import WidthPlan

STEPS = 4
FAMILIES = pytest.mark.parametrize(
    "case", [CASES[name] for name in ("sit", "dit", "sd3", "flux")], ids=lambda case: case.name
)


def random_routers(network: Any, seed: int = 0) -> Any:
    """About half of all units on, others at other times; about two thirds of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    for gated in network.dynamic.gated_layers:
        router = gated.gate.router
        router.weight.data = torch.randn(router.weight.shape, generator=generator)
        router.bias.data = 0.3 * torch.randn(router.bias.shape, generator=generator)
    for site in network.dynamic.sites:
        last = site.router[2]
        last.weight.data = torch.randn(last.weight.shape, generator=generator)
        last.bias.data.fill_(0.3)
    return network


def narrow(pipe: Any, seed: int = 0, **settings: Any) -> Any:
    return random_routers(make_dynamic(pipe.transformer, {"normalise": True, **settings}), seed)


def images(pipe: Any, labels: list[int], steps: int = STEPS, seed: int = 3) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    return pipe(labels, num_inference_steps=steps, generator=generators, output_type="pt").images


@FAMILIES
def test_everything_on_changes_nothing(case: Case) -> None:
    pipe = case.make()
    expected, before, base = case(pipe, batch=2), tiny.snapshot(pipe), pipe.transformer
    accelerate(pipe, DynamicWidth(make_dynamic(base)))
    assert pipe.transformer is not base
    assert torch.equal(case(pipe, batch=2), expected)
    restore(pipe)
    assert pipe.transformer is base
    assert tiny.snapshot(pipe)["modules"] == before["modules"]
    assert torch.equal(case(pipe, batch=2), expected)


@FAMILIES
def test_an_image_depends_on_itself_alone(case: Case) -> None:
    pipe = case.make()
    accelerate(pipe, DynamicWidth(narrow(pipe)))
    together = case(pipe, batch=3)
    assert sum(call.stats["dynamic_width"].width < 1 for call in report(pipe).calls) == len(report(pipe).calls)
    alone = case(pipe, batch=1)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=0)


def test_the_plan_is_what_is_computed() -> None:
    pipe = tiny.sit_pipeline()
    accelerate(pipe, DynamicWidth(narrow(pipe, tokens=False)))
    first = images(pipe, [1, 2])
    plan = pipe.transformer.dynamic.plan
    assert [call.stats["dynamic_width"].width for call in report(pipe).calls] == pytest.approx(
        plan.shares.mean(1).tolist()
    )
    assert torch.equal(images(pipe, [1, 2]), first)
    assert pipe.transformer.dynamic.plan is plan, "a run like the one before makes no new plan"
    images(pipe, [1], steps=3)
    assert len(pipe.transformer.dynamic.plan.timesteps) != len(plan.timesteps)


def test_counted_multiply_adds() -> None:
    """What the report says was left out is what a counter of the sliced run does not see."""
    pipe = tiny.sit_pipeline()
    whole = flowaccel.evaluation.count_macs(lambda: images(pipe, [1, 2]))
    accelerate(pipe, DynamicWidth(narrow(pipe, tokens=False)))
    images(pipe, [1, 2])  # makes the plan, which is work too, once
    counted = flowaccel.evaluation.count_macs(lambda: images(pipe, [1, 2]))
    found = report(pipe)
    assert counted < 0.8 * whole
    assert found.macs == pytest.approx(counted, rel=0.005)
    assert found.macs_saved == pytest.approx(whole - counted, rel=0.005)
    assert "of the multiply-adds" in str(found)


@pytest.mark.parametrize("scope", ["stack", "module"])
def test_nothing_is_left_out_twice(scope: str) -> None:
    """What a cache did not run at all was not narrow besides."""
    pipe = tiny.sit_pipeline()
    whole = flowaccel.evaluation.count_macs(lambda: images(pipe, [1, 2]))
    cache = FeatureCache(gate="interval", interval=2, scope=scope)
    accelerate(pipe, [DynamicWidth(narrow(pipe, tokens=False)), cache])
    images(pipe, [1, 2])
    counted = flowaccel.evaluation.count_macs(lambda: images(pipe, [1, 2]))
    found = report(pipe)
    assert found.macs == pytest.approx(counted, rel=0.005)
    assert found.macs_saved == pytest.approx(whole - counted, rel=0.005)


def test_slices_are_bounded() -> None:
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    whole = network.dynamic.weight_bytes
    made, held = {}, {}
    for memory in (0.0, 0.25, 10.0):
        with accelerated(pipe, DynamicWidth(network, slice_memory=memory)):
            made[memory] = images(pipe, [1])
            held[memory] = max(found.slice_bytes for found in report(pipe).stats("dynamic_width"))
            images(pipe, [1])
            assert (sum(found.slices_cut for found in report(pipe).stats("dynamic_width")) == 0) == (memory == 10.0)
            assert "Slices of layers" in str(report(pipe))
        assert network.dynamic.cache.held == held[memory], "kept with the network, for the next time"
    assert held[0.0] == 0
    assert 0 < held[0.25] <= 0.25 * whole < held[10.0]
    assert torch.equal(made[0.0], made[0.25]) and torch.equal(made[0.0], made[10.0])


def test_saved_with_the_pipeline_and_read_again(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    stock = type(pipe.transformer).__name__
    accelerate(pipe, DynamicWidth(narrow(pipe)))
    expected, fingerprint = images(pipe, [1, 2]), pipe.transformer.dynamic.fingerprint
    pipe.save_pretrained(tmp_path)
    assert f'"{stock}"' in (tmp_path / "transformer" / "config.json").read_text()
    again = flowaccel.pipelines.AcceleratedPipeline.from_pretrained(tmp_path, recipe=[])
    make_dynamic(again.transformer).save_pretrained(tmp_path / "made")
    assert str(tmp_path) not in (tmp_path / "made" / "config.json").read_text(), (
        "where it was made is nobody's business"
    )
    again = flowaccel.pipelines.AcceleratedPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.transformer.dynamic.fingerprint == fingerprint
    assert torch.equal(images(again, [1, 2]), expected)
    restore(again)
    with accelerated(again, "dynamic_width"):
        assert torch.equal(images(again, [1, 2]), expected)


def test_a_plan_in_the_recipe(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    with accelerated(pipe, DynamicWidth(network)):
        expected = images(pipe, [1])
        plan = network.dynamic.plan
    Recipe([DynamicWidth(network, plan=plan)]).for_pipeline(pipe).save_pretrained(tmp_path)
    recipe = Recipe.from_pretrained(tmp_path)
    assert recipe.accelerators[0].plan == plan
    with accelerated(pipe, recipe):
        assert torch.equal(images(pipe, [1]), expected)
        with pytest.raises(
            ValueError, match=r"made for another run: it makes \d+ evaluations, not \d+.*flowaccel plan"
        ):
            images(pipe, [1], steps=STEPS + 1)
    with (
        accelerated(pipe, [Sampler("ab2"), *recipe.accelerators]),
        pytest.raises(ValueError, match="the scheduler is FlowAdamsBashforthScheduler"),
    ):
        images(pipe, [1])
    other = narrow(pipe, seed=1)
    with pytest.raises(ValueError, match=f"made for routers {plan.routers}, and these are"):
        accelerate(pipe, DynamicWidth(other, plan=plan))
    assert not flowaccel.is_accelerated(pipe)


def test_buckets() -> None:
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    with accelerated(pipe, DynamicWidth(network)):
        images(pipe, [1])
        each = network.dynamic.plan
    with accelerated(pipe, DynamicWidth(network, buckets=2)):
        images(pipe, [1])
        found = network.dynamic.plan
    assert each.buckets > 2 >= found.buckets
    assert bool((found.shares >= each.shares).all()), "unions leave nothing out that was on"


COMPANIONS = {
    "multistep": [Sampler("ab2")],
    "cache": [FeatureCache(gate="interval", interval=2)],
    "module cache": [FeatureCache(gate="interval", interval=2, scope="module")],
    "guidance": [GuidanceSkip("interval")],
}


@pytest.mark.parametrize("others", COMPANIONS.values(), ids=COMPANIONS)
def test_together_with(others: list[Any]) -> None:
    """With everything on, the others do what they do without; narrow, an image still depends on itself alone."""
    pipe = tiny.sit_pipeline()

    def recipe(network: Any) -> list[Any]:
        kinds = [other for other in others if other.kind == "scheduler"]
        return [*kinds, DynamicWidth(network), *(other for other in others if other.kind == "hook")]

    with accelerated(pipe, others):
        expected = images(pipe, [1, 2])
    with accelerated(pipe, recipe(make_dynamic(pipe.transformer))):
        assert torch.equal(images(pipe, [1, 2]), expected)
    with accelerated(pipe, recipe(narrow(pipe))):
        together = images(pipe, [1, 2])
        assert min(found.width for found in report(pipe).stats("dynamic_width")) < 1
        torch.testing.assert_close(images(pipe, [1]), together[:1], atol=1e-4, rtol=0)


def test_together_with_a_refiner() -> None:
    """The plan holds a width for every evaluation; those that the refiner makes do not use it."""
    pipe = tiny.sit_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    parts = [Sampler("flowturbo", {"blocks": "H1P1R1"})]
    with accelerated(pipe, [*parts, VelocityRefiner(refiner)]):
        expected = images(pipe, [1], steps=3)
    with accelerated(pipe, [*parts, DynamicWidth(make_dynamic(pipe.transformer)), VelocityRefiner(refiner)]):
        assert torch.equal(images(pipe, [1], steps=3), expected)
        assert {call.what for call in report(pipe).calls} == {"computed", "refined"}
    with pytest.raises(RecipeConflictError, match="variant"):
        Recipe([*parts, VelocityRefiner(refiner), DynamicWidth(make_dynamic(pipe.transformer))])


def test_sequential_offloading_afterwards() -> None:
    """With weights that are there only while their layer runs, parts are cut then."""
    pipe = tiny.sit_pipeline()
    accelerate(pipe, DynamicWidth(narrow(pipe)))
    expected = images(pipe, [1])
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    torch.testing.assert_close(images(pipe, [1]), expected)
    restore(pipe)


def test_offloaded_before_is_refused() -> None:
    pipe = tiny.sit_pipeline()
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(RecipeConflictError, match="accelerate first, then switch offloading on"):
        narrow(pipe)


def test_bad_input(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    for wrong in ({"buckets": 0}, {"buckets": 1.5}, {"slice_memory": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DynamicWidth(**wrong)
    with pytest.raises(TypeError, match="make_dynamic"):
        DynamicWidth(pipe.transformer)
    with pytest.raises(TypeError, match="plan"):
        DynamicWidth(plan="plan")
    with pytest.raises(WeightsNotFoundError, match="flowaccel train width"):
        accelerate(pipe, DynamicWidth())
    with pytest.raises(WeightsNotFoundError, match="no dynamic network in"):
        accelerate(pipe, DynamicWidth(tmp_path))
    other = tiny.sit_network(num_layers=1)
    with pytest.raises(ValueError, match="num_layers is 1, must be"):
        accelerate(pipe, DynamicWidth(make_dynamic(other)))
    sd3 = tiny.sd3_pipeline()
    with pytest.raises(ValueError, match="is a form of SD3Transformer2DModel, and the pipeline has a SiT"):
        accelerate(pipe, DynamicWidth(make_dynamic(sd3.transformer)))
    with pytest.raises(UnsupportedModelError, match=r"PixArt.*has no rules.*SiTTransformer2DModel"):
        make_dynamic(CASES["pixart"].make().transformer)
    with pytest.raises(ValueError, match=r"dynamic_config: unknown \['gruops'\]; allowed"):
        make_dynamic(pipe.transformer, {"gruops": 2})
    with pytest.raises(ValueError, match="groups"):
        make_dynamic(pipe.transformer, {"groups": 0})
    with pytest.raises(UnsupportedModelError, match="cannot be divided into 3 equal groups"):
        make_dynamic(pipe.transformer, {"groups": 3})


def test_fused_projections() -> None:
    pipe = tiny.sit_pipeline()
    network = make_dynamic(pipe.transformer)
    with pytest.raises(UnsupportedModelError, match="cannot be fused"):
        network.fuse_qkv_projections()
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        make_dynamic(pipe.transformer)


def plan(*widths: str) -> WidthPlan:
    gates = tuple(f"gate{i}" for i in range(len(widths[0].split(" "))))
    times = tuple(float(i) for i in range(len(widths)))
    return WidthPlan(
        scheduler="S", scheduler_config="c", routers="r", timesteps=times, gates=gates, widths=tuple(widths)
    )


def test_buckets_are_the_cheapest_neighbourhoods() -> None:
    """Against all ways to cut the run."""
    found = plan("1000 1000", "1100 1000", "1110 1000", "1111 1111", "1111 1110")
    costs = [1.0, 3.0]

    def price(cuts: tuple[int, ...]) -> float:
        total, edges = 0.0, (0, *cuts, 5)
        for first, last in itertools.pairwise(edges):
            rows = [[[unit == "1" for unit in gate] for gate in row] for row in found.bits[first:last]]
            shares = torch.tensor(rows)
            on = shares.any(0).float().mean(1)
            total += (last - first) * float((on * torch.tensor(costs)).sum())
        return total

    best = min(price((cut,)) for cut in range(1, 5))
    two = found.bucketed(2, costs)
    assert two.buckets == 2
    assert float(two.ratios(costs).sum() * sum(costs)) == pytest.approx(best)
    assert found.bucketed(9, costs) == found
    assert found.bucketed(1, costs).widths == ("1111 1111",) * 5


def test_plans_that_are_none() -> None:
    with pytest.raises(ValueError, match="none without a one"):
        plan("1000 0000")
    with pytest.raises(ValueError, match="2 groups"):
        plan("1000 1000", "1000")
    with pytest.raises(ValueError, match="do not fit"):
        WidthPlan(scheduler="S", scheduler_config="c", routers="r", timesteps=(1.0,), gates=("g",), widths=())
    with pytest.raises(ValueError, match="at least 1"):
        plan("1").bucketed(0, [1.0])


def test_a_copy_is_on_its_own() -> None:
    """Hooks of a copied network lead to the copy."""
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    other = copy.deepcopy(network)
    for gated in other.dynamic.gated_layers:
        torch.nn.init.constant_(gated.gate.router.bias, 1e4)
    for site in other.dynamic.sites:
        torch.nn.init.constant_(site.router[2].bias, 1e4)
    expected = images(pipe, [1])
    with accelerated(pipe, DynamicWidth(other)):
        assert torch.equal(images(pipe, [1]), expected)
    with accelerated(pipe, DynamicWidth(network)):
        assert not torch.equal(images(pipe, [1]), expected)


def test_an_adapter_is_enough(tmp_path: Path) -> None:
    """Routers beside the pipeline's own weights: a small file, the same images, refused by other weights."""
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    with accelerated(pipe, DynamicWidth(network)):
        expected = images(pipe, [1, 2])
    adapter = WidthAdapter.of(network, Identity.of(pipe.transformer).config)
    with accelerated(pipe, DynamicWidth(adapter)):
        first = pipe.transformer
        assert torch.equal(images(pipe, [1, 2]), expected)
        pipe.save_pretrained(tmp_path)
    with accelerated(pipe, DynamicWidth(adapter)):
        assert pipe.transformer is first, "made once"
    again = flowaccel.pipelines.AcceleratedPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again, [1, 2]), expected)
    with pytest.raises(ValueError, match="other weights"):
        accelerate(tiny.sit_pipeline(seed=5), DynamicWidth(adapter))


def test_how_tokens_are_left_out() -> None:
    """Gathering, clearing and a capacity that is large enough give the same images."""
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    paths = [site.path for site in network.dynamic.sites]
    with accelerated(pipe, DynamicWidth(network)):
        expected = images(pipe, [1, 2])
    for options in ({"gather": dict.fromkeys(paths, False)}, {"capacities": dict.fromkeys(paths, 1.0)}):
        with accelerated(pipe, DynamicWidth(network, **options)):
            torch.testing.assert_close(images(pipe, [1, 2]), expected, atol=1e-5, rtol=0)
    with accelerated(pipe, DynamicWidth(network, capacities={paths[0]: 0.25})):
        assert not torch.equal(images(pipe, [1, 2]), expected)
        assert network.dynamic.sites[0].module.capacity == 4
    for wrong in ({"capacities": {"here": 0.5}}, {"gather": {"here": True}}):
        with pytest.raises(ValueError, match="names layers that leave out no tokens"):
            accelerate(pipe, DynamicWidth(network, **wrong))
    with pytest.raises(ValueError, match=r"capacities must lie in \(0, 1\]"):
        DynamicWidth(network, capacities={paths[0]: 0})
    with pytest.raises(ValueError, match="gather must be true or false"):
        DynamicWidth(network, gather={paths[0]: 1})


@pytest.mark.slow
def test_evaluated(tmp_path: Path) -> None:
    """Rows of the exchanged network are counted, and samples belong to the weights that made them."""
    pipe = tiny.sit_pipeline()
    network = narrow(pipe)
    protocol = flowaccel.evaluation.Protocol(
        conditions=flowaccel.evaluation.Classes((1, 2)), steps=3, num_samples=4, metrics=("rel_l2",), rounds=2
    )
    adapter = WidthAdapter.of(network, Identity.of(pipe.transformer).config)
    recipes = [Recipe([DynamicWidth(part)], name=name) for name, part in (("whole", network), ("adapter", adapter))]
    results = flowaccel.evaluation.evaluate(pipe, recipes, protocol, tmp_path)
    untouched, whole, small = results["rows"]
    assert untouched["network_rows"] == whole["network_rows"] == small["network_rows"] > 0
    assert whole["macs_per_image"] == small["macs_per_image"] < 0.8 * untouched["macs_per_image"]
    assert whole["metrics"]["rel_l2"]["value"] == small["metrics"]["rel_l2"]["value"] > 0
