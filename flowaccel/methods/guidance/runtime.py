"""Guidance at a network call: the images that are guided, the rows that run, and the substitute for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flowaccel.caching.decisions import NEAR
from flowaccel.caching.history import History, PartialHistory
from flowaccel.caching.predictors import Predictor
from flowaccel.caching.runtime import CallNext, not_run, require_tensor
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import COMPUTED, COND, EXTRA, UNCOND, Call, CallRecord, Session, packer, require_rows
from flowaccel.methods.guidance.when import AdaptiveGuidance, When
from flowaccel.recipe.calibration import warn_once
from flowaccel.recipe.sampler import FLOW_PREDICTION

SAME = 0.02
"""Part of the largest value by which outputs may differ for being computed in another batch, in half precision."""
REFINED = "refined"
UNGUIDED, PARTLY, LEFT_OUT = "unguided", "partly guided", "left out"
"""Entries of a report: a call for the conditional rows alone, for some unconditional rows, and one not made."""


@dataclass(kw_only=True)
class Conditional:
    """Conditional call of a step, where guidance makes two calls."""

    step: int
    output: Any
    record: CallRecord


@dataclass(kw_only=True)
class GuidanceState:
    """State that is kept during one run."""

    stopped: list[bool]
    """Whether guidance ended, per image."""
    differences: History | None
    """Differences of the conditional and unconditional outputs, a row per image; None where they are not needed."""
    measured: Tensor | None = None
    """(images,) cosines of the last step, on the device, until the host reads them."""
    measured_images: list[int] = field(default_factory=list)
    """Images that the cosines belong to."""
    conditional: Conditional | None = None
    saw_guidance: bool = False


class Guiding:
    """Guidance skipping on a session.

    Args:
        when: who is guided.
        predictor: forecasts the difference of the two outputs where it is not computed; None takes it for 0.
        session: the session.
    """

    def __init__(self, when: When, predictor: Predictor | None, session: Session) -> None:
        self._when, self._predictor, self._session = when, predictor, session
        self._alone: dict[Any, bool] = {}  # whether parts of a batch can run, for networks without a rule

    def attach(self) -> Callable[[], None]:
        """Wrap the network's calls, and return a function that undoes it."""
        return self._session.on_call(self._intercept_call)

    def _intercept_call(self, call_next: CallNext, call: Call) -> Any:
        if EXTRA in call.branches:
            return call_next()
        require_tensor(call, "guidance skip")
        state = call.run.state.setdefault(self, self._fresh_state(call))
        guided = self._guided(state, call)
        if UNCOND not in call.branches:
            return self._conditional(call_next, call, state)
        state.saw_guidance = True
        output = self._guided_call(call_next, call, state, guided)
        if state.differences is not None:
            call.record.cache_bytes += state.differences.bytes
        return output

    def _fresh_state(self, call: Call) -> GuidanceState:
        differences = None if self._predictor is None else History(self._predictor)
        return GuidanceState(stopped=[False] * call.images, differences=differences)

    # -- who is guided

    def _guided(self, state: GuidanceState, call: Call) -> tuple[bool, ...]:
        """Return per image whether it is guided at this step."""
        if not isinstance(self._when, AdaptiveGuidance):
            return (self._when.guides(call.step, call.run.num_steps),) * call.images
        if state.measured is not None:
            threshold, cosines = self._when.threshold, state.measured.tolist()
            call.record.host_reads += 1
            for image in state.measured_images:
                state.stopped[image] = cosines[image] >= threshold
                call.record.near_ties += abs(cosines[image] - threshold) < NEAR * (1 - threshold)
            state.measured = None
        return tuple(not stopped for stopped in state.stopped)

    def _learn(self, call: Call, state: GuidanceState, images: list[int], cond: Tensor, uncond: Tensor) -> None:
        """Record the network's outputs for both branches of these images; both outputs are (images, ...)."""
        if not images:
            return
        if state.differences is not None:
            chosen = torch.tensor(images, device=cond.device)
            now = PartialHistory(state.differences, images, call.images)
            now.store(((cond - uncond)[chosen],), call.timestep)
        if isinstance(self._when, AdaptiveGuidance) and self._when.compares(call.step, call.run.num_steps):
            state.measured_images = images
            state.measured = cosine_similarity(self._compared(call, cond), self._compared(call, uncond))

    def _compared(self, call: Call, output: Tensor) -> Tensor:
        """Return the values (images, n), float32, whose cosine is taken, from outputs (images, ...)."""
        assert isinstance(self._when, AdaptiveGuidance)
        sample = call.sample[call.rows_of(call.branches[0])]  # the same for both branches
        if output.dim() == sample.dim() and output.shape[1] == 2 * sample.shape[1]:
            output = output[:, : sample.shape[1]]  # without the variance, which is not guided
        if self._when.space == "x0":
            output = clean_sample(self._session.pipe.scheduler.config, call, sample, output)
        return output.flatten(1).float()

    # -- what runs

    def _conditional(self, call_next: CallNext, call: Call, state: GuidanceState) -> Any:
        """Make the conditional call where guidance makes two; it is never skipped."""
        if call.step and not state.saw_guidance:
            warn_once(
                self._session.pipe,
                UNGUIDED,
                "guidance_skip can save nothing in this run: the pipeline calls its network without classifier-free "
                "guidance; give a guidance scale above 1 (true_cfg_scale and a negative prompt for FLUX), or leave it "
                "off",
            )
        output = call_next()
        state.conditional = Conditional(step=call.step, output=output, record=call.record)
        return output

    def _guided_call(self, call_next: CallNext, call: Call, state: GuidanceState, guided: tuple[bool, ...]) -> Any:
        """Make a call with unconditional rows, without those of images that are not guided."""
        split, first = state.conditional if COND not in call.branches else None, call.rows_of(UNCOND).start
        if COND not in call.branches and (split is None or split.step != call.step):
            return call_next()  # there is no conditional output to stand in
        if not all(guided) and not self._may_leave_out(call):
            guided = (True,) * call.images
        call.record.guided = guided
        unguided = [image for image, on in enumerate(guided) if not on]
        left_out = [first + image for image in unguided]
        output = split.output if split and len(left_out) == call.rows else self._run(call_next, call, left_out)
        found = _only(call, output)
        cond = _only(call, split.output) if split else found[call.rows_of(COND)]
        records = [split.record, call.record] if split else [call.record]
        refined = any(record.what == REFINED for record in records)
        self._learn(call, state, _computed(records, guided), cond, found[call.rows_of(UNCOND)])
        if not unguided:
            return output
        _account(call, left_out, refined)
        images = torch.tensor(unguided, device=found.device)
        stand_in = self._stand_in(state, call, cond, refined)[images]
        return packer(output)((found.index_copy(0, first + images, stand_in),))

    def _may_leave_out(self, call: Call) -> bool:
        """Whether the unconditional rows are known for certain and the others run without them.

        Where this is not certain, guidance stays as it is.
        """
        if not call.ordered:
            if call.run.ordered is not None:
                self._warn_idle(
                    call,
                    "the first guided step did not show which output is the conditional one (or that it is the last)",
                )
            return False
        if COND not in call.branches or call.gathers:
            return True
        shapes = {name: value.shape for name, value in call.arguments.items() if isinstance(value, Tensor)}
        key = (call.network, tuple(shapes.items()))
        if key not in self._alone:
            self._alone[key] = _runs_alone(call, call.rows_of(COND))
        if not self._alone[key]:
            self._warn_idle(call, "its conditional rows alone do not give what they give in the whole batch")
        return self._alone[key]

    def _warn_idle(self, call: Call, why: str) -> None:
        warn_once(
            self._session.pipe,
            LEFT_OUT,
            f"guidance_skip changes and saves nothing with this {type(call.module).__name__}, because {why}. Register "
            "the family (docs/hooks.md), or leave it off",
        )

    def _run(self, call_next: CallNext, call: Call, left_out: Sequence[int]) -> Any:
        """Return the network's output for all rows; those in `left_out` are undefined."""
        if not left_out:
            return call_next()
        kept = torch.tensor(sorted(set(range(call.rows)) - set(left_out)))
        output = call_next(call.narrowed(kept))
        part = _only(call.narrowed(kept), output)
        full = part.new_zeros(call.rows, *part.shape[1:]).index_copy(0, kept.to(part.device), part)
        return packer(output)((full,))

    def _stand_in(self, state: GuidanceState, call: Call, cond: Tensor, refined: bool) -> Tensor:
        """Return (images, ...) for the unconditional output: the conditional one less the forecast difference.

        A refiner adds offsets to velocities that are guided already, so there the difference is left out.
        """
        if state.differences is None or state.differences.empty or refined:
            return cond
        (difference,) = state.differences.predict(call.timestep)
        return cond if difference is None else cond - difference


