"""Networks with experts on whole pipelines: what they compute, what is counted, what is saved and what they go with."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

import flowaccel
import tiny
from families import BATCHED, CASES, Case, made, split_guidance
from flowaccel import (
    FeatureCache,
    GuidanceSkip,
    MixtureOfExperts,
    Recipe,
    RecipeConflictError,
    Report,
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
from flowaccel.methods.moe.control import moe_layers, set_moe_budget, set_moe_capacity, unpack_experts
from flowaccel.methods.moe.networks import upcycle_to_moe
from flowaccel.methods.moe.routing import ROUTING
from flowaccel.methods.moe.stats import mean_capacity, total_overflow
from moe_parts import SMALL, fitted, with_experts
from tiers import Process

NAMES = ("sit", "dit", "sd3", "flux")
FAMILIES = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=NAMES)
ROUTERS = pytest.mark.parametrize("router", ROUTING)
SIT = CASES["sit"]


def capacity_of(found: Report) -> float | None:
    return mean_capacity(found.stats("mixture_of_experts"))


def overflow_of(found: Report) -> int | None:
    return total_overflow(found.stats("mixture_of_experts"))


def sit(**settings: Any) -> tuple[Any, Any]:
    """A pipeline and a network with experts for it."""
    pipe = SIT.make()
    return pipe, fitted(pipe, pair, **settings)


def pair(pipe: Any) -> Tensor:
    return SIT(pipe, batch=2)


def states(network: Any) -> list[Any]:
    """What an accelerator sets of the layers."""
    return [
        (layer.experts.backend, layer.selection, layer.budget, layer.thresholds.capacity)
        for layer in moe_layers(network).values()
    ]


# -- what is computed


@FAMILIES
def test_experts_that_add_nothing_change_nothing(case: Case) -> None:
    pipe = case.make()
    expected, before, base = case(pipe, batch=2), tiny.snapshot(pipe), pipe.transformer
    network = upcycle_to_moe(base, {**SMALL, "router": "token_choice"}, method="shared")
    accelerate(pipe, MixtureOfExperts(network.train()))
    assert pipe.transformer is network
    assert not any(module.training for module in network.modules())
    assert torch.equal(case(pipe, batch=2), expected)
    restore(pipe)
    assert pipe.transformer is base
    assert tiny.snapshot(pipe)["modules"] == before["modules"]
    assert torch.equal(case(pipe, batch=2), expected)


@FAMILIES
@pytest.mark.parametrize("settings", [{}, {"capacity": 0.5}, {"budget": 1.5}, {"selection": "gate_threshold"}], ids=str)
@pytest.mark.filterwarnings("ignore:budget=1.5 was too small")
def test_an_image_depends_on_itself_alone(case: Case, settings: dict[str, Any]) -> None:
    pipe = case.make()
    network = fitted(pipe, lambda pipe: case(pipe, batch=2))
    untouched = case(pipe, batch=3)
    accelerate(pipe, MixtureOfExperts(network, **settings))
    together = case(pipe, batch=3)
    assert not torch.allclose(together, untouched, atol=1e-2)
    assert (len({found.capacity for found in report(pipe).stats("mixture_of_experts")}) == 1) == ("budget" in settings)
    torch.testing.assert_close(together[:1], case(pipe, batch=1), atol=1e-4, rtol=0)


@ROUTERS
def test_so_it_does_with_every_router(router: str) -> None:
    pipe, network = sit(router=router)
    accelerate(pipe, MixtureOfExperts(network))
    torch.testing.assert_close(SIT(pipe, batch=3)[:1], SIT(pipe, batch=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", [case for case in BATCHED if case.name in NAMES], ids=lambda case: case.name)
def test_split_guidance_makes_what_batched_guidance_does(case: Case) -> None:
    pipe = case.make()
    recipe = MixtureOfExperts(fitted(pipe, lambda pipe: case(pipe, batch=2)))
    with accelerated(pipe, recipe):
        expected, batched = case(pipe, batch=2), report(pipe)
    accelerate(pipe, recipe)
    split_guidance(pipe)
    torch.testing.assert_close(case(pipe, batch=2), expected, atol=1e-4, rtol=0)
    found = report(pipe)
    assert [call.branches for call in found.steps[0].calls] == [("cond",), ("uncond",)]
    assert capacity_of(found) == pytest.approx(capacity_of(batched), rel=0.01)
    assert found.macs == pytest.approx(batched.macs, rel=0.01)


@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
def test_backends_make_the_same(backend: str) -> None:
    pipe, network = sit(router="expert_choice")
    with accelerated(pipe, MixtureOfExperts(network)):
        expected = pair(pipe)
    with accelerated(pipe, MixtureOfExperts(network, backend=backend)):
        torch.testing.assert_close(pair(pipe), expected, atol=1e-5, rtol=0)


# -- what is counted


def test_capacity() -> None:
    pipe, network = sit()
    found = {}
    for capacity in (0.3, None, 2.5):
        with accelerated(pipe, MixtureOfExperts(network, capacity=capacity)):
            pair(pipe)
            found[capacity] = report(pipe)
            assert capacity_of(found[capacity]) == pytest.approx(capacity or 1.0, rel=0.1)
    less, more = found[0.3], found[2.5]
    assert less.macs < found[None].macs < more.macs
    assert less.macs_saved > 0 > more.macs_saved
    share = less.macs_saved / (less.macs + less.macs_saved)
    assert f"{capacity_of(less):.2f} experts a token on average, {share:.0%} fewer multiply-adds than" in str(less)
    share = -more.macs_saved / (more.macs + more.macs_saved)
    assert f"{capacity_of(more):.2f} experts a token on average, {share:.0%} more multiply-adds than" in str(more)
    for step, line in zip(less.steps, str(less).splitlines()[2:], strict=False):
        capacity = step.calls[0].stats["mixture_of_experts"].capacity
        assert f", {capacity:.2f} experts a token" in line


@pytest.mark.slow
@ROUTERS
@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
def test_counted_multiply_adds(router: str, backend: str) -> None:
    """The report's multiply-adds are those that a counter of the run sees, to the last one."""
    pipe, network = sit(router=router)
    accelerate(pipe, MixtureOfExperts(network, backend=backend))
    counted = count_macs(lambda: pair(pipe))
    assert report(pipe).macs == counted


