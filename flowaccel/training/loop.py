"""The one training loop: accelerate, AdamW, EMA, atomic checkpoints without pickle, exact resume."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowaccel.errors import CheckpointError

logger = logging.getLogger(__name__)

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how fast to train."""

    steps: int
    """Optimiser steps in all; a resumed run continues up to this number."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    cosine: bool = False
    """Let the learning rate fall to 0 along a half cosine; otherwise it stays constant."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is saved and used; ramped up from 0 at the start."""
    precision: str = "no"
    """`no` (float32), `bf16` or `fp16`: accelerate's mixed precision."""
    save_every: int = 500
    keep: tuple[int, ...] = ()
    """Steps whose state is kept as `state-STEP.safetensors` besides the latest one (multiples of `save_every`)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}")

    def rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based)."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0
        return self.learning_rate * rise * fall


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a step reports."""

    step: int
    loss: float
    learning_rate: float


def train(model: nn.Module, loss: Loss, config: LoopConfig, folder: Path) -> Iterator[Progress]:
    """Train `model` in place, yielding after every step; at the end the model holds the averaged (EMA) weights.

    Every random number of a step comes from a generator seeded by (seed, step, process), so a run that was killed and
    started again with the same arguments ends with the same weights as one that was not. The state lies in `folder` as
    `state.safetensors` and `state.json` and is replaced atomically every `save_every` steps.

    Args:
        model: the network to train; parameters without gradient stay as they are.
        loss: `loss(model, generator)` -> scalar, drawing all its randomness from the (CPU) generator.
        config: see `LoopConfig`.
        folder: where the checkpoints go; an existing one is resumed.

    Raises:
        CheckpointError: the folder holds the state of another model or configuration.
        FloatingPointError: the loss is not finite.
    """
    accelerator = Accelerator(mixed_precision=config.precision)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(trainable, decay=config.ema_decay)
    start = _resume(folder, trainable, optimizer, ema, config)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)
    prepared.train()
    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(_step_seed(config.seed, step, accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step)
        with accelerator.autocast():
            value = loss(prepared, generator)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {step}; lower the learning rate")
        accelerator.backward(value)
        accelerator.clip_grad_norm_(trainable, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(trainable)
        done = step + 1
        if accelerator.is_main_process and (done % config.save_every == 0 or done == config.steps):
            _save(folder, trainable, optimizer, ema, done, config)
        yield Progress(step=done, loss=value.item(), learning_rate=config.rate_at(step))
    ema.copy_to(trainable)
    model.eval()


def _step_seed(seed: int, step: int, process: int) -> int:
    return (seed * 1_000_003 + step) * 1_009 + process


def _fingerprint(config: LoopConfig) -> dict:
    """What must agree for a resume: all but the length and the saving interval (a cosine's length matters)."""
    free = {"save_every", "keep"} if config.cosine else {"save_every", "keep", "steps"}
    return {key: value for key, value in asdict(config).items() if key not in free}


def _save(
    folder: Path,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    step: int,
    config: LoopConfig,
) -> None:
    tensors: dict[str, Tensor] = {}
    state = optimizer.state_dict()["state"]
    for index, (parameter, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        tensors[f"{index}.parameter"] = parameter.detach()
        tensors[f"{index}.ema"] = shadow
        tensors[f"{index}.exp_avg"] = state[index]["exp_avg"]
        tensors[f"{index}.exp_avg_sq"] = state[index]["exp_avg_sq"]
    meta = {"step": step, "ema_steps": ema.optimization_step, "config": _fingerprint(config)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".state.{os.getpid()}.tmp"
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, {"state": json.dumps(meta)}
    )
    os.replace(temporary, folder / "state.safetensors")
    if step in config.keep:
        shutil.copyfile(folder / "state.safetensors", folder / f"state-{step}.safetensors")


def load_average(model: nn.Module, path: Path) -> None:
    """Put the averaged weights of a saved training state into `model` (the one that was trained, or its twin)."""
    tensors = load_file(path)
    with torch.no_grad():
        for index, parameter in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.copy_(tensors[f"{index}.ema"])


def _resume(
    folder: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel, config: LoopConfig
) -> int:
    """Load the state in `folder` if there is one; the number of steps already done."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["state"])
    if meta["config"] != _fingerprint(config):
        changed = {key: (meta["config"].get(key), value) for key, value in _fingerprint(config).items()}
        changed = {key: pair for key, pair in changed.items() if pair[0] != pair[1]}
        raise CheckpointError(f"{folder} holds a run with other settings (there, now): {changed}; use another --out")
    tensors = load_file(path)
    if len(tensors) != 4 * len(parameters):
        raise CheckpointError(f"{folder} holds a run of another network; use another --out")
    with torch.no_grad():
        for index, (parameter, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
            parameter.copy_(tensors[f"{index}.parameter"])
            shadow.copy_(tensors[f"{index}.ema"])
    adam = {
        index: {
            "step": torch.tensor(float(meta["step"])),
            "exp_avg": tensors[f"{index}.exp_avg"],
            "exp_avg_sq": tensors[f"{index}.exp_avg_sq"],
        }
        for index in range(len(parameters))
    }
    optimizer.load_state_dict({"state": adam, "param_groups": optimizer.state_dict()["param_groups"]})
    ema.optimization_step = meta["ema_steps"]
    logger.info("resumed %s at step %d", folder, meta["step"])
    return int(meta["step"])
