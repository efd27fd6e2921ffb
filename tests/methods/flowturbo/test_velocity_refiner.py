"""FlowTurbo's refiner on our own pipeline and on stock diffusers ones, down to the numbers that the scheduler gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from flowaccel import (
    CheckpointError,
    FlowTurboScheduler,
    RecipeConflictError,
    Sampler,
    SiTPipeline,
    VelocityRefiner,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    is_accelerated,
    restore,
)
from flowaccel.methods.flowturbo.accelerator import load_refiner, new_refiner

BLOCKS = "H1P2R2"
STEPS = 5
BASE_CALLS, REFINER_CALLS = 4, 4  # H makes two evaluations, P one, R two
SCALE = 3.0


@dataclass(frozen=True)
class Family:
    """A pipeline, how to call it, and where its guidance lies."""

    name: str
    make: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    calls: int = 1
    """Network calls per evaluation."""
    halves: tuple[int, int] | None = (0, 1)
    """Which half of the batch is conditional and which is not, or which call; None without guidance."""

    def call(self, pipe: Any, **options: Any) -> Tensor:
        """Images (B, C, H, W) in [0, 1]."""
        return pipe(**self.arguments(**options)).images

    def __str__(self) -> str:
        return self.name


def sit_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "class_labels": [(7 * i + seed) % 10 for i in range(batch)],
        "num_inference_steps": steps,
        "guidance_scale": SCALE,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(batch)],
        "output_type": "pt",
        **more,
    }


def sd3_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, **more: Any) -> dict[str, Any]:
    return tiny.sd3_arguments(batch, steps, SCALE, seed) | more


def flux_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, **more: Any) -> dict[str, Any]:
    return tiny.flux_arguments(batch, steps, seed=seed) | more


def true_cfg_arguments(batch: int = 1, steps: int = STEPS, seed: int = 3, **more: Any) -> dict[str, Any]:
    return tiny.flux_arguments(batch, steps, true_scale=SCALE, seed=seed) | more


SIT = Family("sit", tiny.sit_pipeline, sit_arguments)
SD3 = Family("sd3", tiny.sd3_pipeline, sd3_arguments, halves=(1, 0))
FLUX = Family("flux", tiny.flux_pipeline, flux_arguments, halves=None)
TRUE_CFG = Family("flux-true-cfg", tiny.flux_pipeline, true_cfg_arguments, calls=2)
every_family = pytest.mark.parametrize("family", [SIT, SD3, FLUX, TRUE_CFG], ids=str)


@dataclass
class Evaluation:
    """What one evaluation of an accelerated run saw and gave."""

    refinement: Any
    calls: list[dict[str, Any]]
    """Keyword arguments of the network calls."""
    outputs: list[Tensor]
    """What these returned, a row per row of the batch."""
    guided: Tensor
    """What the scheduler was given."""
    sample: Tensor
    stepped: Tensor


def recorded(pipe: Any, call: Callable[[], Any]) -> tuple[list[Evaluation], Any]:
    """All evaluations of `call()`, observed from outside the accelerator."""
    seen: list[Evaluation] = []
    calls: list[tuple[dict[str, Any], Tensor]] = []
    names = ["hidden_states", "timestep", "class_labels"]

    def after_network(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((dict(zip(names, args, strict=False)) | kwargs, output[0].clone()))

    step = pipe.scheduler.step
    pending: list[Any] = []

    def before_network(*_: Any) -> None:
        pending.append(getattr(pipe.scheduler, "refinement", None))

    def intercept_step(model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        result = step(model_output, timestep, sample, **kwargs)
        arguments, outputs = zip(*calls, strict=True)
        seen.append(
            Evaluation(pending[-1], list(arguments), list(outputs), model_output.clone(), sample.clone(), result[0])
        )
        calls.clear()
        return result

    pipe.scheduler.step = intercept_step
    handles = [
        pipe.transformer.register_forward_pre_hook(before_network),
        pipe.transformer.register_forward_hook(after_network, with_kwargs=True),
    ]
    try:
        return seen, call()
    finally:
        del pipe.scheduler.step
        for handle in handles:
            handle.remove()


@torch.no_grad()
def by_hand(refiner: nn.Module, network: nn.Module, arguments: dict[str, Any], rows: slice, feed: Tensor) -> Tensor:
    """The refiner's offset in diffusers' convention for some rows of a network call."""
    sign = -1 if type(network).__name__.startswith("SiT") else 1
    batch = arguments["hidden_states"].shape[0]
    picked = {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value
        for name, value in arguments.items()
        if not name.endswith("_ids")
    } | {name: value for name, value in arguments.items() if name.endswith("_ids")}
    axis = 1 if picked["hidden_states"].dim() == 4 else 2
    picked["hidden_states"] = torch.cat([picked["hidden_states"], sign * feed], dim=axis)
    picked["return_dict"] = False
    return sign * refiner(**picked)[0]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@every_family
@pytest.mark.parametrize("mode", ["released", "consistent", "single"])
def test_scheduler_receives_the_guided_refinement(family: Family, mode: str) -> None:
    pipe, batch = family.make(), 2
    refiner = tiny.random_refiner(pipe.transformer)
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS, refiner_mode=mode))
    seen, _ = recorded(pipe, lambda: family.call(pipe, batch=batch))
    refined = [evaluation for evaluation in seen if evaluation.refinement is not None]
    assert len(refined) == (2 if mode == "single" else REFINER_CALLS)
    assert len(seen) - len(refined) == BASE_CALLS
    for evaluation in refined:
        feed, base = evaluation.refinement.feed[:batch], evaluation.refinement.base[:batch]
        assert len(evaluation.calls) == family.calls
        network = pipe.transformer
        if family.halves is None:
            expected = base + by_hand(refiner, network, evaluation.calls[0], slice(0, batch), feed)
        else:
            offsets = [
                by_hand(refiner, network, evaluation.calls[0], slice(half * batch, (half + 1) * batch), feed)
                if family.calls == 1
                else by_hand(refiner, network, evaluation.calls[half], slice(0, batch), feed)
                for half in family.halves
            ]
            expected = base + offsets[1] + SCALE * (offsets[0] - offsets[1])
            assert (offsets[0] - offsets[1]).abs().max() > 1e-3
        torch.testing.assert_close(evaluation.guided[:batch], expected, rtol=1e-5, atol=2e-5)
        assert (evaluation.guided[:batch] - base).abs().max() > 1e-3


def test_unguided_channels_follow_their_own_half() -> None:
    pipe = tiny.sit_pipeline(in_channels=2)
    refiner = tiny.random_refiner(pipe.transformer)
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    arguments = sit_arguments(guidance_channels=1, output_type="latent")
    seen, _ = recorded(pipe, lambda: pipe(**arguments))
    for evaluation in [evaluation for evaluation in seen if evaluation.refinement is not None]:
        feed, base = evaluation.refinement
        conditional, null = (
            by_hand(refiner, pipe.transformer, evaluation.calls[0], slice(half, half + 1), feed[half : half + 1])
            for half in (0, 1)
        )
        torch.testing.assert_close(base[:1, :1], base[1:, :1])  # the guided channel is common to both halves
        guided = base[:1, :1] + null[:, :1] + SCALE * (conditional - null)[:, :1]
        torch.testing.assert_close(evaluation.guided[:1, :1], guided, rtol=1e-5, atol=2e-5)
        own = torch.cat([base[:1, 1:] + conditional[:, 1:], base[1:, 1:] + null[:, 1:]])
        torch.testing.assert_close(evaluation.guided[:, 1:], own, rtol=1e-5, atol=2e-5)
        assert not torch.equal(own[:1], own[1:])


@every_family
def test_base_network_rests_at_refiner_evaluations(family: Family) -> None:
    pipe = family.make()
    refiner = tiny.random_refiner(pipe.transformer)
    counts = {"base": 0, "refiner": 0}

    def counting(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    # a layer that every forward pass runs once: a call that never reaches it did not compute the network
    pipe.transformer.proj_out.register_forward_hook(counting("base"))
    refiner.proj_out.register_forward_hook(counting("refiner"))
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    family.call(pipe)
    assert counts == {"base": BASE_CALLS * family.calls, "refiner": REFINER_CALLS * family.calls}


@every_family
def test_without_the_accelerator_refiner_steps_run_the_base_network(family: Family) -> None:
    pipe = family.make()
    count = []
    pipe.transformer.proj_out.register_forward_hook(lambda *_: count.append(1))
    with accelerated(pipe, Sampler("flowturbo", {"blocks": BLOCKS})):
        family.call(pipe)
    assert len(count) == (BASE_CALLS + REFINER_CALLS) * family.calls


@every_family
@pytest.mark.parametrize("mode", ["released", "consistent", "single"])
def test_zero_refiner_makes_steps_of_the_carried_velocity(family: Family, mode: str) -> None:
    pipe = family.make()
    accelerate(pipe, tiny.flowturbo(new_refiner(pipe.transformer), BLOCKS, refiner_mode=mode))
    seen, _ = recorded(pipe, lambda: family.call(pipe))
    refined = [evaluation for evaluation in seen if evaluation.refinement is not None]
    carried, start = refined[0].refinement.feed, refined[0].sample
    scheduler: Any = pipe.scheduler
    expected = start + (scheduler.width(3) + scheduler.width(4)) * carried
    torch.testing.assert_close(refined[-1].stepped, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(evaluation.refinement.base, carried) for evaluation in refined)


@every_family
def test_restore_is_exact(family: Family) -> None:
    pipe = family.make()
    before = family.call(pipe)  # pipelines keep some numbers of their last call, so the first one comes first
    state = tiny.snapshot(pipe)
    refiner = tiny.random_refiner(pipe.transformer)
    for _ in range(2):
        accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
        assert is_accelerated(pipe)
        accelerated_images = family.call(pipe)
        assert not torch.equal(before, accelerated_images)
        restore(pipe)
        assert not is_accelerated(pipe)
        assert tiny.snapshot(pipe) == state
        assert torch.equal(before, family.call(pipe))
    assert tiny.snapshot(pipe) == state


@every_family
def test_nothing_stays_where_the_pipeline_never_ran(family: Family) -> None:
    pipe = family.make()
    state = tiny.snapshot(pipe)
    restore(accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS)))
    assert tiny.snapshot(pipe) == state


@every_family
def test_two_pipelines_of_a_class_do_not_meet(family: Family) -> None:
    first, second = family.make(seed=0), family.make(seed=1)
    untouched = family.call(second)
    alone = family.call(accelerate(first, tiny.flowturbo(tiny.random_refiner(first.transformer), BLOCKS)))
    assert torch.equal(untouched, family.call(second))
    accelerate(second, tiny.flowturbo(tiny.random_refiner(second.transformer, seed=12), "H2P2R1"))
    other = family.call(second)
    nested: list[Tensor] = []

    def meanwhile(_: Any, index: int, *__: Any) -> dict:
        if index == 5:  # in the middle of the refiner steps of the first
            nested.append(family.call(second))
        return {}

    assert torch.equal(alone, family.call(first, callback_on_step_end=meanwhile))
    assert torch.equal(other, nested[0])
    restore(first)
    assert torch.equal(other, family.call(second))
    restore(second)
    assert torch.equal(untouched, family.call(second))


class Interruption(Exception):
    pass


@every_family
@pytest.mark.parametrize("at", [1, 4, 6])
def test_rerun_after_an_exception_is_a_fresh_run(family: Family, at: int) -> None:
    pipe = family.make()
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))
    fresh = family.call(pipe)

    def interrupt(_: Any, index: int, *__: Any) -> dict:
        if index == at:
            raise Interruption
        return {}

    with pytest.raises(Interruption):
        family.call(pipe, seed=8, callback_on_step_end=interrupt)
    assert torch.equal(fresh, family.call(pipe))


@every_family
def test_restore_after_an_exception(family: Family) -> None:
    pipe = family.make()
    before = family.call(pipe)
    state = tiny.snapshot(pipe)
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))

    def broken(*_: Any) -> None:
        raise Interruption

    handle = pipe.transformer.proj_out.register_forward_hook(broken)
    with pytest.raises(Interruption):
        family.call(pipe)
    handle.remove()
    restore(pipe)
    assert tiny.snapshot(pipe)["modules"] == state["modules"]
    assert tiny.snapshot(pipe)["scheduler"] == state["scheduler"]
    assert torch.equal(before, family.call(pipe))


@every_family
@pytest.mark.parametrize("steps", [4, 6])
def test_another_step_count_is_refused(family: Family, steps: int) -> None:
    pipe = family.make()
    before = family.call(pipe)
    state = tiny.snapshot(pipe)
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))
    fast = family.call(pipe)
    with pytest.raises(ValueError, match=rf"must be {STEPS} for blocks '{BLOCKS}' \(H \+ P \+ R\), got {steps}"):
        family.call(pipe, steps=steps)
    assert torch.equal(fast, family.call(pipe))
    restore(pipe)
    assert tiny.snapshot(pipe)["modules"] == state["modules"]
    assert torch.equal(before, family.call(pipe))


class Counting(ModelHook):
    """Stands for any of accelerate's offload hooks: it sees the calls and changes nothing."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.calls += 1
        return args, kwargs