@pytest.mark.filterwarnings("ignore:budget=2.0 was too small")
def test_a_budget_is_computed_whole() -> None:
    pipe, network = sit()
    accelerate(pipe, MixtureOfExperts(network, budget=2.0))
    counted = count_macs(lambda: pair(pipe))
    found = report(pipe)
    assert found.macs == counted
    assert capacity_of(found) == 2.0
    assert found.macs_saved < 0


def test_saved_is_against_the_capacity_of_the_training() -> None:
    """A router with which every expert always takes its share does exactly the rest."""
    pipe, network = sit(router="expert_threshold")
    whole = with_experts(pipe.transformer, router="expert_choice")
    with accelerated(pipe, MixtureOfExperts(whole)):
        expected = count_macs(lambda: pair(pipe))
        assert report(pipe).macs_saved == 0
    with accelerated(pipe, MixtureOfExperts(network, capacity=0.5)):
        pair(pipe)
        found = report(pipe)
    assert found.macs + found.macs_saved == expected
    assert found.macs < 0.9 * expected


COMPANIONS: dict[str, Any] = {
    "stack": FeatureCache(gate="interval", interval=2, scope="stack"),
    "module": FeatureCache(gate="interval", interval=2, scope="module"),
    "output": FeatureCache(gate="interval", interval=2, scope="output"),
    "guidance": GuidanceSkip("interval"),
}


@pytest.mark.parametrize("other", COMPANIONS.values(), ids=COMPANIONS)
@pytest.mark.parametrize("capacity", [0.5, 3.0])
def test_nothing_is_left_out_twice(other: Any, capacity: float) -> None:
    """What a cache did not run at all was given no experts; what was given is counted once."""
    pipe, network = sit(router="expert_threshold")
    with accelerated(pipe, MixtureOfExperts(with_experts(pipe.transformer, router="expert_choice"))):
        whole = count_macs(lambda: pair(pipe))
    accelerate(pipe, [MixtureOfExperts(network, capacity=capacity), other])
    counted = count_macs(lambda: pair(pipe))
    found = report(pipe)
    assert found.macs == pytest.approx(counted, rel=1e-4)  # each call is rounded down to whole ones
    assert found.macs + found.macs_saved == pytest.approx(whole, rel=1e-4)
    assert capacity_of(found) == pytest.approx(capacity, rel=0.15)
    assert {call.what for call in found.calls} != {"computed"}
    assert ("fewer" if counted < whole else "more") + " multiply-adds than with all calls computed" in str(found)


