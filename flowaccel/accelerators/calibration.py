"""What the numbers of a cache were fitted on, and the warning where it is used on something else."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from flowaccel.hooks import Call, Identity, Session, denoiser


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `flowaccel calibrate` fitted a cache on, and how well that went.

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
        target_speedup: asked for: network calls over computed network calls.
        predicted_speedup: the same, found by replaying the recorded signals.
        measured_speedup: the same, counted in a run with the cache.
        rel_l2: mean relative L2 error of that run's images against the untouched ones.
        r_squared: part of the variance that the fit explains, at most 1; None where nothing is fitted.
        fitted_range: least and largest value that the fit saw.
        model: the name of the pipeline.

    Raises:
        ValueError: fewer than 1 step.
    """

    name: ClassVar[str] = "calibration"

    method: str
    network: str
    network_config: str
    scheduler: str
    scheduler_config: str
    steps: int
    conditions: int
    images: int
    target_speedup: float
    predicted_speedup: float
    guidance_scale: float | None = None
    measured_speedup: float | None = None
    rel_l2: float | None = None
    r_squared: float | None = None
    fitted_range: tuple[float, float] | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {self.steps!r}")

    def fits_network(self, network: Identity) -> bool:
        """Whether it was made on such a network."""
        return network == Identity(self.network, self.network_config)

    def differences(self, network: Identity, scheduler: Identity, steps: int) -> list[str]:
        """What differs from a run, in words; empty where it was made for this."""
        pairs: list[tuple[str, Any, Any]] = [
            ("network", Identity(self.network, self.network_config), network),
            ("scheduler", Identity(self.scheduler, self.scheduler_config), scheduler),
            ("number of evaluations", self.steps, steps),
        ]
        return [f"{what} is {found}, not {made_for}" for what, made_for, found in pairs if made_for != found]


CALIBRATIONS: dict[str, type[Calibration]] = {Calibration.name: Calibration}


def watch(session: Session, calibration: Calibration) -> Callable[[], None]:
    """Warn once per pipeline where a run differs from what the calibration was made on; returns what undoes it."""

    def around(proceed: Callable[..., Any], call: Call) -> Any:
        if call.step == 0:
            pipe = session.pipe
            found = calibration.differences(*identities(pipe), call.run.num_steps)
            if found:
                command = calibrate_command(pipe, call, calibration.method)
                warn_once(
                    pipe,
                    calibration,
                    f"the cache was calibrated for something else: the {'; the '.join(found)}. It runs, but neither "
                    f"its speed-up nor its quality is what it was there. Calibrate it with: {command}",
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
