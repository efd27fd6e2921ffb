"""Baselines, the accelerators of other libraries as rows of an evaluation: their names, and diffusers' own caches.

`native:fbc`, `native:taylorseer` and `native:mag` are diffusers' `enable_cache`, and `cache-dit` is the package of that
name, which runs in a process of its own (`subprocess_worker`). They are measured as they are, with their defects.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from flowaccel.checks import is_number, is_whole
from flowaccel.errors import MissingExtraError, UnsupportedModelError, did_you_mean
from flowaccel.evaluation.timing.cost import replaced_method
from flowaccel.hooks import Pipeline
from flowaccel.recipe.grammar import parse_options, parse_value, separate

NATIVE, CACHE_DIT = "native", "cache-dit"
TRIAL_STEPS = 4
"""Steps of the call that shows, before any sample is made, whether a baseline works with a network."""
TRIAL_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
"""Errors that other libraries raise on networks that they do not know."""
_CALIBRATION_IMAGES = 8

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "integer": (is_whole, "an integer"),
    "number": (is_number, "a finite number"),
    "switch": (lambda value: isinstance(value, bool), "true or false"),
    "text": (lambda value: isinstance(value, str), "text"),
    "dtype": (lambda value: value in _DTYPES, "float32, float16 or bfloat16"),
}
_SEVERAL = {"integers": "integer", "numbers": "number", "texts": "text"}

# The fields of the libraries' own configurations, but for those that follow from the run: MagCache's number of steps
# and calibration mode.
OPTIONS: dict[str, dict[str, str]] = {
    "native:fbc": {"threshold": "number"},
    "native:taylorseer": {
        "cache_interval": "integer",
        "disable_cache_before_step": "integer",
        "disable_cache_after_step": "integer",
        "max_order": "integer",
        "taylor_factors_dtype": "dtype",
        "skip_predict_identifiers": "texts",
        "cache_identifiers": "texts",
        "use_lite_mode": "switch",
    },
    "native:mag": {
        "threshold": "number",
        "max_skip_steps": "integer",
        "retention_ratio": "number",
        "mag_ratios": "numbers",
    },
    CACHE_DIT: {
        "Fn_compute_blocks": "integer",
        "Bn_compute_blocks": "integer",
        "residual_diff_threshold": "number",
        "max_accumulated_residual_diff_threshold": "number",
        "max_warmup_steps": "integer",
        "warmup_interval": "integer",
        "max_cached_steps": "integer",
        "max_continuous_cached_steps": "integer",
        "enable_separate_cfg": "switch",
        "cfg_compute_first": "switch",
        "cfg_diff_compute_separate": "switch",
        "num_inference_steps": "integer",
        "steps_computation_mask": "integers",
        "steps_computation_policy": "text",
        "force_refresh_step_hint": "integer",
        "force_refresh_step_policy": "text",
        "taylorseer_order": "integer",
    },
}
"""Baseline -> option -> kind of value."""

_CONFIGS = {
    "native:fbc": diffusers.FirstBlockCacheConfig,
    "native:taylorseer": diffusers.TaylorSeerCacheConfig,
    "native:mag": diffusers.MagCacheConfig,
}

# Under these settings a cache reuses something within the few steps of a trial.
_TRIAL: dict[str, dict[str, Any]] = {
    "native:fbc": {"threshold": math.inf},
    "native:taylorseer": {"disable_cache_before_step": 1, "disable_cache_after_step": None},
    "native:mag": {"threshold": math.inf, "retention_ratio": 0.0, "mag_ratios": [1.0]},
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Accelerator of another library with its options; created by `parse_baseline`."""

    name: str
    """Name as given, which is also the name of its row."""
    method: str
    """Key of `OPTIONS`."""
    options: dict[str, Any]
    """Options as the library takes them."""

    @property
    def family(self) -> str:
        """Family of the baseline, `native` or `cache-dit`."""
        return self.method.partition(":")[0]

    @property
    def package(self) -> str:
        """Library and its installed version, such as `"diffusers 0.42.1"`.

        Raises:
            MissingExtraError: it is not installed.
        """
        library = "diffusers" if self.family == NATIVE else CACHE_DIT
        try:
            return f"{library} {version(library)}"
        except PackageNotFoundError as error:
            raise MissingExtraError(
                f"baseline {self.name} needs {library}, which is not installed; it comes with: "
                f"pip install 'flowaccel[{library}]'"
            ) from error

    @property
    def by_batch(self) -> bool:
        """Whether it decides for the whole batch by its content, so that images depend on their batch."""
        return self.method in ("native:fbc", CACHE_DIT)

    @property
    def calibrates(self) -> bool:
        """Whether it must be calibrated before it is used."""
        return self.method == "native:mag"

    def describe(self) -> dict[str, Any]:
        """Return what its samples depend on, JSON-serialisable: the options as they were typed."""
        typed = (part.partition("=") for part in separate(self.name[len(self.method) + 1 :]) if part)
        options = {key.strip(): value.strip() or "true" for key, _, value in typed}
        return {"name": self.method, "options": options, "package": self.package}