def test_what_did_not_fit_the_budget() -> None:
    pipe, network = sit()
    accelerate(pipe, MixtureOfExperts(network, budget=0.25))
    seen: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: seen.append(int(layer.overflow)))
        for layer in moe_layers(network).values()
    ]
    with pytest.warns(RuntimeWarning, match=r"budget=0\.25 was too small: \d+ of the pairs") as caught:
        images = pair(pipe)
    assert len(caught) == 1
    found = report(pipe)
    assert int(re.findall(r"small: (\d+)", str(caught[0].message))[0]) == overflow_of(found) > 0
    assert len(seen) == 3 * len(found.calls) and sum(seen) == overflow_of(found)
    assert [given.overflow for given in found.stats("mixture_of_experts")] == [
        sum(seen[i : i + 3]) for i in range(0, len(seen), 3)
    ]
    for hook in hooks:
        hook.remove()
    assert f"Left out for the budget: {overflow_of(found)} pairs of a token and an expert." in str(found)
    restore(pipe)
    accelerate(pipe, MixtureOfExperts(network, budget=4.0))  # as many as there are experts: everything fits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = pair(pipe)
    assert overflow_of(report(pipe)) == 0
    assert "Room for 4.00 experts a token on average" in str(report(pipe))
    assert not torch.equal(images, whole)
    restore(pipe)
    with accelerated(pipe, MixtureOfExperts(network)):
        torch.testing.assert_close(pair(pipe), whole, atol=1e-5, rtol=0)
        assert overflow_of(report(pipe)) is None and "budget" not in str(report(pipe))


def test_a_run_that_raises_does_not_warn() -> None:
    pipe, network = sit()
    accelerate(pipe, MixtureOfExperts(network, budget=0.25))

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    step = pipe.scheduler.step
    pipe.scheduler.step = interrupt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt):
            pair(pipe)
    assert report(pipe).failed
    pipe.scheduler.step = step


# -- settings


def test_settings_come_back() -> None:
    pipe, network = sit(inference_selection="gate_threshold")
    set_moe_capacity(network, 2.0)
    set_moe_budget(network, 3.0)
    before, base = states(network), pipe.transformer
    with accelerated(pipe, MixtureOfExperts(network, capacity=0.5, selection="predictor_mask", backend="loop")):
        assert states(network) == [("loop", "predictor_mask", None, 0.5)] * 3
    assert states(network) == before and pipe.transformer is base
    with accelerated(pipe, MixtureOfExperts(network)):
        assert states(network) == [("auto", "gate_threshold", None, None)] * 3, "what None means does not depend on it"
    assert states(network) == before
    for wrong in ({"capacity": 5.0}, {"budget": 2.0, "selection": "predictor_mask", "capacity": 0.01}):
        with pytest.raises(ValueError, match="capacity must lie between"):
            accelerate(pipe, MixtureOfExperts(network, **wrong))
        assert states(network) == before and pipe.transformer is base


def test_a_batch_that_decides_together_is_refused() -> None:
    pipe, network = sit(inference_selection="gate_topk_count")
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.0\.ff is 'gate_topk_count', with which an image depends"
    ):
        accelerate(pipe, MixtureOfExperts(network))
    assert pipe.transformer is not network
    with pytest.raises(ValueError, match=r"take one of \['predictor_mask', 'gate_threshold'\].* parity .* yourself"):
        MixtureOfExperts(network, selection="gate_topk_count")
    with accelerated(pipe, MixtureOfExperts(network, selection="gate_threshold")):
        torch.testing.assert_close(SIT(pipe, batch=3)[:1], SIT(pipe, batch=1), atol=1e-4, rtol=0)


def test_thresholds_that_were_never_fitted() -> None:
    pipe = SIT.make()
    network = with_experts(pipe.transformer)
    with pytest.raises(ValueError, match=r"never fitted.*calibrate_thresholds"):
        accelerate(pipe, MixtureOfExperts(network))
    with pytest.raises(ValueError, match=r"no thresholds for other capacities yet.*calibrate_thresholds"):
        accelerate(pipe, MixtureOfExperts(network, capacity=0.5))
    for layer in moe_layers(network).values():  # as of a checkpoint that has them for one kind only
        layer.thresholds.predictor.fill_(0.3)
        layer.thresholds.gate.fill_(torch.nan)
        layer.thresholds.updates += 1
    with pytest.raises(ValueError, match="were never fitted"):
        accelerate(pipe, MixtureOfExperts(network, selection="gate_threshold"))
    with accelerated(pipe, MixtureOfExperts(network)):
        assert pipe.transformer is network


