"""Training loop: accelerate, AdamW, EMA, atomic checkpoints without pickle, exact resume."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowaccel.errors import CheckpointError
from flowaccel.methods.moe.control import set_aux_loss_scale
from flowaccel.training.labelled import LabelledObjective

logger: logging.Logger = logging.getLogger(__name__)

_PARTS = ("parameter", "ema", "exp_avg", "exp_avg_sq")
_PLAIN = (bool, int, float, str, type(None))

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@runtime_checkable
class Scheduled(Protocol):
    """Objective that changes during training."""

    def at(self, step: int) -> Loss:
        """Return the loss function of optimiser step `step` (0-based)."""


@runtime_checkable
class Following(Protocol):
    """Objective with a callback after every optimiser step."""

    def stepped(self, network: nn.Module) -> None:
        """Update the objective after an optimiser step."""


@runtime_checkable
class Keeping(Protocol):
    """Objective with a state of its own, which a resumed run needs."""

    def save(self, folder: Path) -> None:
        """Save the state to a folder of its own."""

    def resume(self, folder: Path) -> None:
        """Load the state that `save` wrote.

        Raises:
            CheckpointError: it is that of another objective, or not there.
        """


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Configuration of the training loop: its length, rates and checkpoints."""

    steps: int
    """Optimiser steps in all; a resumed run continues up to this number."""
    learning_rate: float = 1e-4
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    cosine: bool = False
    """Let the learning rate fall to 0 along a half cosine; otherwise it stays constant."""
    rate_scales: Mapping[str, float] = field(default_factory=dict)
    """Part of a parameter's name -> factor: those parameters learn so much faster."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip_apart: tuple[str, ...] = ()
    """Parts of parameters' names: the gradients of those with each of them are clipped together, apart from the
    rest."""
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
        if self.save_every < 1:
            raise ValueError(f"save_every must be at least 1, got {self.save_every}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}")
        for part, factor in self.rate_scales.items():
            if not 0 <= factor < math.inf:
                raise ValueError(f"rate_scales[{part!r}] must be a finite number of at least 0, got {factor}")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of optimiser step `step` (0-based)."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0
        return self.learning_rate * rise * fall


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Report of one optimiser step."""

    step: int
    loss: float
    learning_rate: float


