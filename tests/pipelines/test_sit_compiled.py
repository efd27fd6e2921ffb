"""Compiled blocks: how many graphs there are, that they compute what the eager loop does, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import flowaccel
import tiny
from flowaccel import (
    FlowAdamsBashforthScheduler,
    FlowRungeKuttaScheduler,
    FlowSDEScheduler,
    FlowTurboScheduler,
    SiTImg2ImgPipeline,
    SiTInpaintPipeline,
)
from helpers import assert_close, counted
from tiny import generators

SCALE = 2.0


class CountingBackend:
    """A backend of `torch.compile` that runs graphs as they are, and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def __len__(self) -> int:
        return len(self.graphs)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pipeline(blocks: str | None = None, mode: str = "released", kind: Any = None) -> Any:
    """A pipeline on 4-channel 8x8 latents, so that the channel that is not guided counts; with FlowTurbo's blocks."""
    base = tiny.sit_pipeline(in_channels=4, learn_sigma=True, num_layers=1)
    if kind is not None:
        base = kind(**base.components)
        base.set_progress_bar_config(disable=True)
    if blocks is not None:
        refiner = tiny.random_refiner(base.transformer)
        flowaccel.accelerate(base, tiny.flowturbo(refiner, blocks, refiner_mode=mode))
    return base


def sample(pipe: Any, batch: int = 2, steps: int | None = None, **options: Any) -> Tensor:
    options = {"guidance_scale": SCALE, "output_type": "latent", **options}
    seeds = generators(*range(batch))
    return pipe([(3 * i + 1) % 10 for i in range(batch)], num_inference_steps=steps, generator=seeds, **options).images


# --- graphs


@pytest.mark.slow
def test_one_graph_for_each_kind_of_step() -> None:
    """Neither steps, nor guidance scales, nor other counts of blocks, nor second runs add one; another batch does."""
    backend, pipe = CountingBackend(), pipeline("H2P3R2")
    pipe.compile_blocks(backend)
    sample(pipe)
    assert len(backend) == 3
    sample(pipe)
    sample(pipe, guidance_scale=3.5)
    refiner = pipe.scheduler.refiner
    flowaccel.restore(pipe)
    flowaccel.accelerate(pipe, tiny.flowturbo(refiner, "H1P1R4"))
    sample(pipe)
    assert len(backend) == 3
    sample(pipe, batch=3)
    assert len(backend) == 6
    sample(pipe, guidance_scale=1.0)
    assert len(backend) == 9
    assert not counters["graph_break"]


def test_a_graph_holds_the_whole_step() -> None:
    """Every matrix product of a Heun step, both evaluations, is in its one graph; the network's module is not called
    from outside.
    """
    backend, pipe = CountingBackend(), pipeline()
    pipe.compile_blocks(backend)
    with counted(pipe.transformer) as rows:
        sample(pipe, steps=2)
    assert rows == []
    (graph,) = backend.graphs
    linear = [node for node in graph.graph.nodes if node.op == "call_function" and "linear" in str(node.target)]
    layers = [module for module in pipe.transformer.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * len(layers)


@pytest.mark.slow
def test_runge_kutta_needs_one_graph() -> None:
    backend, pipe = CountingBackend(), pipeline()
    pipe.compile_blocks(backend)
    sample(pipe, steps=3)
    sample(pipe, steps=5)
    assert len(backend) == 1
    pipe.scheduler = FlowRungeKuttaScheduler("euler")
    sample(pipe, steps=3)
    assert len(backend) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["consistent", "single"])
def test_three_graphs_in_the_other_refiner_modes(mode: str) -> None:
    """Though `consistent` hands another velocity to the first R step."""
    backend, pipe = CountingBackend(), pipeline("H1P2R3", mode)
    pipe.compile_blocks(backend)
    sample(pipe)
    assert len(backend) == 3