def test_bad_input(tmp_path: Path) -> None:
    pipe = SIT.make()
    for wrong in ({"capacity": 0}, {"capacity": True}, {"budget": -1.0}, {"budget": float("nan")}, {"backend": "gemm"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            MixtureOfExperts(**wrong)
    with pytest.raises(ValueError, match=r"selection must be one of \['predictor_mask', 'gate_threshold'\] or None"):
        MixtureOfExperts(selection="topk")
    with pytest.raises(TypeError, match=r"must be a network with experts, got a SiT.*upcycle_to_moe"):
        MixtureOfExperts(pipe.transformer)
    with pytest.raises(TypeError, match="got a DynamicSiT"):
        MixtureOfExperts(make_dynamic(pipe.transformer))
    with pytest.raises(TypeError, match="got a MoESiT"):
        MixtureOfExperts(type(with_experts(pipe.transformer))(**dict(pipe.transformer.config)))
    with pytest.raises(TypeError, match="a module, a folder or None, got int"):
        MixtureOfExperts(3)  # type: ignore[arg-type]
    with pytest.raises(
        WeightsNotFoundError, match=r"no network with experts at .*moe; .*MixtureOfExperts.network=FOLDER"
    ):
        accelerate(pipe, MixtureOfExperts())
    with pytest.raises(WeightsNotFoundError, match="no network with experts in"):
        accelerate(pipe, MixtureOfExperts(tmp_path))
    pipe.transformer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="must be a network with experts, got a SiT"):
        accelerate(pipe, MixtureOfExperts(tmp_path))
    settings = {"router": "token_choice"}
    with pytest.raises(ValueError, match="num_layers is 1, must be 3"):
        accelerate(pipe, MixtureOfExperts(with_experts(tiny.sit_network(num_layers=1), **settings)))
    with pytest.raises(ValueError, match="is a form of SD3Transformer2DModel, and the pipeline has a SiT"):
        accelerate(pipe, MixtureOfExperts(with_experts(tiny.sd3_pipeline().transformer, **settings)))
    network, base = with_experts(pipe.transformer, **settings), pipe.transformer
    pipe.transformer = with_experts(base, **settings)
    with pytest.raises(ValueError, match="has a MoESiTTransformer2DModel; put the SiTTransformer2DModel back first"):
        accelerate(pipe, MixtureOfExperts(network))
    pipe.transformer = base
    for options, message in (
        ({"capacity": 0.5}, "capacity cannot be set after training.*token_choice"),
        ({"budget": 1.0}, "budget is for routers that choose by thresholds.*token_choice"),
        ({"selection": "gate_threshold"}, "is for router='diffmoe'"),
    ):
        with pytest.raises(ValueError, match=message):
            accelerate(pipe, MixtureOfExperts(network, **options))
    assert not flowaccel.is_accelerated(pipe) and pipe.transformer is not network


# -- what is saved

AGAIN = """
import sys
sys.path.insert(0, {tests!r})
from families import CASES
from flowaccel.pipelines import AcceleratedPipeline
from safetensors.torch import save_file

pipe = AcceleratedPipeline.from_pretrained({folder!r}, vae=None)
pipe.set_progress_bar_config(disable=True)
save_file({{"images": CASES["sit"](pipe, batch=2).contiguous()}}, {folder!r} + "/made.safetensors")
"""


def test_the_same_image_in_a_fresh_process(tmp_path: Path, process: Process) -> None:
    pipe, network = sit()
    accelerate(pipe, MixtureOfExperts(network, capacity=0.8))
    expected = pair(pipe)
    pipe.save_pretrained(tmp_path)
    assert '"SiTTransformer2DModel"' in (tmp_path / "transformer" / "config.json").read_text()
    script = AGAIN.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process("-c", script)
    found = flowaccel.Recipe.from_pretrained(tmp_path)
    assert found.accelerators[0].capacity == 0.8
    assert torch.equal(load_file(tmp_path / "made.safetensors")["images"], expected)


def test_recipes(tmp_path: Path) -> None:
    pipe, network = sit()
    part = MixtureOfExperts(network, 0.8, "gate_threshold", "loop", 2.0)
    Recipe([part]).for_pipeline(pipe).save_pretrained(tmp_path)
    again = Recipe.from_pretrained(tmp_path)
    assert again.accelerators[0].to_dict() == part.to_dict()
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with accelerated(pipe, MixtureOfExperts(network, capacity=0.8)):
        expected = pair(pipe)
    with accelerated(pipe, "mixture_of_experts:capacity=0.8"):
        assert pipe.transformer is not network
        assert torch.equal(pair(pipe), expected)
    other = tiny.sit_pipeline(num_layers=2)
    with pytest.raises(RecipeConflictError, match="made for a SiTTransformer2DModel"):
        accelerate(other, again)


# -- what it goes together with


def test_the_rules() -> None:
    pipe, network = sit()
    cache = FeatureCache(gate="interval", interval=2)
    Recipe([Sampler("ab2"), MixtureOfExperts(network), cache])
    with pytest.raises(RecipeConflictError, match=r"'mixture_of_experts' \(variant\) must come before 'feature_cache'"):
        Recipe([cache, MixtureOfExperts(network)])
    with pytest.raises(
        RecipeConflictError, match="'dynamic_width' and 'mixture_of_experts': a pipeline has one network"
    ):
        Recipe([flowaccel.DynamicWidth(make_dynamic(pipe.transformer)), MixtureOfExperts(network)])


@pytest.mark.parametrize("other", COMPANIONS.values(), ids=COMPANIONS)
def test_together_with(other: Any) -> None:
    pipe, network = sit()
    accelerate(pipe, [MixtureOfExperts(network, capacity=0.7), other])
    torch.testing.assert_close(SIT(pipe, batch=3)[:1], SIT(pipe, batch=1), atol=1e-4, rtol=0)


def test_together_with_a_refiner() -> None:
    pipe, network = sit()
    refiner = tiny.random_refiner(pipe.transformer)
    sampler = Sampler("flowturbo", {"blocks": "H1P1R1"})
    shared = upcycle_to_moe(pipe.transformer, {**SMALL, "router": "token_choice"}, method="shared")

    def images(*parts: Any) -> Tensor:
        with accelerated(pipe, list(parts)):
            found: Tensor = SIT(pipe, batch=2, steps=3)
            assert [call.what for call in report(pipe).calls] == ["computed"] * 3 + ["refined"] * 2
            given = [bool(call.done) for call in report(pipe).calls]
            assert given == [len(parts) > 2] * 3 + [False] * 2
            return found

    expected = images(sampler, VelocityRefiner(refiner))
    assert torch.equal(images(sampler, MixtureOfExperts(shared), VelocityRefiner(refiner)), expected)
    assert not torch.equal(images(sampler, MixtureOfExperts(network), VelocityRefiner(refiner)), expected)


def lora(network: Any) -> None:
    network.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"], init_lora_weights=False), "style")


def test_a_lora_that_is_added_after() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    stock = case(pipe)
    network = with_experts(case.make().transformer, router="token_choice")  # with weights of its own
    accelerate(pipe, MixtureOfExperts(network))
    without = case(pipe)
    lora(pipe.transformer)
    together = case(pipe, batch=2)
    assert not torch.allclose(together[:1], without, atol=1e-3)
    torch.testing.assert_close(together[:1], case(pipe), atol=1e-4, rtol=0)
    assert count_macs(lambda: made(case, pipe)) == report(pipe).macs  # latents: no decoder
    pipe.transformer.delete_adapters("style")
    assert torch.equal(case(pipe), without)
    restore(pipe)
    assert torch.equal(case(pipe), stock)


def test_a_lora_that_was_there_before() -> None:
    """It stays with the pipeline's own network, and goes along where the network with experts was made of that."""
    case = CASES["sd3"]
    pipe = case.make()
    own = with_experts(case.make().transformer, router="token_choice")
    lora(pipe.transformer)
    adapted = case(pipe)
    made_of_it = with_experts(pipe.transformer, router="token_choice")
    with accelerated(pipe, MixtureOfExperts(own)):
        without = case(pipe)
    with accelerated(pipe, MixtureOfExperts(made_of_it)):
        assert not torch.allclose(case(pipe), without, atol=1e-3)
    assert torch.equal(case(pipe), adapted)


def test_unpacked_experts() -> None:
    pipe, network = sit()
    with accelerated(pipe, MixtureOfExperts(network)):
        expected = pair(pipe)
    unpack_experts(network)
    with accelerated(pipe, MixtureOfExperts(network)):
        torch.testing.assert_close(pair(pipe), expected, atol=1e-6, rtol=0)
        assert report(pipe).macs == count_macs(lambda: pair(pipe))


@ROUTERS
def test_what_decides_stays_in_float32(router: str) -> None:
    pipe = SIT.make()
    network = fitted(pipe, pair, router=router)
    if router == "deepseek":
        for layer in moe_layers(network).values():
            layer.selection_bias.copy_(torch.linspace(-1, 1, 4) / 3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pipe.to(torch.bfloat16)
    accelerate(pipe, MixtureOfExperts(network))
    images = SIT(pipe, batch=2)
    assert torch.isfinite(images).all()
    decides = ("gate", "gate_hidden", "capacity_predictor", "thresholds", "selection_bias")
    for name, value in network.state_dict().items():
        if any(part in decides for part in name.split(".")):
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()) and value.dtype == before[name].dtype, (
                name
            )
        else:
            assert value.dtype == torch.bfloat16, name
    assert capacity_of(report(pipe)) is not None


@pytest.mark.parametrize("order", ["accelerated first", "offloaded first"])
def test_offloading_of_whole_models(order: str) -> None:
    pipe, network = sit()
    stock, base = pair(pipe), pipe.transformer
    with accelerated(pipe, MixtureOfExperts(network)):
        expected = pair(pipe)
    if order == "accelerated first":
        accelerate(pipe, MixtureOfExperts(network))
    pipe.enable_model_cpu_offload(device="cpu")
    if order == "offloaded first":
        accelerate(pipe, MixtureOfExperts(network))
    assert hasattr(network, "_hf_hook")
    assert torch.equal(pair(pipe), expected)
    restore(pipe)
    assert pipe.transformer is base
    assert torch.equal(pair(pipe), stock)


@pytest.mark.parametrize("settings", [{}, {"capacity": 0.5}, {"router": "deepseek"}], ids=str)
def test_offloading_piece_by_piece(settings: dict[str, Any]) -> None:
    pipe, network = sit(**{name: value for name, value in settings.items() if name == "router"})
    recipe = MixtureOfExperts(network, capacity=settings.get("capacity"))
    accelerate(pipe, recipe)
    expected = pair(pipe)
    cpu_offload(network, execution_device=torch.device("cpu"))
    assert torch.equal(pair(pipe), expected)
    restore(pipe)


def test_a_network_that_is_offloaded_piece_by_piece_is_not_exchanged() -> None:
    pipe, network = sit()
    network.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, assign=True)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    with pytest.raises(RecipeConflictError, match="accelerate first, then switch offloading on"):
        accelerate(pipe, MixtureOfExperts(network))
    assert not any(value.is_meta for value in network.parameters())