def plain_hooks_leave(family: Family) -> Any:
    """What accelerate's own hook leaves in a module when it comes and goes without us."""
    pipe = family.make()
    family.call(pipe)
    add_hook_to_module(pipe.transformer, Counting())
    remove_hook_from_module(pipe.transformer)
    return tiny.snapshot(pipe)["modules"]


@every_family
@pytest.mark.parametrize("hook_removed", ["while accelerated", "after restore"])
@pytest.mark.parametrize("hook_added", ["before accelerate", "after accelerate"])
def test_offload_hooks_in_any_order(family: Family, hook_added: str, hook_removed: str) -> None:
    pipe = family.make()
    before = family.call(pipe)
    untouched = tiny.snapshot(pipe)["modules"]
    refiner = tiny.random_refiner(pipe.transformer)
    with accelerated(pipe, tiny.flowturbo(refiner, BLOCKS)):
        fast = family.call(pipe)
    hook = Counting()
    if hook_added == "before accelerate":
        add_hook_to_module(pipe.transformer, hook)
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    if hook_added == "after accelerate":
        add_hook_to_module(pipe.transformer, hook)
    assert torch.equal(fast, family.call(pipe))
    assert hook.calls
    if hook_removed == "while accelerated":
        remove_hook_from_module(pipe.transformer)
    restore(pipe)
    hook.calls = 0
    assert torch.equal(before, family.call(pipe))
    if hook_removed == "after restore":
        assert hook.calls
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(before, family.call(pipe))
    # accelerate's own removal leaves the method it had wrapped in the module's `vars`, unless that was ours
    ours = (hook_added, hook_removed) == ("after accelerate", "while accelerated")
    assert tiny.snapshot(pipe)["modules"] == (untouched if ours else plain_hooks_leave(family))
    # and nothing of ours is left underneath: the accelerator can come again
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    assert torch.equal(fast, family.call(pipe))
    restore(pipe)
    assert torch.equal(before, family.call(pipe))