def _only(call: Call, output: Any) -> Tensor:
    """Return the only tensor (rows, ...) of a network's output."""
    tensors = require_rows(call, output, "guidance skip")
    if len(tensors) > 1:
        raise UnsupportedModelError(
            f"{type(call.module).__name__} returns {len(tensors)} outputs, and guidance skip stands in for one alone; "
            "leave it off for this pipeline"
        )
    return tensors[0]


def _runs_alone(call: Call, chosen: slice) -> bool:
    """Whether the network gives the same output for some rows alone as in the whole batch, tried here and now."""
    rows = torch.arange(call.rows)[chosen]
    whole = _only(call, call.forward(**call.arguments))[chosen]
    try:
        alone = _only(call.narrowed(rows), call.forward(**call.narrowed(rows).arguments))
    except (RuntimeError, ValueError, IndexError):  # shapes that do not fit each other any more
        return False
    if alone.shape != whole.shape:
        return False
    close = SAME * float(whole.abs().max())
    return float((alone - whole).abs().max()) <= close


def _computed(records: Sequence[CallRecord], guided: Sequence[bool]) -> list[int]:
    """Return the guided images whose outputs the network computed, rather than a cache or a refiner."""
    by_network = [record.computed or (record.what == COMPUTED,) * len(guided) for record in records]
    return [image for image, flags in enumerate(zip(guided, *by_network, strict=True)) if all(flags)]


