"""Calibration records of caches and step grids, and the warning if they are used on something else."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from flowaccel.checks import check_whole
from flowaccel.hooks import Call, Identity, Pipeline, Session, denoiser


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Base class of calibration records: the run that something was fitted on. Subclasses add how good the fit is.

    Args:
        method: the method, such as `teacache`.
        network: class of the network.
        network_config: hash of its configuration (`flowaccel.hooks.Identity`).
        scheduler: class of the scheduler.
        scheduler_config: hash of its configuration.
        steps: network evaluations of a run, at least 1; guidance does not count twice.
        guidance_scale: guidance scale of the runs; None if the pipeline has none.
        conditions: number of different prompts or classes.
        images: number of images.
        model: the name of the pipeline.

    Raises:
        ValueError: fewer than 1 step.
    """

    what: ClassVar[str]
    """Name of what was fitted, for messages."""

    method: str
    network: str
    network_config: str
    scheduler: str
    scheduler_config: str
    steps: int
    conditions: int
    images: int
    guidance_scale: float | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        check_whole(self, steps=1)

    def fits_network(self, network: Identity) -> bool:
        """Return whether the fit was made on this network."""
        return network == Identity(self.network, self.network_config)

    def differences(
        self, network: Identity, scheduler: Identity, steps: int, guidance_scale: float | None = None
    ) -> list[str]:
        """Return the differences to a run, in words; the guidance scale counts if it is known of both."""
        pairs: list[tuple[str, Any, Any]] = [
            ("network", Identity(self.network, self.network_config), network),
            ("scheduler", Identity(self.scheduler, self.scheduler_config), scheduler),
            ("number of evaluations", self.steps, steps),
        ]
        if guidance_scale is not None and self.guidance_scale is not None:
            pairs.append(("guidance scale", self.guidance_scale, guidance_scale))
        return [f"{what} is {found}, not {made_for}" for what, made_for, found in pairs if made_for != found]


@dataclass(frozen=True, kw_only=True)
class Calibration(Fitted):
    """Record of the runs that `flowaccel calibrate` fitted a cache on, and of the quality of the fit.

    Args:
        method, network, network_config, scheduler, scheduler_config, steps, guidance_scale, conditions, images, model:
            as in `Fitted`.
        target_speedup: requested speed-up: network calls over computed network calls.
        predicted_speedup: speed-up predicted by replaying the recorded signals.
        measured_speedup: speed-up counted in a run with the cache.
        rel_l2: mean relative L2 error of that run's images against the untouched ones.
        r_squared: part of the variance that the fit explains, at most 1; None where nothing is fitted.
        fitted_range: least and largest value that the fit saw.

    Raises:
        ValueError: fewer than 1 step.
    """

    name: ClassVar[str] = "calibration"
    what: ClassVar[str] = "cache"

    target_speedup: float
    predicted_speedup: float
    measured_speedup: float | None = None
    rel_l2: float | None = None
    r_squared: float | None = None
    fitted_range: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class GridCalibration(Fitted):
    """Record of the runs that `flowaccel calibrate` searched a step grid on, and of its error on held-out images.

    Args:
        method: `boss` or `oss`.
        network, network_config, scheduler, scheduler_config, steps, guidance_scale, conditions, model: as in `Fitted`;
            the scheduler is the one that runs the grid.
        images: number of images in the search.
        fine_steps: steps of the run that the grid was searched in.
        metric: quantity that the search compared, `state` or `x0`.
        held_out: number of other images that the errors are averaged over.
        rel_l2: mean relative L2 error of images of the searched grid against those of the fine run.
        default_rel_l2: the same for the pipeline's own grid of as many steps.
        difference_ci95: 95% interval of the mean paired difference of the two, searched less default; None for a
            single image.

    Raises:
        ValueError: fewer than 1 step.
    """

    name: ClassVar[str] = "grid_calibration"
    what: ClassVar[str] = "step grid"

    fine_steps: int
    metric: str
    held_out: int
    rel_l2: float
    default_rel_l2: float
    difference_ci95: tuple[float, float] | None = None


CALIBRATIONS: dict[str, type[Calibration]] = {Calibration.name: Calibration}
GRID_CALIBRATIONS: dict[str, type[GridCalibration]] = {GridCalibration.name: GridCalibration}


def watch(session: Session, calibration: Fitted) -> Callable[[], None]:
    """Warn once per pipeline if a run differs from the calibration's; returns a function that undoes it."""

    def interceptor(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 0:
            pipe = session.pipe
            guidance_scale = getattr(pipe, "guidance_scale", None)
            found = calibration.differences(*identities(pipe), call.run.num_steps, guidance_scale)
            if found:
                command = calibrate_command(pipe, call, calibration.method)
                warn_once(
                    pipe,
                    calibration,
                    f"the {calibration.what} was calibrated for something else: the {'; the '.join(found)}. It runs, "
                    "but neither what it saves nor its quality is what it was there. Calibrate it with: "
                    f"{command}",
                )
        return call_next()

    return session.on_call(interceptor)


def identities(pipe: Pipeline) -> tuple[Identity, Identity]:
    """Return the identities of the pipeline's network and scheduler."""
    return Identity.of(denoiser(pipe)), Identity.of(pipe.scheduler)


def calibrate_command(pipe: Pipeline, call: Call, method: str) -> str:
    """Return the command that calibrates a method for this run."""
    # A solver of higher order makes more evaluations than steps.
    steps = getattr(pipe.scheduler, "num_inference_steps", None) or call.run.num_steps
    return f"flowaccel calibrate PIPE --method {method} --steps {steps}"


_WARNED: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()


def warn_once(pipe: Pipeline, key: Hashable, message: str) -> None:
    """Issue a UserWarning, once per pipeline and key."""
    said = _WARNED.setdefault(pipe, set())
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=2)
