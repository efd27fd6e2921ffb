"""Result file `results.json`: its keys, and reading and writing it without losing or inventing numbers.

The classes below are the schema and the checker at once: `check_results` walks them. Keys of the `...Base` classes
are required; keys that do not apply are absent, never null. Keys that are not listed are kept and not checked.
"""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from flowaccel.errors import did_you_mean

SCHEMA_VERSION = 1
"""Goes up when a key changes its meaning or a required key is added; files of another version are refused."""


class LatencyBase(TypedDict):
    """Required keys of `Latency`."""

    median: float
    p10: float
    p90: float
    rounds: int  # timed rounds, each the mean of two calls


class Latency(LatencyBase, total=False):
    """Latency of one whole pipeline call divided by its batch, in milliseconds per image, over interleaved rounds."""

    # Round i of all rows was measured together, so any two rows can be compared. For a row with `own_process` it is
    # the untouched pipeline's round i, divided by the speed-up in round i of that process.
    per_round: list[float]


class WallClock(TypedDict):
    """Ratio of seconds and its interval."""

    value: float  # untouched seconds / seconds of this row, median of per-round ratios; above 1 is faster
    ci95: list[float]  # [low, high], bootstrap over rounds


class SpeedupBase(TypedDict):
    """Required keys of `Speedup`."""

    wall_clock: WallClock


class Speedup(SpeedupBase, total=False):
    """Speed-up over the untouched pipeline."""

    macs: float  # untouched multiply-adds / multiply-adds of this row


class Versus(TypedDict):
    """Paired difference of a metric to another row."""

    difference: float  # this row minus the other row, the same sample ids on both sides
    ci95: list[float]  # [low, high], sample ids resampled jointly


class MetricEntryBase(TypedDict):
    """Required keys of `MetricEntry`."""

    value: float | None  # None: undefined, for example the PSNR of images that are all identical
    n: int  # samples it rests on
    stderr: float | None  # bootstrap standard error; None with an undefined value
    ci95: list[float] | None  # value -+ 1.96 stderr
    higher_is_better: bool
    display: str  # the honest name, with feature network and n


class MetricEntry(MetricEntryBase, total=False):
    """Metric of one row."""

    features: str  # feature network and its fingerprint
    reference: str  # what the samples are compared with
    identical_fraction: float  # psnr only: share of images equal to the untouched ones, left out of the mean
    attributes: dict[str, float]  # attribute_accuracy only: share of right ones by attribute, where it is stated
    versus: dict[str, Versus]  # paired differences by the name of the other row; claims rest on these


class OwnProcessEntry(TypedDict):
    """Timings in the process of a row that needs its own, in milliseconds per image."""

    untouched_per_round: list[float]  # the untouched pipeline there
    per_round: list[float]  # the row, interleaved with it


class RowEntryBase(TypedDict):
    """Required keys of `RowEntry`."""

    recipe: str  # the name of the row, unique in the file
    num_inference_steps: int
    nfe: float  # guided evaluations of the base network per image, the count of the papers
    latency_ms_per_image: Latency
    speedup: Speedup
    metrics: dict[str, MetricEntry]  # by short fixed name; metrics that were not asked for are absent


class RowEntry(RowEntryBase, total=False):
    """Recipe at one number of steps."""

    family: str  # rows of one family share a colour and a line in the plot
    network_rows: float  # rows of the base network really computed, per image: guidance counts two, cached none
    refiner_rows: float  # the same for the small network that stands in
    macs_per_image: float  # multiply-adds counted on the run
    stages: dict[str, float]  # seconds of one call by stage, "total" among them
    first_call_s: float  # seconds of the first call, with compilation and autotuning
    peak_memory_mb: float  # 10^6 bytes; on the CPU the maximum of the process so far
    baseline: dict[str, Any]  # of another library's accelerator: its name, package, options and what was calibrated
    own_process: OwnProcessEntry  # only of rows timed apart; latency_ms_per_image is then carried over, see `remark`
    remark: str  # what a reader has to know about how this row was measured
    throttled: bool  # the machine became slower while timing: trust the ratios, not the milliseconds
    pareto: bool  # no other row is both faster and better


class ProtocolEntryBase(TypedDict):
    """Required keys of `ProtocolEntry`."""

    dataset: str  # prompts or classes the samples are made for
    num_samples: int
    seed: int
    batch_size: int