def _account(call: Call, left_out: Sequence[int], refined: bool) -> None:
    """Add the rows that were not run to the report."""
    record, all_rows = call.record, len(left_out) == call.rows
    if not refined:  # what a refiner leaves out is not the network's
        not_run(record, "", len(left_out))
    if all_rows:
        record.what = LEFT_OUT
    elif record.what == COMPUTED:
        record.what = PARTLY if any(record.guided) else UNGUIDED


def clean_sample(config: Any, call: Call, sample: Tensor, output: Tensor) -> Tensor:
    """Return the clean sample that the network predicts, up to a positive factor.

    Args:
        config: the scheduler's, which says what the network predicts.
        call: the network call.
        sample: (rows, ...) its input; for models of noise, with the signal scaled to variance at most 1 (x_t of DDPM).
        output: (rows, ...) its output.

    Raises:
        UnsupportedModelError: input and output have different shapes, as in inpainting models.
    """
    if sample.shape != output.shape:
        raise UnsupportedModelError(
            f"space='x0' needs a network that predicts something of its input's shape, but {type(call.module).__name__}"
            f" makes {tuple(output.shape)} of {tuple(sample.shape)}; use space='v'"
        )
    sample, output, sigma = sample.float(), output.float(), call.sigma
    kind = config.get("prediction_type", FLOW_PREDICTION)
    if kind == FLOW_PREDICTION or config.get("use_flow_sigmas"):
        return sample - sigma * call.family.velocity_sign * output
    if kind == "epsilon":  # alpha = 1 / (1 + sigma^2)
        return sample - sigma / (1 + sigma**2) ** 0.5 * output
    return sample - sigma * output if kind == "v_prediction" else output