@pytest.mark.parametrize("family", [SIT, FLUX], ids=str)
@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_real_cpu_offload(family: Family, first: str) -> None:
    pipe = family.make()
    before = family.call(pipe)
    refiner = tiny.random_refiner(pipe.transformer)
    with accelerated(pipe, tiny.flowturbo(refiner, BLOCKS)):
        fast = family.call(pipe)

    def offload() -> None:
        for component in [pipe.transformer, *([pipe.vae] if getattr(pipe, "vae", None) else [])]:
            cpu_offload(component, execution_device="cpu")

    def switch_on() -> None:
        accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))

    for act in (offload, switch_on) if first == "offload" else (switch_on, offload):
        act()
    assert pipe.transformer.proj_out.weight.device.type == "meta"
    assert torch.equal(fast, family.call(pipe))
    assert {parameter.device.type for parameter in refiner.parameters()} == {"cpu"}
    restore(pipe)
    assert torch.equal(before, family.call(pipe))


@every_family
def test_batch_changes_no_image(family: Family) -> None:
    pipe = family.make()
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))
    together = family.call(pipe, batch=2, seed=3)
    first, second = (family.call(pipe, batch=1, seed=seed) for seed in (3, 4))
    torch.testing.assert_close(together[:1], first, rtol=0, atol=1e-4)
    if family is not SIT:  # its classes go by position
        torch.testing.assert_close(together[1:], second, rtol=0, atol=1e-4)


