"""Costs of a run besides time: multiply-adds, network calls and rows, memory, and seconds per stage.

Everything is counted on the run itself, so whatever an accelerator really leaves out is really not counted.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowaccel.evaluation.timing.latency import Clock, synchronize
from flowaccel.hooks import Pipeline

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Count 2 flops per multiply-add of Q K^T and P V.

    Shapes are (B, H, Lq, D), (B, H or fewer, Lk, D), (B, .., Lk, Dv).

    Masked and causal pairs count as if they were computed, as torch's own formulas do for the GPU kernels.
    """
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


def _grouped_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Count 2 flops per multiply-add of products by group.

    Shapes are (P, K) and (E, K, N), or (K, P) and (P, N) for gradients: every row of the left goes through one group's
    matrix.
    """
    return 2 * left[0] * left[1] * right[-1]


def count_macs(fn: Callable[[], object]) -> int:
    """Run `fn` once and return its multiply-adds in matrix products, convolutions and attention.

    torch counts 2 flops per multiply-add; papers disagree on the factor 2, so the unit here is the multiply-add.
    torch has no formulas for attention on the CPU and for grouped matrix products, and would count them as 0; ours are
    passed to this one counter and not registered, so other users of the counter see no change. Elementwise work counts
    as 0, and so do kernels that torch's dispatcher does not see (custom operators, graphs already compiled): count the
    eager model.

    Source: torch.utils.flop_counter; the missing formula is pytorch#195460.
    """
    aten = torch.ops.aten
    missing: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    if hasattr(aten, "_grouped_mm"):  # torch 2.8
        missing[aten._grouped_mm] = _grouped_flops
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    with counter:
        fn()
    return counter.get_total_flops() // 2


class CallCounter:
    """Counter of forward passes and rows of named modules.

    Use it as `with CallCounter({"network": transformer}) as counter: ...`.

    A row is one entry of the leading dimension of the first tensor argument, positional ones first, then keywords in
    the order of the call; a list of tensors counts its length. Entering starts from zero; the counts stay readable
    after the block. The wrappers are removed on exit, also after an exception.

    It counts what reaches `module.forward` as it was on entry. So enter it *before* a pipeline is accelerated: calls
    that an accelerator answers without the network (from a cache, by a refiner) then do not count.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        self._wrappers = ExitStack()
        self.calls: dict[str, int] = {}
        """Number of forward passes by name."""
        self.rows: dict[str, int] = {}
        """Sum of the leading dimensions by name."""

    def __enter__(self) -> CallCounter:
        self.calls = dict.fromkeys(self._modules, 0)
        self.rows = dict.fromkeys(self._modules, 0)
        for name, module in self._modules.items():
            self._wrappers.enter_context(replaced_method(module, "forward", functools.partial(self._counted, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._wrappers.close()

    def _counted(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        self.rows[name] += _leading_rows(name, (*args, *kwargs.values()))
        return forward(*args, **kwargs)


def _leading_rows(name: str, arguments: Sequence[Any]) -> int:
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dim() > 0:
            return argument.shape[0]
        if isinstance(argument, (list, tuple)) and argument and all(isinstance(item, Tensor) for item in argument):
            return len(argument)
    raise ValueError(
        f"module {name!r} was called without a tensor (or list of tensors) that has a leading dimension, "
        "so its rows cannot be counted: count a module that takes the batch as an argument"
    )


def reset_peak_memory(device: torch.device | str) -> None:
    """Reset the peak memory of a CUDA device; on others the maximum cannot be reset and nothing happens."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_mb(device: torch.device | str) -> float | None:
    """Return the peak memory in MB (10^6 bytes), or None where the platform cannot tell.

    CUDA: the most that torch had allocated since `reset_peak_memory`. Others: the largest resident size of the whole
    process *since it started*, so only the first thing a process runs has a number of its own; compare rows by running
    each in a fresh process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextmanager
def timed_stages(
    stages: Mapping[str, tuple[object, str]],
    *,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Time named methods inside the context, in seconds: `{"decode": (pipe.vae, "decode")}`.

    The entry "total" is the whole block.

    The methods are replaced on the *instances* and put back on exit, also after an exception. For a module the method
    is "forward". The dictionary is filled as the calls happen, and "total" when the block ends. Every call waits for
    the device at both ends, which slows a GPU down: measure stages in a run of their own, not in the timed rounds.

    Raises:
        ValueError: a stage is called "total", or its object has no such method.
    """
    device = torch.device(device)
    if "total" in stages:
        raise ValueError('stages has a stage "total", which is the time of the whole block: choose another name')
    for stage, (owner, method) in stages.items():
        if not callable(getattr(owner, method, None)):
            raise ValueError(f"stage {stage!r}: {type(owner).__name__} has no method {method!r}; name one it has")
    seconds = dict.fromkeys(stages, 0.0)
    with ExitStack() as stack:
        for stage, (owner, method) in stages.items():
            stack.enter_context(_timed_method(owner, method, stage, seconds, device, clock))
        synchronize(device)
        start = clock()
        try:
            yield seconds
        finally:
            synchronize(device)
            seconds["total"] = clock() - start


@contextmanager
def _timed_method(
    owner: object, method: str, stage: str, seconds: dict[str, float], device: torch.device, clock: Clock
) -> Iterator[None]:
    def timed(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        start = clock()
        try:
            return original(*args, **kwargs)
        finally:
            synchronize(device)
            seconds[stage] += clock() - start

    with replaced_method(owner, method, timed):
        yield


@contextmanager
def replaced_method(owner: object, method: str, interceptor: Callable[..., Any]) -> Iterator[None]:
    """Replace `owner.method(...)` by `interceptor(original, ...)` inside the context, on this instance only."""
    original = getattr(owner, method)
    had_own = method in vars(owner)  # an instance that was already wrapped by someone else gets that wrapper back

    @functools.wraps(original)  # diffusers reads the signatures of the methods it calls
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return interceptor(original, *args, **kwargs)

    setattr(owner, method, replacement)
    try:
        yield
    finally:
        if had_own:
            setattr(owner, method, original)
        else:
            delattr(owner, method)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one pipeline call of a row; per image, except for the first and the last two."""

    evaluations: int
    """Evaluations of the scheduler."""
    network_rows: float
    refiner_rows: float
    macs: float
    stages: dict[str, float]
    """Seconds of the call."""
    peak_memory_mb: float | None
    """Peak memory in MB; None where the device cannot tell."""


def measure_cost(
    pipe: Pipeline,
    images: int,
    switched: Callable[[], AbstractContextManager[Callable[[], object]]],
    extra: Mapping[str, nn.Module],
    stand_ins: Sequence[nn.Module] = (),
) -> Cost:
    """Count two separate calls, outside of any timed rounds.

    Args:
        pipe: the pipeline.
        images: number of images that a call makes.
        switched: context that enables the row; it yields a function that makes the call.
        extra: small networks that stand in.
        stand_ins: networks that the row puts in the place of the pipeline's own.
    """
    own = {f"network {place}": module for place, module in enumerate((denoiser(pipe), *stand_ins))}
    with CallCounter(own) as inner, switched() as make:
        with CallCounter(extra) as small:
            macs = count_macs(make) / images
        evaluations = len(pipe.scheduler.timesteps)
        reset_peak_memory(pipe.device)
        with timed_stages(_stages(pipe), device=pipe.device) as stages:
            make()
        peak = peak_memory_mb(pipe.device) if pipe.device.type == "cuda" else None
    return Cost(
        evaluations=evaluations,
        network_rows=sum(inner.rows.values()) / images / 2,  # counted over the two calls above
        refiner_rows=sum(small.rows.values()) / images,
        macs=macs,
        stages=dict(stages),
        peak_memory_mb=peak,
    )


def denoiser(pipe: Pipeline) -> Any:
    """Return the network that a pipeline calls at its steps."""
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def _stages(pipe: Pipeline) -> dict[str, tuple[object, str]]:
    found = {"network": (denoiser(pipe), "forward")}
    if getattr(pipe, "vae", None) is not None:
        found["decode"] = (pipe.vae, "decode")
    encoders = [
        name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None) is not None
    ]
    return found | {name: (getattr(pipe, name), "forward") for name in encoders}