# --- the same images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "mode", "scale"),
    [
        ("H1P2R2", "released", SCALE),
        ("H1P2R2", "consistent", SCALE),
        ("H1P2R2", "single", SCALE),
        ("H1P2R2", "released", 1.0),
        ("P2R1", "released", SCALE),
        ("H2R2", "consistent", SCALE),
    ],
)
def test_flowturbo_is_bit_equal(blocks: str, mode: str, scale: float) -> None:
    pipe = pipeline(blocks, mode)
    expected = sample(pipe, guidance_scale=scale)
    pipe.compile_blocks("eager")
    assert torch.equal(sample(pipe, guidance_scale=scale), expected)
    pipe.decompile_blocks()
    with counted(pipe.transformer) as rows:
        assert torch.equal(sample(pipe, guidance_scale=scale), expected)
    assert rows


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("options", [{}, {"guidance_channels": "all"}, {"guidance_scale": 1.0}], ids=str)
def test_runge_kutta_is_bit_equal(solver: Any, options: dict[str, Any]) -> None:
    pipe = pipeline()
    pipe.scheduler = FlowRungeKuttaScheduler(solver, shift=3.0)
    expected = sample(pipe, steps=4, **options)
    pipe.compile_blocks("eager")
    assert torch.equal(sample(pipe, steps=4, **options), expected)


@pytest.mark.slow
def test_refiner_steps_without_a_refiner_run_the_network() -> None:
    pipe = pipeline()
    pipe.scheduler = FlowTurboScheduler("H1P1R2")
    expected = sample(pipe)
    pipe.compile_blocks("eager")
    assert torch.equal(sample(pipe), expected)


@pytest.mark.slow
def test_half_precision_network() -> None:
    pipe = pipeline("H1P1R1").to(dtype=torch.bfloat16)
    pipe.scheduler.refiner.to(torch.bfloat16)
    expected = sample(pipe)
    pipe.compile_blocks("eager")
    images = sample(pipe)
    assert images.dtype == torch.float32 and torch.equal(images, expected)


@pytest.mark.slow
def test_accelerate_and_restore_after_compiling() -> None:
    pipe = pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    plain = sample(pipe, steps=3)
    with flowaccel.accelerated(pipe, tiny.flowturbo(refiner, "H1P1R1")):
        accelerated = sample(pipe)
    pipe.compile_blocks("eager")
    before = tiny.snapshot(pipe)
    with flowaccel.accelerated(pipe, tiny.flowturbo(refiner, "H1P1R1")):
        assert torch.equal(sample(pipe), accelerated)
    assert torch.equal(sample(pipe, steps=3), plain)
    assert tiny.snapshot(pipe) == {**before, "scheduler vars": tiny.snapshot(pipe)["scheduler vars"]}
    assert (accelerated - plain).abs().max() > 1e-3


def test_a_refiner_leaves_its_scheduler_when_it_is_restored() -> None:
    pipe = pipeline()
    pipe.scheduler = FlowTurboScheduler("H1R1")
    flowaccel.accelerate(pipe, flowaccel.VelocityRefiner(tiny.random_refiner(pipe.transformer)))
    assert pipe.scheduler.refiner is not None
    flowaccel.restore(pipe)
    assert pipe.scheduler.refiner is None and "refiner" not in vars(pipe.scheduler)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [SiTImg2ImgPipeline, SiTInpaintPipeline])
def test_siblings_are_bit_equal(kind: Any) -> None:
    pipe = pipeline("H2P3R2", kind=kind)
    image = torch.rand(2, 4, 8, 8)
    mask = torch.zeros(8, 8)
    mask[2:5] = 1
    options = {"image": image, "strength": 0.7, **({"mask_image": mask} if kind is SiTInpaintPipeline else {})}
    expected = sample(pipe, **options)
    pipe.compile_blocks("eager")
    images = sample(pipe, **options)
    assert torch.equal(images, expected)
    if kind is SiTInpaintPipeline:
        assert torch.equal(images[:, :, 5:], (2 * image - 1)[:, :, 5:])


@pytest.mark.slow
def test_inductor() -> None:
    pipe = pipeline("H1P1R1")
    expected = sample(pipe)
    pipe.compile_blocks()
    assert_close(sample(pipe), expected, 1e-5)
    assert_close(sample(pipe, guidance_scale=3.0), _eager(pipe, guidance_scale=3.0), 1e-5)