def test_batch_of_classes_changes_no_image() -> None:
    pipe = tiny.sit_pipeline()
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    together = pipe([4, 0, 9], latents=noise, guidance_scale=SCALE, output_type="latent").images
    alone = [
        pipe(label, latents=noise[i : i + 1], guidance_scale=SCALE, output_type="latent").images
        for i, label in enumerate([4, 0, 9])
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


def test_split_guidance_gives_the_image_of_batched_guidance() -> None:
    pipe = tiny.sit_pipeline()
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS))
    arguments = sit_arguments(batch=2, output_type="latent")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    batched = pipe(**(arguments | {"latents": noise})).images
    pipe.scheduler.set_timesteps(STEPS)
    state, labels = noise, torch.tensor(arguments["class_labels"])
    for timestep in pipe.scheduler.timesteps:
        time = 1 - timestep / 1000
        conditional = pipe.transformer(state, time, labels).sample
        null = pipe.transformer(state, time, torch.full_like(labels, 10)).sample
        state = pipe.scheduler.step(-(null + SCALE * (conditional - null)), timestep, state).prev_sample
    torch.testing.assert_close(state, batched, rtol=0, atol=1e-4)


def test_guidance_off_is_one_row_per_image() -> None:
    pipe = tiny.sit_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    rows: list[int] = []
    refiner.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    pipe([1, 2, 3], guidance_scale=1.0)
    assert rows == [3] * REFINER_CALLS