def train(
    model: nn.Module,
    loss: Loss | Scheduled,
    config: LoopConfig,
    folder: Path,
    also: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
    """Train `model` in place, yielding after every step; at the end the model holds the averaged (EMA) weights.

    Every random number of a step comes from a generator seeded by (seed, step, process), so a run that was killed and
    started again with the same arguments ends with the same weights as one that was not. The state lies in `folder` as
    `state.safetensors` and is replaced atomically every `save_every` steps.

    Args:
        model: the network to train; parameters without gradient stay as they are.
        loss: `loss(model, generator)` -> scalar, drawing all its randomness from the (CPU) generator; or what gives
            such a loss for every step.
        config: see `LoopConfig`.
        folder: folder of the checkpoints; an existing one is resumed.
        also: further plain values that must be the same for a resume, such as those that the model was built with.

    Raises:
        CheckpointError: the folder holds the state of another model, configuration or objective, or a damaged one.
        FloatingPointError: the loss is not finite.
        OSError: the state could not be written; the one before stays.
    """
    # The model stays on the device that the caller chose: its objective may hold other networks there.
    on_cpu = next(model.parameters()).device.type == "cpu"
    accelerator = Accelerator(mixed_precision=config.precision, cpu=on_cpu)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    clipped = _clipped(model, config)
    optimizer = torch.optim.AdamW(_groups(model, config), lr=config.learning_rate, weight_decay=config.weight_decay)
    ema = EMAModel(trainable, decay=config.ema_decay)
    settings = as_saved({**_settings(config), **_objective_settings(loss), **(also or {})})
    start = resume_state(folder, model, optimizer, ema, settings)
    if start and isinstance(loss, Keeping):
        loss.resume(_kept(folder, start))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    ema.to(accelerator.device)
    prepared.train()
    for step in range(start, config.steps):
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, accelerator.process_index))
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at(step) * group["scale"]
        if accelerator.scaler is not None:
            set_aux_loss_scale(model, accelerator.scaler.get_scale())
        with accelerator.autocast():
            value = (loss.at(step) if isinstance(loss, Scheduled) else loss)(prepared, generator)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {step}; lower the learning rate")
        accelerator.backward(value)
        accelerator.unscale_gradients()  # once, however many groups are clipped
        for together in clipped:
            nn.utils.clip_grad_norm_(together, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(loss, Following):
            loss.stepped(model)
        ema.step(trainable)
        done = step + 1
        if accelerator.is_main_process and (done % config.save_every == 0 or done == config.steps):
            if isinstance(loss, Keeping):  # first, so that every state has what belongs to it
                loss.save(_kept(folder, done))
            save_state(folder, model, optimizer, ema, done, settings)
            _forget_others(folder, done)
            if done in config.keep:
                shutil.copyfile(folder / "state.safetensors", folder / f"state-{done}.safetensors")
        yield Progress(step=done, loss=value.item(), learning_rate=config.rate_at(step))
    ema.copy_to(trainable)
    model.eval()


def _kept(folder: Path, step: int) -> Path:
    """Return the folder of an objective's state at a step."""
    return folder / f"objective-{step}"


def _forget_others(folder: Path, step: int) -> None:
    for older in folder.glob("objective-*"):
        if older != _kept(folder, step):
            shutil.rmtree(older)


def _groups(model: nn.Module, config: LoopConfig) -> list[dict[str, Any]]:
    """Return one parameter group per parameter, in the model's order, which is the order of the saved state."""
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = next((factor for part, factor in config.rate_scales.items() if part in name), 1.0)
            groups.append({"params": [parameter], "scale": scale})
    return groups


def _clipped(model: nn.Module, config: LoopConfig) -> list[list[nn.Parameter]]:
    """Return the groups of parameters whose gradients are clipped together: the rest, then those of each part."""
    found: dict[str, list[nn.Parameter]] = {"": [], **{part: [] for part in config.clip_apart}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[next((part for part in config.clip_apart if part in name), "")].append(parameter)
    return [together for together in found.values() if together]


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that training may change, by their names in the saved state."""
    kept = model.state_dict(keep_vars=True).keys()
    return {f"buffer.{name}": value for name, value in model.named_buffers() if name in kept}


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """Return the seed of the generator of one step of one process."""
    return (seed * 1_000_003 + step) * 1_009 + process


def as_saved(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as they come back from the state's header: sequences are lists there."""
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def _settings(config: LoopConfig) -> dict[str, Any]:
    """Return the settings that must agree for a resume.

    That is all but the length and the saving interval (a cosine's length matters).
    """
    free = {"save_every", "keep"} if config.cosine else {"save_every", "keep", "steps"}
    return {key: value for key, value in asdict(config).items() if key not in free}


def _objective_settings(loss: Loss | Scheduled) -> dict[str, Any]:
    """Return the settings of an objective that must agree for a resume.

    These are the plain values among its fields, and sequences of them, where it is a dataclass.
    """
    own: dict[str, Any] = (
        {entry.name: getattr(loss, entry.name) for entry in fields(loss)} if is_dataclass(loss) else {}
    )
    found: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, LabelledObjective):
            found |= _objective_settings(value)
        elif all(isinstance(v, _PLAIN) for v in (value if isinstance(value, tuple) else (value,))):
            found[f"objective.{name}"] = value
    return found


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    step: int,
    settings: dict[str, Any],
) -> None:
    """Write `state.safetensors` atomically: trainable parameters, their averages and moments, saved buffers.

    Raises:
        OSError: it could not be written; the one before stays.
    """
    tensors: dict[str, Tensor] = _buffers(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = optimizer.state_dict()["state"]
    for index, (parameter, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
        tensors[f"{index}.parameter"] = parameter.detach()
        tensors[f"{index}.ema"] = shadow
        for part in ("exp_avg", "exp_avg_sq"):  # absent where a parameter never had a gradient
            tensors[f"{index}.{part}"] = state.get(index, {}).get(part, torch.zeros_like(parameter))
    meta = {"step": step, "ema_steps": ema.optimization_step, "config": settings}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".state.{os.getpid()}.tmp"
    plain = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(plain, temporary, {"state": json.dumps(meta)})
        os.replace(temporary, folder / "state.safetensors")
    except SafetensorError as error:  # what a full disk becomes
        raise OSError(f"cannot write {folder / 'state.safetensors'}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_average(model: nn.Module, path: Path) -> None:
    """Load the averaged weights of a saved training state into `model` (the one that was trained, or a copy of it)."""
    tensors = load_file(path)
    with torch.no_grad():
        for index, parameter in enumerate(parameter for parameter in model.parameters() if parameter.requires_grad):
            parameter.copy_(tensors[f"{index}.ema"])
        for name, buffer in _buffers(model).items():
            buffer.copy_(tensors[name])


def resume_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    settings: dict[str, Any],
) -> int:
    """Load the state in `folder` if there is one, and return the number of steps already made.

    Args:
        folder: folder that `save_state` wrote to.
        model: gets parameters and buffers; likewise `optimizer` and `ema`, which are of its trainable parameters.
        optimizer: AdamW with one group per parameter.
        ema: the averages.
        settings: settings that must be as they were saved, see `as_saved`.

    Raises:
        CheckpointError: the state of another model or with other settings, or a damaged one.
    """
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    meta, tensors = _read(path)
    there = meta["config"]
    changed = {key: (there[key], value) for key, value in settings.items() if key in there and there[key] != value}
    if changed:
        raise CheckpointError(f"{folder} holds a run with other settings (there, now): {changed}; use another --out")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = _buffers(model)
    wanted = {f"{index}.{part}": value.shape for index, value in enumerate(parameters) for part in _PARTS}
    wanted |= {name: value.shape for name, value in buffers.items()}
    if {name: value.shape for name, value in tensors.items()} != wanted:
        raise CheckpointError(f"{folder} holds a run of another network; use another --out")
    with torch.no_grad():
        for index, (parameter, shadow) in enumerate(zip(parameters, ema.shadow_params, strict=True)):
            parameter.copy_(tensors[f"{index}.parameter"])
            shadow.copy_(tensors[f"{index}.ema"])
        for name, buffer in buffers.items():
            buffer.copy_(tensors[name])
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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["state"])
        return {"step": meta["step"], "ema_steps": meta["ema_steps"], "config": dict(meta["config"])}, load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no training state ({type(error).__name__}: {error}); delete it to start again"
        ) from error
