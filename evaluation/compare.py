"""Paired differences between any two rows of a finished run, from its stored samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowaccel.errors import UnnamedCodeError
from flowaccel.evaluation.candidates import BASELINE
from flowaccel.evaluation.features.extractors import load_features, load_reference, runs_code
from flowaccel.evaluation.metrics.attribute_accuracy import load_attributes
from flowaccel.evaluation.metrics.table import difference, find_metric
from flowaccel.evaluation.results import Results, load_results, row
from flowaccel.evaluation.runner import row_samples
from flowaccel.evaluation.samples.prompts import Conditions, Prompts, load_conditions
from flowaccel.evaluation.samples.store import SampleStore, folder_name
from flowaccel.evaluation.timing.latency import Timing

_NEEDED = ("feature_extractor", "fingerprint", "reference", "metrics", "conditions", "resamples")
_MOST_RESAMPLES = 100_000


def compare_rows(
    run: str | Path, a: str, b: str, *, features: str | None = None, clip: str | None = None
) -> dict[str, Any]:
    """Return the paired difference a - b of every metric of a run.

    Args:
        run: the run folder that `evaluate` wrote.
        a, b: names of two rows.
        features, clip: the networks of the run once more. Needed where loading one runs code (`module:attribute`,
            `inception:PATH`): a result file may come from anybody, and must not choose what is run.

    Returns:
        `{"a", "b", "metrics": {NAME: {"difference", "ci95", "stderr", "not_worse"}}, "wall_clock": {"ratio",
        "ci95"}}`; metrics that compare with the untouched row are left out where one of the two is that row.
        `not_worse`: the upper end of the difference is at most 5% of b's value. `ratio`: seconds of a / seconds of b,
        median over rounds, below 1 where a is faster; `wall_clock` is absent where the file does not hold the rounds.

    Raises:
        FileNotFoundError: no result file there.
        UnnamedCodeError: the file asks for code that the caller has not named; nothing was imported.
        ValueError: unknown row, `features` or `clip` is not that of the run, or the network is no longer the one that
            the run used.
    """
    run = Path(run)
    results = load_results(run)
    protocol: Any = results["protocol"]
    _check_protocol(run, protocol)
    for name in (a, b):
        row(results, name)
    stored = {"features": protocol["feature_extractor"]} | ({"clip": protocol["clip"]} if "clip" in protocol else {})
    _check_named(run, stored, {"features": features, "clip": clip})
    network = load_features(stored["features"], expected=protocol["fingerprint"])
    judge = load_features(stored["clip"], expected=protocol["clip_fingerprint"]) if "clip" in stored else None
    attributes = None
    if "attribute_accuracy" in protocol["metrics"]:
        attributes = load_attributes(protocol["attributes"], network)
    conditions = _conditions(run, results, reads_prompts=judge is not None or attributes is not None)
    ids = range(protocol["num_samples"])
    samples = {
        name: row_samples(_store(run, name), name, ids, conditions, network, judge, attributes)
        for name in {a, b, BASELINE}
    }
    reference = load_reference(protocol["reference"], network)
    compared = {
        metric: difference(
            samples[a],
            samples[b],
            metric,
            reference,
            paired_against=samples[BASELINE],
            seed=protocol["seed"],
            resamples=protocol["resamples"],
        )
        for metric in protocol["metrics"]
        if find_metric(metric).against != "baseline" or BASELINE not in (a, b)
    }
    found = {"a": a, "b": b, "metrics": compared}
    if all("per_round" in row(results, name)["latency_ms_per_image"] for name in (a, b)):
        ratio = _timing(results, a).ratio_to(_timing(results, b))
        found["wall_clock"] = {"ratio": ratio.value, "ci95": list(ratio.ci95)}
    return found


def _timing(results: Results, name: str) -> Timing:
    found = row(results, name)
    return Timing(seconds=tuple(found["latency_ms_per_image"]["per_round"]), first_call_s=found["first_call_s"])


def _check_protocol(run: Path, protocol: dict[str, Any]) -> None:
    """Raise a ValueError unless the result file says how the run was measured."""
    needed = (*_NEEDED, *(["clip_fingerprint"] if "clip" in protocol else []))
    missing = [key for key in needed if key not in protocol]
    if missing:
        raise ValueError(
            f"the results in {run} do not say how they were measured: protocol has no {', '.join(missing)}; evaluate "
            "again with this flowaccel"
        )
    if not 1 <= protocol["resamples"] <= _MOST_RESAMPLES:
        raise ValueError(
            f"the results in {run} ask for {protocol['resamples']} resamples; protocol.resamples must lie in "
            f"1 .. {_MOST_RESAMPLES}"
        )


def _check_named(run: Path, stored: dict[str, str], given: dict[str, str | None]) -> None:
    """Refuse networks whose loading runs code, unless the caller named them too; checked before any is loaded."""
    for option, name in given.items():
        if name is not None and name != stored.get(option):
            used = f"used {stored[option]!r}" if option in stored else "used none"
            raise ValueError(f"{option} must be the network of the run, which {used}, got {name!r}; leave it out")
    for option, name in stored.items():
        if runs_code(name) and given[option] is None:
            raise UnnamedCodeError(f"the result file of {run}", option, name)


def _conditions(run: Path, results: Results, reads_prompts: bool) -> Conditions:
    protocol: Any = results["protocol"]
    described = protocol["conditions"]
    return load_conditions(described, run) if reads_prompts or "classes" in described else Prompts(("",))


def _store(run: Path, name: str) -> SampleStore:
    return SampleStore(run / "rows" / folder_name(name))