@every_family
def test_half_precision_pipelines_get_a_half_precision_refiner(family: Family) -> None:
    pipe = family.make()
    pipe.transformer.bfloat16()
    refiner = tiny.random_refiner(pipe.transformer).float()
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    bfloat = {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in family.arguments(output_type="latent").items()
    }
    image = pipe(**bfloat).images
    assert torch.isfinite(image).all()
    assert refiner.dtype is torch.bfloat16


@pytest.mark.parametrize(
    "network",
    [
        lambda: tiny.sit_network(),
        lambda: tiny.sit_network(learn_sigma=True),
        lambda: tiny.sd3_pipeline().transformer,
        lambda: tiny.sd3_pipeline(dual_attention_layers=(0, 1), qk_norm="rms_norm").transformer,
        lambda: tiny.flux_pipeline().transformer,
    ],
    ids=["sit", "sit with sigma", "sd3", "sd3.5", "flux"],
)
def test_new_refiner_has_one_block_and_returns_zero(network: Callable[[], Any], tmp_path: Path) -> None:
    base = network()
    refiner = new_refiner(base)
    assert type(refiner) is type(base)
    assert refiner.config.in_channels == 2 * base.config.in_channels
    assert refiner.config.out_channels == base.out_channels == refiner.out_channels
    assert len(refiner.transformer_blocks) == 1
    assert sum(map(torch.numel, refiner.parameters())) < sum(map(torch.numel, base.parameters()))
    # the shape of a saved and loaded base is read off its file, so that one must give the same
    base.save_pretrained(tmp_path)
    again = new_refiner(type(base).from_pretrained(tmp_path))
    shapes = {name: value.shape for name, value in refiner.state_dict().items()}
    assert {name: value.shape for name, value in again.state_dict().items()} == shapes


@every_family
def test_new_refiner_offset_is_exactly_zero(family: Family) -> None:
    pipe = family.make()
    refiner = new_refiner(pipe.transformer)
    outputs: list[Tensor] = []
    refiner.register_forward_hook(lambda _, __, output: outputs.append(output[0].clone()))
    accelerate(pipe, tiny.flowturbo(refiner, BLOCKS))
    family.call(pipe)
    assert len(outputs) == REFINER_CALLS * family.calls
    assert all(torch.equal(output, torch.zeros_like(output)) for output in outputs)


