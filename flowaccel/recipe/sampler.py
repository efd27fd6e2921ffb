"""Replacement of the pipeline's scheduler by a sampler that needs fewer or cheaper steps."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import Pipeline, denoiser, family_of, session_of
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.calibration import GRID_CALIBRATIONS, GridCalibration, watch
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.serialization import component
from flowaccel.samplers import (
    FlowAdamsBashforthScheduler,
    FlowRungeKuttaScheduler,
    FlowSampler,
    FlowSDEScheduler,
    FlowTurboScheduler,
)

# name -> (class, fixed options)
SAMPLERS: dict[str, tuple[type[FlowSampler], dict[str, Any]]] = {
    "flowturbo": (FlowTurboScheduler, {}),
    "euler": (FlowRungeKuttaScheduler, {"solver": "euler"}),
    "heun": (FlowRungeKuttaScheduler, {"solver": "heun"}),
    "midpoint": (FlowRungeKuttaScheduler, {"solver": "midpoint"}),
    "rk4": (FlowRungeKuttaScheduler, {"solver": "rk4"}),
    "ab2": (FlowAdamsBashforthScheduler, {}),
    "sde": (FlowSDEScheduler, {}),
}
FLOW_PREDICTION = "flow_prediction"  # name in diffusers' solvers for several kinds of models
# options of FlowMatch schedulers that these samplers do not support
_UNSUPPORTED = (
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


@dataclass(frozen=True)
class Sampler(Accelerator):
    """Accelerator that replaces the pipeline's scheduler; the time shift of the old one is kept.

    Args:
        sampler: `flowturbo`, `euler`, `heun`, `midpoint`, `rk4`, `ab2` or `sde`.
        options: constructor arguments of that scheduler, for example `{"blocks": "H2P4R2"}`. All but `sde` take
            `{"grid": [1.0, ..., 0.0]}`: the noise levels to step over, taken as they are, whatever the time shift.
        calibration: what a grid was searched on, as `flowaccel calibrate` writes it. On another network, scheduler,
            number of steps or guidance scale it still runs, and warns once per pipeline.

    Raises:
        ValueError: unknown sampler, or options that it refuses.
        TypeError: a calibration of another kind.
    """

    name: ClassVar[str] = "sampler"
    kind = "scheduler"

    sampler: str = "flowturbo"
    options: dict[str, Any] = field(default_factory=dict)
    calibration: GridCalibration | None = component(GRID_CALIBRATIONS, default=None)

    def __post_init__(self) -> None:
        if self.calibration is not None and not isinstance(self.calibration, GridCalibration):
            raise TypeError(f"calibration must be a GridCalibration or None, got {self.calibration!r}")
        if not isinstance(self.sampler, str) or self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {sorted(SAMPLERS)}, got {self.sampler!r}")
        try:
            self._scheduler()
        except TypeError as error:
            raise ValueError(f"options of sampler {self.sampler!r}: {error}") from error

    @property
    def num_inference_steps(self) -> int | None:
        """FlowTurbo's H + P + R, or the number of steps of a grid; None if the sampler takes any number of steps."""
        return self._scheduler().default_num_inference_steps

    @property
    def tags(self) -> frozenset[str]:
        """Tags of every accelerator, and one for whether the sampler has R steps for a refiner."""
        blocks = getattr(self._scheduler(), "blocks", None)
        refines = blocks is not None and blocks.refine > 0
        return super().tags | {Tag.SAMPLER, Tag.R_STEPS if refines else Tag.NO_R_STEPS}

    def _scheduler(self) -> FlowSampler:
        scheduler_class, fixed = SAMPLERS[self.sampler]
        return scheduler_class(**fixed, **self.options)

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace `pipe.scheduler`; undoing puts the old object back."""
        scheduler_class, fixed = SAMPLERS[self.sampler]
        with ExitStack() as undo:
            undo.callback(
                swapped_scheduler(pipe, scheduler_class, f"sampler {self.sampler!r}", **fixed, **self.options)
            )
            if self.calibration is not None:
                undo.callback(watch(session_of(pipe), self.calibration))
            return undo.pop_all().close


def swapped_scheduler(pipe: Pipeline, scheduler_class: type[FlowSampler], what: str, **options: Any) -> Detach:
    """Replace the pipeline's scheduler by a flow sampler with the same time shift; returns a function that undoes it.

    Args:
        pipe: the pipeline.
        scheduler_class: class of the new scheduler.
        what: name of the sampler in errors.
        options: further constructor arguments.

    Raises:
        UnsupportedModelError: the network predicts no velocity, or gets other times than its scheduler's.
        ValueError: the current scheduler has options that these samplers do not support.
    """
    replaced = pipe.scheduler
    prediction = replaced.config.get("prediction_type", FLOW_PREDICTION)
    if prediction != FLOW_PREDICTION and not replaced.config.get("use_flow_sigmas"):
        raise UnsupportedModelError(
            f"{what} works on flow models, whose network predicts a velocity, but the pipeline has a "
            f"{type(replaced).__name__} with prediction_type {prediction!r}"
        )
    unsupported = [name for name in _UNSUPPORTED if replaced.config.get(name)]
    if unsupported:
        raise ValueError(
            f"{what} cannot stand in for a {type(replaced).__name__} that has {', '.join(unsupported)} set"
        )
    if family_of(denoiser(pipe)).own_timesteps:
        raise UnsupportedModelError(
            f"{what} cannot stand in for the scheduler of a {type(pipe).__name__}, which shows its network other "
            "timesteps than its noise levels; it keeps the scheduler that it was made with"
        )
    pipe.scheduler = scheduler_class.from_config(_grid_config(replaced.config), **options)
    return lambda: setattr(pipe, "scheduler", replaced)


_GRID_FIELDS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "time_shift_type",
)


def _grid_config(config: Any) -> dict[str, Any]:
    kept = {name: config[name] for name in _GRID_FIELDS if config.get(name) is not None}
    if config.get("flow_shift") is not None:  # its name in UniPC and DPM-Solver
        kept["shift"] = config["flow_shift"]
    return kept


def sampler_with(sampler: str, **options: Any) -> Sampler:
    """Return a `Sampler` with the options of a preset."""
    return Sampler(sampler, options)
