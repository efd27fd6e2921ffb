"""What a cache or a step grid was fitted on, and the warning where it is used on something else."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from flowaccel.hooks import Call, Identity, Session, denoiser


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What something was fitted on: the run that it belongs to. Subclasses add how well that went.

    Args:
        method: such as `teacache`.
        network: class of the network.
        network_config: hash of its configuration (`flowaccel.hooks.Identity`).
        scheduler: class of the scheduler.
        scheduler_config: hash of its configuration.
        steps: network evaluations of a run, at least 1; guidance does not count twice.
        guidance_scale: that of the runs; None where the pipeline has none.
        conditions: how many different prompts or classes were used.
        images: how many images were made.
        model: the name of the pipeline.

    Raises:
        ValueError: fewer than 1 step.
    """

    what: ClassVar[str]
    """What was fitted, for messages."""

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
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")

    def fits_network(self, network: Identity) -> bool:
        """Whether it was made on such a network."""
        return network == Identity(self.network, self.network_config)

    def differences(
        self, network: Identity, scheduler: Identity, steps: int, guidance_scale: float | None = None
    ) -> list[str]:
        """What differs from a run, in words; empty where it was made for this. Guidance counts where both are known."""
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
    """What `flowaccel calibrate` fitted a cache on, and how well that went.

    Args:
        method, network, network_config, scheduler, scheduler_config, steps, guidance_scale, conditions, images, model:
            as in `Fitted`.
        target_speedup: asked for: network calls over computed network calls.
        predicted_speedup: the same, found by replaying the recorded signals.
        measured_speedup: the same, counted in a run with the cache.
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
    """What `flowaccel calibrate` searched a step grid on, and what it does on held-out images.

    Args:
        method: `boss` or `oss`.
        network, network_config, scheduler, scheduler_config, steps, guidance_scale, conditions, model: as in `Fitted`;
            the scheduler is the one that runs the grid.
        images: how many images the search saw.
        fine_steps: steps of the run that the grid was searched in.
        metric: what the search compared, `state` or `x0`.
        held_out: how many other images the errors are means over.
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
    """Warn once per pipeline where a run differs from what the calibration was made on; returns what undoes it."""

    def around(proceed: Callable[..., Any], call: Call) -> Any:
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
        return proceed()

    return session.on_call(around)


def identities(pipe: Any) -> tuple[Identity, Identity]:
    """Those of the pipeline's network and scheduler."""
    return Identity.of(denoiser(pipe)), Identity.of(pipe.scheduler)


def calibrate_command(pipe: Any, call: Call, method: str) -> str:
    """What to type to calibrate a method for such a run."""
    # A solver of higher order makes more evaluations than the steps that it is asked for.
    steps = getattr(pipe.scheduler, "num_inference_steps", None) or call.run.num_steps
    return f"flowaccel calibrate PIPE --method {method} --steps {steps}"


_WARNED: weakref.WeakKeyDictionary[Any, set[Hashable]] = weakref.WeakKeyDictionary()


def warn_once(pipe: Any, key: Hashable, message: str) -> None:
    """A UserWarning, but for the first time only with this pipeline and key."""
    said = _WARNED.setdefault(pipe, set())
    if key not in said:
        said.add(key)
        warnings.warn(message, UserWarning, stacklevel=2)
