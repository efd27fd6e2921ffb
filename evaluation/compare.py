"""Paired differences between any two rows of a finished run, from its stored samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attributes import load_attributes
from .conditions import Conditions, Prompts, load_conditions
from .features import FeatureNetwork, load_features, load_reference
from .latency import Timing
from .metrics import difference, find_metric
from .protocol import BASELINE
from .runner import row_samples
from .schema import Results, load_results, row
from .store import SampleStore, folder_name


def compare_rows(run: str | Path, a: str, b: str) -> dict[str, Any]:
    """The paired difference a - b of every metric of a run.

    Args:
        run: the run folder that `evaluate` wrote.
        a, b: names of two rows.

    Returns:
        `{"a", "b", "metrics": {NAME: {"difference", "ci95", "stderr", "not_worse"}}, "wall_clock": {"ratio",
        "ci95"}}`; metrics that compare with the untouched row are left out where one of the two is that row.
        `not_worse`: the upper end of the difference is at most 5% of b's value. `ratio`: seconds of a / seconds of b,
        median over rounds, below 1 where a is faster; `wall_clock` is absent where the file does not hold the rounds.

    Raises:
        FileNotFoundError: no result file there.
        ValueError: unknown row, or the feature network is no longer the one that the run used.
    """
    run = Path(run)
    results = load_results(run)
    protocol: Any = results["protocol"]
    for name in (a, b):
        row(results, name)
    network = _network(protocol["feature_extractor"], protocol["fingerprint"])
    clip = _network(protocol["clip"], protocol["clip_fingerprint"]) if "clip" in protocol else None
    attributes = None
    if "attribute_accuracy" in protocol["metrics"]:
        attributes = load_attributes(protocol["attributes"], network)
    conditions = _conditions(run, results, reads_prompts=clip is not None or attributes is not None)
    ids = range(protocol["num_samples"])
    samples = {
        name: row_samples(_store(run, name), name, ids, conditions, network, clip, attributes)
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


def _network(name: str, fingerprint: str) -> FeatureNetwork:
    network = load_features(name)
    if network.fingerprint != fingerprint:
        raise ValueError(
            f"the run used {name} with fingerprint {fingerprint}, here it has {network.fingerprint}; evaluate again"
        )
    return network


def _conditions(run: Path, results: Results, reads_prompts: bool) -> Conditions:
    protocol: Any = results["protocol"]
    described = protocol["conditions"]
    return load_conditions(described, run) if reads_prompts or "classes" in described else Prompts(("",))


def _store(run: Path, name: str) -> SampleStore:
    return SampleStore(run / "rows" / folder_name(name))