def parse_baseline(text: str) -> Baseline:
    """Parse a baseline: a name of `OPTIONS`, and then, after a colon, its options as those of a recipe.

    `native:fbc:threshold=0.1`, `cache-dit:Fn_compute_blocks=1,taylorseer_order=1`. Lists are in brackets, or separated
    by `/`.

    Raises:
        ValueError: an unknown name or option, or a value of another kind; the message says what is allowed.
    """
    method = next((name for name in OPTIONS if text == name or text.startswith(f"{name}:")), None)
    if method is None:
        known = ", ".join(OPTIONS)
        hint = did_you_mean(":".join(text.split(":")[:2]), OPTIONS)
        raise ValueError(
            f"unknown baseline {text!r}: {hint}there are {known}, with options as in native:fbc:threshold=0.1"
        )
    try:
        given = parse_options(method, text[len(method) + 1 :])
    except ValueError as error:
        raise ValueError(f"baseline {text!r}: {error}; options of {method} are {', '.join(OPTIONS[method])}") from error
    options = {}
    for key, value in given.items():
        if key not in OPTIONS[method]:
            allowed = f"options of {method} are {', '.join(OPTIONS[method])}"
            raise ValueError(f"baseline {text!r}: unknown option {key!r}; {allowed}")
        options[key] = _of_kind(OPTIONS[method][key], value, f"baseline {text!r}: {key}")
    return Baseline(name=text, method=method, options=options)


def _of_kind(kind: str, value: Any, what: str) -> Any:
    """Return the value as the library takes it, or raise a ValueError that begins with `what`."""
    if kind in _SEVERAL:
        parts = [parse_value(part) for part in value.split("/")] if isinstance(value, str) else value
        fits, expected = _KINDS[_SEVERAL[kind]]
        parts = parts if isinstance(parts, list) else [parts]
        if all(fits(part) for part in parts):
            return parts
        raise ValueError(f"{what} must be {expected.split()[-1]}s separated by /, got {value!r}")
    if kind == "switch" and value in ("True", "False"):
        return value == "True"
    fits, expected = _KINDS[kind]
    if not fits(value):
        raise ValueError(f"{what} must be {expected}, got {value!r}")
    return _DTYPES[value] if kind == "dtype" else value


# -- diffusers' own caches


@contextlib.contextmanager
def native(pipe: Pipeline, baseline: Baseline, **settings: Any) -> Iterator[None]:
    """Enable diffusers' cache inside the context, with fresh state; afterwards every module has its old attributes.

    Args:
        pipe: the pipeline.
        baseline: one of the `native` ones.
        settings: fields of the configuration beside the baseline's options, which they override.

    Raises:
        UnsupportedModelError: the network has no caches, or nothing in it can be cached.
    """
    networks = _networks(pipe)
    for network in networks:
        _check_cacheable(network, baseline)
    before = {module: frozenset(vars(module)) for network in networks for module in network.modules()}
    with ExitStack() as stack:
        stack.callback(_tidy, before)
        for network in networks:
            stack.callback(_disable, network)
            network.enable_cache(_CONFIGS[baseline.method](**{**baseline.options, **settings}))
        if not any("forward" in vars(module) and "forward" not in known for module, known in before.items()):
            raise unsupported(pipe, baseline, f"{baseline.package} found nothing in it to cache")
        stack.enter_context(_cache_contexts(pipe, networks))
        yield


def calibrated(pipe: Pipeline, baseline: Baseline, make: Callable[[list[int]], object]) -> dict[str, Any]:
    """Return the settings that MagCache needs for the run: the number of network calls per branch, and ratios.

    The magnitude ratios, unless the baseline has them, come from diffusers' calibration mode and one call for sample
    ids 0 to 7.

    With split guidance diffusers prints ratios for each branch; the first ones, those of the conditional branch, are
    taken for both, as its configuration has room for one list only.

    Args:
        pipe: the pipeline.
        baseline: `native:mag`.
        make: samples ids at the row's number of steps.
    """
    ids = list(range(_CALIBRATION_IMAGES))
    steps = _steps_of(pipe, lambda: make(ids[:1]))
    if "mag_ratios" in baseline.options:
        return {"num_inference_steps": steps}
    printed = io.StringIO()
    # What that mode prints is its only output.
    with contextlib.redirect_stdout(printed), native(pipe, baseline, calibrate=True, num_inference_steps=steps):
        make(ids)
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    if not lists:
        raise unsupported(pipe, baseline, f"the calibration of {baseline.package} gave no ratios in {steps} steps")
    return {"num_inference_steps": steps, "mag_ratios": json.loads(lists[0])}