# refiners that do not fit `tiny.sit_network()`, and what the error says
MISFITS: dict[str, tuple[Callable[[], Any], str]] = {
    "channels": (lambda: tiny.sit_network(in_channels=3, out_channels=1), "in_channels is 3, must be 2"),
    "output": (lambda: tiny.sit_network(in_channels=2), "out_channels is None, must be 1"),
    "size": (
        lambda: tiny.random_refiner(tiny.sit_network(sample_size=16)),
        "sample_size is 16, must be 8",
    ),
    "patch": (lambda: tiny.random_refiner(tiny.sit_network(patch_size=4)), "patch_size is 4, must be 2"),
    "classes": (lambda: tiny.random_refiner(tiny.sit_network(num_classes=7)), "num_classes is 7, must be 10"),
    "null class": (lambda: tiny.random_refiner(tiny.sit_network(null_class=False)), "null_class is False"),
    "class": (
        lambda: tiny.random_refiner(tiny.sd3_pipeline().transformer),
        "the refiner is a SD3Transformer2DModel, the network a SiTTransformer2DModel",
    ),
    "not a network": (lambda: nn.Linear(2, 2), "the refiner is a Linear"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfit_is_named_and_changes_nothing(case: str) -> None:
    make, message = MISFITS[case]
    pipe = tiny.sit_pipeline()
    before = SIT.call(pipe)
    state = tiny.snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, tiny.flowturbo(make(), BLOCKS))
    assert not is_accelerated(pipe)
    assert tiny.snapshot(pipe) == state
    assert torch.equal(before, SIT.call(pipe))


def test_every_misfit_is_named_at_once() -> None:
    pipe = tiny.sit_pipeline()
    with pytest.raises(ValueError, match=r"sample_size is 16, must be 8; .*num_classes is 7, must be 10"):
        accelerate(pipe, tiny.flowturbo(tiny.random_refiner(tiny.sit_network(sample_size=16, num_classes=7)), BLOCKS))


@pytest.mark.parametrize("family", [SD3, FLUX], ids=str)
def test_misfit_on_stock_pipelines(family: Family) -> None:
    pipe = family.make()
    other = family.make(pooled_projection_dim=9).transformer
    with pytest.raises(ValueError, match="pooled_projection_dim is 9, must be 12"):
        accelerate(pipe, tiny.flowturbo(tiny.random_refiner(other), BLOCKS))
    assert not is_accelerated(pipe)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "the pipeline has a FlowRungeKuttaScheduler; put Sampler"),
        ([Sampler("heun")], r"\(sampler without R steps\) excludes 'velocity_refiner': .*; put Sampler"),
        ([Sampler("flowturbo", {"blocks": "H2P2"})], r"\(sampler without R steps\) excludes 'velocity_refiner'"),
    ],
    ids=["none", "heun", "no R"],
)
def test_needs_refiner_steps(parts: list[Any], message: str) -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    with pytest.raises(ValueError, match=message):
        accelerate(pipe, [*parts, VelocityRefiner(tiny.random_refiner(pipe.transformer))])
    assert tiny.snapshot(pipe) == state


def test_refiner_before_sampler_is_refused() -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    turned = list(reversed(tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS).accelerators))
    with pytest.raises(ValueError, match="'sampler' must come before 'velocity_refiner'"):
        accelerate(pipe, turned)
    assert tiny.snapshot(pipe) == state


def test_a_pipeline_that_has_the_scheduler_needs_no_sampler() -> None:
    pipe = tiny.sit_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    with accelerated(pipe, tiny.flowturbo(refiner, BLOCKS)):
        expected = SIT.call(pipe)
    pipe.scheduler = FlowTurboScheduler(BLOCKS)
    with accelerated(pipe, VelocityRefiner(refiner)):
        assert torch.equal(expected, SIT.call(pipe))