class ProtocolEntry(ProtocolEntryBase, total=False):
    """Protocol of the run: what was compared, and how."""

    steps: int  # of the untouched pipeline
    guidance_scale: float
    arguments: dict[str, Any]  # further arguments of every pipeline call
    reference: str  # reference images or statistics
    feature_extractor: str
    fingerprint: str  # of the feature extractor: weights, resizing, normalisation, dtype
    clip: str  # network of clip_score
    clip_fingerprint: str
    attributes: str  # what reads for attribute_accuracy what prompts state
    metrics: list[str]
    rounds: int  # timed rounds
    resamples: int  # of the bootstrap
    conditions: dict[str, Any]  # what identifies the classes or prompts
    baselines: list[str]  # accelerators of other libraries


class Results(TypedDict):
    """Content of `results.json`."""

    schema: int  # SCHEMA_VERSION of the writer
    protocol: ProtocolEntry
    environment: dict[str, Any]  # see environment.environment
    # The first is the untouched pipeline, then come the same with fewer steps ("baseline@N"), the baselines of other
    # libraries and the recipes.
    rows: list[RowEntry]


def save_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Check the results and write them as JSON, all or nothing: a killed run leaves the old file or the new one.

    Raises:
        ValueError: a key is missing or of the wrong type, or a number is NaN or infinite; the message has its path.
        OSError: the file cannot be written. Failure to save is never swallowed.
    """
    check_results(results)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_results(path: str | os.PathLike[str]) -> Results:
    """Read and check a result file; a folder stands for the `results.json` in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, of another schema version, or lacks a key.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"no result file at {path}: give the results.json (or its folder) of an evaluation")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what a file that is not UTF-8 raises
        raise ValueError(f"{path} is not JSON ({error}): give the results.json of an evaluation") from error
    check_results(results, source=str(path))
    return cast(Results, results)


def check_results(results: Any, *, source: str = "results") -> None:
    """Raise a ValueError, naming the key path, unless `results` is a complete result of this schema version."""
    if not isinstance(results, dict) or "schema" not in results:
        raise ValueError(f"{source} has no key 'schema': it is not a flowaccel result")
    version = results["schema"]
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        remedy = "update flowaccel to read it" if newer else "evaluate again with this flowaccel"
        raise ValueError(f"{source} has schema {version!r}, this flowaccel reads schema {SCHEMA_VERSION}: {remedy}")
    for problem in (*_shape_problems(results, Results, ""), *_leaf_problems(results, "")):
        raise ValueError(f"{source}: {problem}")
    names = [entry["recipe"] for entry in results["rows"]]
    if not names:
        raise ValueError(f"{source}: rows is empty; row one must be the untouched pipeline")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{source}: row names must be unique, got more than once: {', '.join(repeated)}")


def row(results: Results, name: str) -> RowEntry:
    """Return the row called `name`; a ValueError lists the rows there are and the nearest match."""
    rows = {entry["recipe"]: entry for entry in results["rows"]}
    if name in rows:
        return rows[name]
    raise ValueError(f"no row called {name!r}: {did_you_mean(name, rows)}rows are {', '.join(rows)}")


def _shape_problems(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Yield the places where `value` does not have the shape of the annotation `kind`."""
    if get_origin(kind) is types.UnionType:  # only "X | None" occurs
        if value is None:
            return
        kind = get_args(kind)[0]
    label = path or "the file"
    if is_typeddict(kind):
        if not isinstance(value, dict):
            yield f"{label} must be an object, got {type(value).__name__}"
            return
        for key, inner in get_type_hints(kind).items():
            here = f"{path}.{key}" if path else key
            if key in value:
                yield from _shape_problems(value[key], inner, here)
            elif key in kind.__required_keys__:
                yield f"{here} is missing"
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            yield f"{label} must be an object, got {type(value).__name__}"
            return
        for key, item in value.items():
            yield from _shape_problems(item, get_args(kind)[1], f"{path}.{key}")
    elif get_origin(kind) is list:
        if not isinstance(value, (list, tuple)):
            yield f"{label} must be a list, got {type(value).__name__}"
            return
        if path.endswith(".ci95") and len(value) != 2:
            yield f"{label} must be [low, high], got {len(value)} values"
        for index, item in enumerate(value):
            yield from _shape_problems(item, get_args(kind)[0], f"{path}[{index}]")
    elif kind is not Any and not _is_scalar(value, kind):
        yield f"{label} must be {kind.__name__}, got {value!r}"


def _is_scalar(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # a bool is an int in Python, but not in a result file
        return kind is bool
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def _leaf_problems(value: Any, path: str) -> Iterator[str]:
    """Yield the values that JSON cannot hold, wherever they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaf_problems(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaf_problems(item, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{path} is {value}, which JSON cannot hold: leave out what was not measured, and mend what made it"
    elif not isinstance(value, (str, int, float, type(None))):
        yield f"{path} is a {type(value).__name__}, which JSON cannot hold: convert it to a plain number or string"