def _eager(pipe: Any, **options: Any) -> Tensor:
    pipe.decompile_blocks()
    return sample(pipe, **options)


# --- callbacks


@pytest.mark.slow
def test_callbacks_count_steps() -> None:
    """Once a step, at its starting time, with the state between steps; what they return is what is run on."""
    pipe = pipeline("H1P2R1")
    pipe.compile_blocks("eager")
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert given is pipe
        seen.append((index, float(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if index == 3 else {}

    images = sample(pipe, callback_on_step_end=callback)
    assert seen == [(i, t, (2, 4, 8, 8)) for i, t in enumerate([1000.0, 750.0, 500.0, 250.0])]
    assert not images.any()


@pytest.mark.slow
def test_interrupt_between_steps() -> None:
    pipe = pipeline("H1P2R1")
    pipe.compile_blocks("eager")
    expected = sample(pipe)
    states: list[Tensor] = []

    def stop(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        states.append(tensors["latents"])
        given._interrupt = index == 1

    images = sample(pipe, callback_on_step_end=stop)
    assert len(states) == 2 and torch.equal(images, states[1])
    assert torch.equal(sample(pipe), expected)


@pytest.mark.slow
def test_the_run_is_announced() -> None:
    """Whoever watches runs sees `set_timesteps` and a progress bar over the steps."""
    pipe = pipeline("H1P2R1")
    pipe.compile_blocks("eager")
    seen: list[Any] = []
    set_timesteps, progress_bar = pipe.scheduler.set_timesteps, pipe.progress_bar
    pipe.scheduler.set_timesteps = lambda *a, **k: (seen.append("set_timesteps"), set_timesteps(*a, **k))[1]
    pipe.progress_bar = lambda *a, **k: (seen.append(k), progress_bar(*a, **k))[1]
    sample(pipe)
    assert seen == ["set_timesteps", {"total": 4}]


# --- what it refuses

UNSUPPORTED = [
    (FlowRungeKuttaScheduler("rk4"), r"FlowRungeKuttaScheduler \(rk4\)"),
    (FlowRungeKuttaScheduler("midpoint"), r"FlowRungeKuttaScheduler \(midpoint\)"),
    (FlowAdamsBashforthScheduler(), "FlowAdamsBashforthScheduler"),
    (FlowSDEScheduler(), r"FlowSDEScheduler \(euler\)"),
    (None, "FlowMatchEulerDiscreteScheduler"),
]


@pytest.mark.parametrize(("made", "name"), UNSUPPORTED, ids=[name for _, name in UNSUPPORTED])
def test_other_schedulers(made: Any, name: str) -> None:
    pipe = pipeline()
    pipe.scheduler = made or tiny.FlowMatchEulerDiscreteScheduler()
    pipe.compile_blocks("eager")
    message = f"need a FlowTurboScheduler, or a FlowRungeKuttaScheduler .* has a {name}; replace the scheduler, or"
    with counted(pipe.transformer) as rows, pytest.raises(ValueError, match=message):
        sample(pipe, steps=2)
    assert rows == []
    pipe.decompile_blocks()
    assert sample(pipe, steps=2).isfinite().all()


@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_caches_are_refused_because_they_would_see_nothing(first: str) -> None:
    pipe = pipeline()
    if first == "accelerate":
        flowaccel.accelerate(pipe, "ab_cache")
    pipe.compile_blocks("eager")
    if first == "compile":
        flowaccel.accelerate(pipe, "ab_cache")
    with pytest.raises(flowaccel.RecipeConflictError, match="'feature_cache' does not see"):
        sample(pipe)
    flowaccel.restore(pipe)
    assert sample(pipe).isfinite().all()


def test_offloading() -> None:
    pipe = pipeline()
    pipe.compile_blocks("eager")
    pipe.transformer._hf_hook = object()  # what accelerate leaves on a module that it offloads
    with pytest.raises(ValueError, match="compiled blocks do not work with offloading"):
        sample(pipe)
