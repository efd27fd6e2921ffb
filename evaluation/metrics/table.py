"""Table of all quality metrics by short name, with standard errors and paired differences between rows.

A *row* is one way of making the images (the untouched pipeline, an accelerated one, fewer steps). All rows hold the
same sample ids in the same order; ids are resampled once and jointly, so a difference between rows is far better known
than either value, and claims rest on it (`versus`, `difference`). The reference set is held fixed, except for recall.

`N` images per row, `M` reference samples, `d` features, `R` resamples. All tensors are on the CPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowaccel.errors import did_you_mean
from flowaccel.evaluation import metrics as folder
from flowaccel.evaluation.metrics.bootstrap import ci95, stderr
from flowaccel.evaluation.metrics.frechet import warn_if_rank_deficient
from flowaccel.evaluation.metrics.metric import NEEDS, Case, Estimate, Metric, ReferenceSet, RowSamples

NOT_WORSE = 0.05
"""A row is not worse than another if the paired difference is at most this share of the other's value."""


def metrics_of_the_folder() -> dict[str, Metric]:
    """Return the metrics that the modules of this folder list in `METRICS`, by name."""
    names = [module.name for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")]
    tables = [getattr(importlib.import_module(name), "METRICS", {}) for name in names if name != __name__]
    return {name: metric for table in tables for name, metric in table.items()}


METRICS = metrics_of_the_folder()
"""The metrics of all modules of this folder by name. Values depend on n, so compare only rows of one result."""


def find_metric(name: str) -> Metric:
    """Return the metric called `name`.

    `ValueError` with the nearest name and the whole list for one that does not exist.
    """
    return METRICS[_known(name, list(METRICS), "metric")]


def measure(
    rows: Sequence[RowSamples],
    reference: ReferenceSet,
    metrics: Sequence[str],
    *,
    features_name: str,
    seed: int = 0,
    resamples: int = 200,
    versus: Sequence[str] | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute all `metrics` of all `rows`: `{row: {metric: METRIC}}`, ready for JSON (floats, strings and None only).

    METRIC has `value n stderr ci95 higher_is_better display versus`, and `features` and `reference` where it depends on
    them. `versus` holds the paired difference (this row minus that) to each row named in `versus` (default: the first)
    other than itself. `psnr` (which also has `identical_fraction`), `ssim` and `rel_l2` are errors against `rows[0]`,
    the untouched pipeline, and absent there. Where a value is undefined, it and its interval are None, and differences
    with it are absent.

    Standard errors are bootstrap ones over `resamples` draws of the ids, fewer where a draw is costly: `fid` 20 for
    more than 512 features; `fid_inf` at most 50, then 10. They are about the generated samples, the reference is fixed;
    for `recall` it is the other way round. A metric of which every image has the same value has standard error 0.

    Raises `ValueError` for unknown names, rows of different length or fewer than two samples, and for a metric whose
    data is missing; warns once where a Fréchet distance has too few samples for its features.
    """
    names = [row.name for row in rows]
    if not rows or len(set(names)) < len(names):
        raise ValueError(f"rows must be at least one row, each with a name of its own, got {names}")
    _check_counts(rows)
    versus = [_known(name, names, "versus row") for name in (names[:1] if versus is None else versus)]
    table = {name: find_metric(name) for name in metrics}
    case = Case(row=rows[0], baseline=rows[0], reference=reference, seed=seed, resamples=resamples)
    for row in rows:
        for name, metric in table.items():
            _check_needs(name, metric, replace(case, row=row))
    if any(metric.covariance for metric in table.values()):
        _warn_of_few_samples(case)
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in names}
    for name, metric in table.items():
        measured = rows[1:] if metric.against == "baseline" else rows
        estimates = {row.name: _estimate(metric, replace(case, row=row)) for row in measured}
        for row_name, estimate in estimates.items():
            others = {other: estimates[other] for other in versus if other in estimates and other != row_name}
            results[row_name][name] = _report(metric, estimate, others, case, features_name)
    return results


def difference(
    a: RowSamples,
    b: RowSamples,
    metric: str,
    reference: ReferenceSet,
    *,
    paired_against: RowSamples | None = None,
    seed: int = 0,
    resamples: int = 200,
) -> dict[str, Any]:
    """Return the paired difference a - b of one metric: `{"difference", "ci95", "stderr", "not_worse"}`.

    `paired_against` is the untouched pipeline's row, which psnr, ssim and rel_l2 need. Equal to what `measure` puts
    into `versus` at the same seed and resamples. `not_worse` is False where the difference is undefined (then None),
    since nothing was shown. Raises `ValueError` as `measure`.
    """
    entry = find_metric(metric)
    _check_counts([a, b])
    case = Case(row=a, baseline=paired_against, reference=reference, seed=seed, resamples=resamples)
    estimates = []
    for row in (a, b):
        _check_needs(metric, entry, replace(case, row=row))
        estimates.append(_estimate(entry, replace(case, row=row)))
    compared = _compare(*estimates)
    shown = not_worse(compared["ci95"], estimates[1].value, entry.higher_is_better)
    return {**compared, "not_worse": shown}


def not_worse(interval: Sequence[float] | None, other_value: float | None, higher_is_better: bool) -> bool:
    """Whether a row is not worse than another; False where either value is None.

    The end of the `ci95` of (row - other) on the bad side must be at most 5% of the other's absolute value.
    """
    if interval is None or other_value is None:
        return False
    worsening = -interval[0] if higher_is_better else interval[1]
    return worsening <= NOT_WORSE * abs(other_value)


def _estimate(metric: Metric, case: Case) -> Estimate:
    resamples = metric.most_resamples(case.resamples, case.row.features.shape[1])
    return metric.estimate(replace(case, resamples=resamples))


def _compare(a: Estimate, b: Estimate) -> dict[str, Any]:
    value = None if a.value is None or b.value is None else a.value - b.value
    spread = None if value is None else stderr(a.replicates - b.replicates)
    return {"difference": value, "ci95": ci95(value, spread), "stderr": spread}


def _report(
    metric: Metric, estimate: Estimate, others: dict[str, Estimate], case: Case, features_name: str
) -> dict[str, Any]:
    """Return the metric's entry in the result file."""
    assert case.baseline is not None
    n = len(case.row.features)
    against = {"reference": case.reference.name, "baseline": case.baseline.name}.get(metric.against or "")
    spread = None if estimate.value is None else stderr(estimate.replicates)
    compared = {name: _compare(estimate, other) for name, other in others.items()}
    match = case.row.text_match
    network = {"features": features_name, "clip": match and match.network}.get(metric.network or "")
    applies = {"features": network, "reference": against}
    return {
        "value": estimate.value,
        "n": n,
        "stderr": spread,
        "ci95": ci95(estimate.value, spread),
        "higher_is_better": metric.higher_is_better,
        **{key: name for key, name in applies.items() if name is not None},
        "display": f"{metric.title.format(features=network, reference=against)}, n={n}",
        "versus": {
            name: {key: found[key] for key in ("difference", "ci95")}
            for name, found in compared.items()
            if found["ci95"] is not None
        },
        **estimate.extra,
    }


def _warn_of_few_samples(case: Case) -> None:
    counts = (len(case.row.features), case.reference.moments.count)
    warn_if_rank_deficient(min(count for count in counts if count is not None), case.row.features.shape[1])


def _check_needs(name: str, metric: Metric, case: Case) -> None:
    for need in metric.needs:
        present, message = NEEDS[need]
        if not present(case):
            raise ValueError(f"metric {name!r} {message.format(row=case.row.name, reference=case.reference.name)}")


def _check_counts(rows: Sequence[RowSamples]) -> None:
    counts = [len(row.features) for row in rows]
    if len(set(counts)) > 1 or min(counts) < 2:
        listed = ", ".join(f"{row.name!r}: {count}" for row, count in zip(rows, counts, strict=True))
        raise ValueError(f"rows must hold the same samples, at least 2, got {listed}; finish the incomplete rows")


def _known(name: str, known: Sequence[str], what: str) -> str:
    if name in known:
        return name
    raise ValueError(f"unknown {what} {name!r}; {did_you_mean(name, known)}known are: {', '.join(known)}")
