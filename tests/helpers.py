"""What the tests of networks, samplers and pipelines share: golden data, a small SiT and its pipeline, all samplers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from flowaccel import SiTTransformer2DModel
from flowaccel.samplers import (
    FlowAdamsBashforthScheduler,
    FlowRungeKuttaScheduler,
    FlowSampler,
    FlowSDEScheduler,
    FlowTurboScheduler,
)

GOLDEN = Path(__file__).parent / "data" / "golden"

# --- golden data: weights, inputs and outputs of the official code


@dataclass(frozen=True)
class Golden:
    """One file: its tensors by key (shared by all tests: do not write to them), and what its header says."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    notes: dict[str, Any]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix`, named by the rest of their key: for weights, an official state dict."""
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def network(self, prefix: str = "sd/", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
        """The SiT whose official weights lie below `prefix`."""
        heads = self.config["num_heads"]
        network = SiTTransformer2DModel.from_official(self.group(prefix), num_attention_heads=heads, **overrides)
        return network.to(dtype=dtype) if dtype != torch.float32 else network


@functools.cache
def golden(name: str) -> Golden:
    """The file `name`.safetensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Golden(tensors, json.loads(header["config"]), json.loads(header["notes"]))


class RecordedTimes(nn.Module):
    """The sinusoidal features of time (n,) -> (n, 256) with the rounding of the machine that made the golden files.

    The official code computes them in float32 also where all else is float64, and the last bit of exp, sin and cos is
    up to the processor: at t = 1 they are good to 1e-7, at t = 999 to 1e-4.
    """

    def forward(self, timesteps: Tensor) -> Tensor:
        """As `diffusers.models.embeddings.Timesteps`, for the times of the golden files alone."""
        file = golden("time_features")
        places = (timesteps.float()[:, None] == file["t"]).long()
        assert places.sum(1).eq(1).all(), f"no features are recorded for {timesteps.tolist()}"
        return file["features"][places.argmax(1)]


def with_recorded_times(network: Any) -> Any:
    """The network itself, which from here on takes the recorded features: float64 on all the way around them."""
    network.time_proj = RecordedTimes()
    return network


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, relative: float | None = None) -> None:
    """Same shape, and differences up to tolerance + relative * |expected|; `relative` is `tolerance` by default."""
    relative = tolerance if relative is None else relative
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=relative)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """The number of rows of every call of `module.forward`; an accelerator attached inside is counted around."""
    rows: list[int] = []
    original = module.forward

    @functools.wraps(original)
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(hidden_states.shape[0])
        return original(hidden_states, *args, **kwargs)

    module.forward = forward
    try:
        yield rows
    finally:
        del module.forward


# --- samplers

# name -> (scheduler for so many steps, order of convergence or None)
ALL_SAMPLERS: dict[str, tuple[Callable[..., FlowSampler], int | None]] = {
    "euler": (lambda steps, **grid: FlowRungeKuttaScheduler("euler", **grid), 1),
    "heun": (lambda steps, **grid: FlowRungeKuttaScheduler("heun", **grid), 2),
    "midpoint": (lambda steps, **grid: FlowRungeKuttaScheduler("midpoint", **grid), 2),
    "rk4": (lambda steps, **grid: FlowRungeKuttaScheduler("rk4", **grid), 4),
    "ab2": (lambda steps, **grid: FlowAdamsBashforthScheduler(**grid), 2),
    "flowturbo-h": (lambda steps, **grid: FlowTurboScheduler(f"H{steps}", **grid), 2),
    "flowturbo-p": (lambda steps, **grid: FlowTurboScheduler(f"P{steps}", **grid), 2),
    "flowturbo-hp": (lambda steps, **grid: FlowTurboScheduler(f"H{steps // 2}P{steps - steps // 2}", **grid), 2),
    "flowturbo-hpr": (lambda steps, **grid: FlowTurboScheduler(f"H1P{steps - 2}R1", **grid), None),
    "sde-euler": (lambda steps, **grid: FlowSDEScheduler("euler"), None),
    "sde-heun": (lambda steps, **grid: FlowSDEScheduler("heun"), None),
}

Velocity = Callable[[Tensor, float], Tensor]


def walk(
    scheduler: FlowSampler, velocity: Velocity, sample: Tensor, *, begin: int = 0, **step_options: Any
) -> list[Tensor]:
    """Run `scheduler` from evaluation `begin` to its end; what every call of `step` returned.

    `velocity(sample, sigma)` is noise - data and gets sigma in full precision (`timesteps` are float32).
    """
    samples = []
    for evaluation, timestep in list(zip(scheduler.evaluations, scheduler.timesteps, strict=True))[begin:]:
        output = velocity(sample, evaluation.sigma)
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step_options)[0]
        samples.append(sample)
    return samples
