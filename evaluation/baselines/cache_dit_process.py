"""Process of a `cache-dit` row: makes, counts and times it beside the untouched pipeline; see `subprocess_worker`.

cache-dit patches the class of the pipeline, so it is switched on for one call at a time, in a process that ends with
the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowaccel import SiTTransformer2DModel
from flowaccel.errors import FlowaccelError
from flowaccel.evaluation.baselines.baselines import CACHE_DIT, TRIAL_ERRORS, TRIAL_STEPS, Baseline, unsupported
from flowaccel.evaluation.features.extractors import fingerprint
from flowaccel.evaluation.protocol import Protocol, call, plan_rows, row_manifest, row_store
from flowaccel.evaluation.samples.prompts import load_conditions
from flowaccel.evaluation.samples.store import generate_batches
from flowaccel.evaluation.timing.attention import set_attention
from flowaccel.evaluation.timing.cost import measure_cost
from flowaccel.evaluation.timing.latency import measure_latency
from flowaccel.extras import require
from flowaccel.hooks import Pipeline
from flowaccel.pipelines import load_pipeline

# With these something is reused within the few steps of a trial.
_TRIAL: dict[str, Any] = {
    "residual_diff_threshold": 1e9,
    "max_accumulated_residual_diff_threshold": None,
    "max_warmup_steps": 1,
    "num_inference_steps": None,
    "steps_computation_mask": None,
    "force_refresh_step_hint": None,
}

Say = Callable[..., None]


class _Side:
    """Shared state of the commands."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in job["protocol"].items()
        }
        self.out = Path(job["out"])
        self.protocol = Protocol(conditions=load_conditions(job["conditions"], self.out), **settings)
        self.row = next(row for row in plan_rows((), self.protocol) if row.name == job["baseline"])
        dtype = getattr(torch, job["dtype"])
        self.pipe: Pipeline = load_pipeline(job["pipeline"], torch_dtype=dtype, device=job["device"])
        self.pipe.set_progress_bar_config(disable=True)
        if job["attention"] is not None:
            set_attention(self.pipe, job["attention"])
        self.source = job["pipeline"]
        self.timed_ids = list(range(self.protocol.num_samples))[: self.protocol.latency_batch]

    def check(self, say: Say, manifest: dict[str, Any]) -> None:
        weights = {
            name: fingerprint(part) for name, part in self.pipe.components.items() if isinstance(part, nn.Module)
        }
        own = json.loads(json.dumps(row_manifest(self.pipe, self.protocol, self.row, weights)))
        differing = sorted(key for key in {*own, *manifest} if own.get(key) != manifest.get(key))
        if differing:
            raise ValueError(
                f"baseline {self.row.name} runs in a process of its own, which found another pipeline in {self.source} "
                f"than the one to be evaluated (other {', '.join(differing)}): save that with "
                "pipe.save_pretrained(folder) and evaluate load_pipeline(folder)"
            )
        baseline = self._baseline
        call(self.pipe, self.protocol, [0], min(self.row.steps, TRIAL_STEPS))  # an error in here is not the baseline's
        try:
            with cached(self.pipe, baseline, **_TRIAL):
                call(self.pipe, self.protocol, [0], min(self.row.steps, TRIAL_STEPS))
            with cached(self.pipe, baseline):
                call(self.pipe, self.protocol, [0], self.row.steps)
        except FlowaccelError:
            raise
        except TRIAL_ERRORS as error:
            reason = f"{baseline.package} fails in a trial with {type(error).__name__}: {error}"
            raise unsupported(self.pipe, baseline, reason) from error

    def samples(self, say: Say, batches: list[list[int]]) -> None:
        for made in generate_batches(row_store(self.out, self.row), batches, self._make):
            say(progress=made)

    def cost(self, say: Say) -> dict[str, Any]:
        @contextlib.contextmanager
        def switched() -> Iterator[Callable[[], object]]:
            yield lambda: self._make(self.timed_ids)

        return asdict(measure_cost(self.pipe, len(self.timed_ids), switched, {}))

    def time(self, say: Say) -> dict[str, Any]:
        def once() -> object:
            return call(self.pipe, self.protocol, self.timed_ids, self.row.steps)

        timings = measure_latency(
            {"untouched": once, "row": once},
            rounds=self.protocol.rounds,
            device=self.pipe.device,
            within={"row": lambda: cached(self.pipe, self._baseline)},
        )
        return {name: asdict(timing) for name, timing in timings.items()}

    def _make(self, ids: list[int]) -> torch.Tensor:
        with cached(self.pipe, self._baseline):
            return call(self.pipe, self.protocol, ids, self.row.steps)

    @property
    def _baseline(self) -> Baseline:
        assert self.row.baseline is not None
        return self.row.baseline


@contextlib.contextmanager
def cached(pipe: Pipeline, baseline: Baseline, **settings: Any) -> Iterator[None]:
    """Enable cache-dit's DBCache inside the context, for one call.

    Args:
        pipe: the pipeline.
        baseline: a `cache-dit` one.
        settings: fields of the configuration that override the baseline's options.

    Raises:
        UnsupportedModelError: cache-dit knows neither the pipeline's class nor do we.
    """
    cache_dit = require("cache_dit")
    options = {**baseline.options, **settings}
    order = options.pop("taylorseer_order", None)
    calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
    target = _target(cache_dit, pipe, baseline)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before = [vars(network).get("forward") for network in networks]
    try:
        cache_dit.enable_cache(target, cache_config=cache_dit.DBCacheConfig(**options), calibrator_config=calibrator)
        yield
    finally:
        cache_dit.disable_cache(pipe)
        for network, forward in zip(networks, before, strict=True):
            # It binds what it puts back to the network, which a `forward` of the instance is not made for.
            vars(network).pop("forward", None)
            if forward is not None:
                network.forward = forward


def _target(cache_dit: Any, pipe: Pipeline, baseline: Baseline) -> Any:
    network = getattr(pipe, "transformer", None)
    if isinstance(network, SiTTransformer2DModel):
        return cache_dit.BlockAdapter(
            pipe=pipe,
            transformer=network,
            blocks=network.transformer_blocks,
            blocks_name="transformer_blocks",
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,  # hidden states in, hidden states out
        )
    if cache_dit.BlockAdapterRegister.is_supported(pipe):
        return pipe
    raise unsupported(pipe, baseline, f"{CACHE_DIT} does not support {type(pipe).__name__}")


def main() -> None:
    """Read jobs from stdin and answer on stdout; whatever else is printed goes to stderr, the row's log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    side: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("do")
        try:
            if command == "start":
                side = _Side(request)
                result = None
            else:
                result = getattr(side, command)(say, **request)
        except (FlowaccelError, ValueError, TypeError, OSError, FloatingPointError) as error:
            kind = type(error).__name__ if isinstance(error, (FlowaccelError, FloatingPointError)) else "ValueError"
            say(error=["OSError" if isinstance(error, OSError) else kind, str(error)])
            return
        say(result=result)


if __name__ == "__main__":
    main()