def test_two_pipelines() -> None:
    """One network serves one pipeline at a time; two have settings of their own."""
    first, network = sit()
    second, other = sit(seed=1)
    stock, base = pair(second), second.transformer
    with accelerated(first, MixtureOfExperts(network, capacity=0.5)):
        expected, before = pair(first), states(network)
        with pytest.raises(RecipeConflictError, match="shared with a SiTPipeline that is accelerated"):
            accelerate(second, MixtureOfExperts(network, capacity=2.0))
        assert second.transformer is base and states(network) == before
        assert torch.equal(pair(second), stock)
        with accelerated(second, MixtureOfExperts(other, capacity=2.0)):
            assert torch.equal(pair(first), expected)
            assert not torch.equal(pair(second), stock)
            assert capacity_of(report(first)) < 1 < capacity_of(report(second))


def test_evaluated(tmp_path: Path) -> None:
    """Rows of the exchanged network are counted, and samples belong to the settings that made them."""
    pipe, network = sit()
    protocol = flowaccel.evaluation.Protocol(
        conditions=flowaccel.evaluation.Classes((1, 2)), steps=3, num_samples=4, metrics=("rel_l2",), rounds=2
    )
    assert MixtureOfExperts(network).stand_in(pipe) is network
    recipes = [Recipe([MixtureOfExperts(network, capacity=c)], name=f"c{c}") for c in (0.5, 2.0)]
    results = flowaccel.evaluation.evaluate(pipe, recipes, protocol, tmp_path)
    untouched, less, more = results["rows"]
    assert untouched["network_rows"] == less["network_rows"] == more["network_rows"] > 0
    assert less["macs_per_image"] < 0.8 * more["macs_per_image"]
    assert less["metrics"]["rel_l2"]["value"] != more["metrics"]["rel_l2"]["value"]