def test_missing_folder(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    with pytest.raises(WeightsNotFoundError, match=r"no refiner in .*nowhere: it has no config\.json"):
        accelerate(pipe, tiny.flowturbo(tmp_path / "nowhere", BLOCKS))
    with pytest.raises(WeightsNotFoundError, match="train one with `flowaccel train refiner`"):
        accelerate(pipe, tiny.flowturbo(None, BLOCKS))
    assert tiny.snapshot(pipe) == state


def test_default_is_the_refiner_beside_the_components(tmp_path: Path) -> None:
    tiny.save_sit_pipeline(tmp_path)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    found = SIT.call(accelerate(pipe, tiny.flowturbo(None, BLOCKS)))
    restore(pipe)
    for given in (tmp_path / "refiner", str(tmp_path / "refiner")):
        with accelerated(pipe, tiny.flowturbo(given, BLOCKS)):
            assert torch.equal(found, SIT.call(pipe))
    with accelerated(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS)):
        assert torch.equal(found, SIT.call(pipe))


def test_folder_of_a_stock_class_loads(tmp_path: Path) -> None:
    pipe = tiny.sd3_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    refiner.save_pretrained(tmp_path)
    assert type(load_refiner(tmp_path)) is SD3Transformer2DModel
    with accelerated(pipe, tiny.flowturbo(refiner, BLOCKS)):
        expected = SD3.call(pipe)
    with accelerated(pipe, tiny.flowturbo(tmp_path, BLOCKS)):
        assert torch.equal(expected, SD3.call(pipe))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "Pickle"}, "names the class 'Pickle', which is no network that flowaccel or diffusers has"),
        ({"_class_name": "FluxPipeline"}, "names the class 'FluxPipeline', which is no network"),
        ({"_class_name": "logging"}, "names the class 'logging', which is no network"),
        ({"_class_name": ["a"]}, "which is no network"),
        ({}, "is not the configuration of a network: KeyError: '_class_name'"),
        ([], "is not the configuration of a network: TypeError"),
        ("{", "is not the configuration of a network: JSONDecodeError"),
    ],
    ids=["unknown", "pipeline", "module", "list name", "no class", "list", "broken"],
)
def test_foreign_folder_gives_a_clear_error(tmp_path: Path, config: Any, message: str) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    with pytest.raises(CheckpointError, match=message):
        accelerate(pipe, tiny.flowturbo(tmp_path, BLOCKS))
    assert tiny.snapshot(pipe) == state


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "other shapes", "other names", "pickle"])
def test_damaged_weights_give_a_clear_error(tmp_path: Path, damage: str) -> None:
    pipe = tiny.sit_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    refiner.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif damage == "foreign":
        weights.write_bytes(b"no weights at all")
    elif damage == "other names":
        save_file({"weight": torch.zeros(2)}, weights)
    elif damage == "other shapes":
        tiny.random_refiner(tiny.sit_network(num_attention_heads=4)).save_pretrained(tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / weights.name).read_bytes())
    else:
        weights.unlink()
    if damage == "pickle":  # which diffusers would fall back to
        torch.save(refiner.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    state = tiny.snapshot(pipe)
    with pytest.raises(CheckpointError, match=r"cannot load the refiner in|do not fit its config\.json: 2\d entries"):
        accelerate(pipe, tiny.flowturbo(tmp_path, BLOCKS))
    assert tiny.snapshot(pipe) == state


@pytest.mark.parametrize("value", [3, [1], {"folder": "x"}])
def test_wrong_type(value: Any) -> None:
    with pytest.raises(TypeError, match="refiner must be a module, a folder or None, got"):
        VelocityRefiner(value)


def test_a_pipeline_without_a_network() -> None:
    class Bare:
        scheduler = FlowTurboScheduler(BLOCKS)

    with pytest.raises(TypeError, match="Bare has neither a transformer nor a unet"):
        VelocityRefiner(tiny.random_refiner(tiny.sit_network())).attach(Bare())


def test_accelerating_twice_is_refused() -> None:
    pipe = tiny.sit_pipeline()
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer), BLOCKS)
    accelerate(pipe, recipe)
    fast = SIT.call(pipe)
    with pytest.raises(RecipeConflictError, match="accelerated already"):
        accelerate(pipe, recipe)
    assert torch.equal(fast, SIT.call(pipe))