def calibrated_to(path: Path) -> dict[str, Any]:
    """Load the settings that `calibrated` returned in an earlier call, from the file in which they were stored.

    Raises:
        ValueError: the file holds something else; its numbers alone reach the other library.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps, ratios = found["num_inference_steps"], found.get("mag_ratios", [])
        numbers = [value for value in (steps, *ratios) if isinstance(value, (int, float)) and math.isfinite(value)]
        if set(found) - {"num_inference_steps", "mag_ratios"} or len(numbers) != 1 + len(ratios):
            raise ValueError(f"it holds {str(found)[:80]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no calibration of native:mag ({error}); delete it and run again") from error
    return found


def check_native(pipe: Pipeline, baseline: Baseline, make: Callable[[int], object], steps: int) -> None:
    """Check the baseline on one short call, in which it must reuse something.

    Args:
        pipe: the pipeline.
        baseline: a native one.
        make: samples something at so many steps; it must work without the baseline.
        steps: number of steps of the row.

    Raises:
        UnsupportedModelError: it does not work; the message has diffusers' reason.
    """
    for network in _networks(pipe):
        _check_cacheable(network, baseline)
    few = min(steps, TRIAL_STEPS)
    calls = _steps_of(pipe, lambda: make(few))
    settings = dict(_TRIAL[baseline.method])
    if baseline.method == "native:mag":
        settings["num_inference_steps"] = calls
    try:
        with native(pipe, baseline, **settings):
            make(few)
    except UnsupportedModelError:
        raise
    except TRIAL_ERRORS as error:
        reason = f"{baseline.package} fails in a trial of {few} steps with {type(error).__name__}: {error}"
        raise unsupported(pipe, baseline, reason) from error


def unsupported(pipe: Pipeline, baseline: Baseline, reason: str) -> UnsupportedModelError:
    """Return the error for a network that the baseline does not work with."""
    network = type(_networks(pipe)[0]).__name__
    return UnsupportedModelError(f"baseline {baseline.name} does not work with {network}: {reason}; leave it out")


def _networks(pipe: Pipeline) -> list[Any]:
    names = ("transformer", "transformer_2") if getattr(pipe, "transformer", None) is not None else ("unet",)
    return [part for name in names if isinstance(part := getattr(pipe, name, None), nn.Module)]


def _check_cacheable(network: Any, baseline: Baseline) -> None:
    kind = type(network).__name__
    if not hasattr(network, "enable_cache"):
        raise UnsupportedModelError(
            f"baseline {baseline.name} does not work with {kind}: {baseline.package} has no caches for it (it has no "
            "enable_cache); leave it out"
        )
    if network.is_cache_enabled:
        raise ValueError(f"the {kind} has a cache of diffusers switched on already; call disable_cache() on it first")


def _disable(network: Any) -> None:
    if network.is_cache_enabled:
        network.disable_cache()


def _tidy(before: Mapping[nn.Module, frozenset[str]]) -> None:
    """Remove what `disable_cache` leaves: empty registries, and `forward` as an attribute of the instance."""
    for module, known in before.items():
        for name in vars(module).keys() - known:
            delattr(module, name)


@contextlib.contextmanager
def _cache_contexts(pipe: Pipeline, networks: list[Any]) -> Iterator[None]:
    """Open a cache context around every network call whose pipeline opens none, one for each branch.

    The branch is the number of the call since the scheduler's last step: 0 for batched guidance, 0 and 1 for split.
    """
    calls, depth = 0, 0

    @contextlib.contextmanager
    def opened(cache_context: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            with cache_context(*args, **kwargs):
                yield
        finally:
            depth -= 1

    def stepped(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls = 0
        return step(*args, **kwargs)

    def called(network: Any) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            context: AbstractContextManager[Any] = contextlib.nullcontext()
            if not depth:
                context = network.cache_context(f"call {calls}")
            calls += 1
            with context:
                return original(*args, **kwargs)

        return forward

    with ExitStack() as stack:
        stack.enter_context(replaced_method(pipe.scheduler, "step", stepped))
        for network in networks:
            stack.enter_context(replaced_method(network, "cache_context", opened))
            stack.enter_context(replaced_method(network, "forward", called(network)))
        yield


def _steps_of(pipe: Pipeline, run: Callable[[], object]) -> int:
    """Return how often `run` calls the scheduler's `step`, which is the number of network calls per branch."""
    steps = 0

    def counted(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*args, **kwargs)

    with replaced_method(pipe.scheduler, "step", counted):
        run()
    return steps
