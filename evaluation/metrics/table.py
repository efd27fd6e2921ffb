"""Table of all quality metrics by short name, with standard errors and paired differences between rows.

A *row* is one way of making the images (the untouched pipeline, an accelerated one, fewer steps). All rows hold the
same sample ids in the same order; ids are resampled once and jointly, so a difference between rows is far better known
than either value, and claims rest on it (`versus`, `difference`). The reference set is held fixed, except for recall.

`N` images per row, `M` reference samples, `d` features, `R` resamples. All tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowaccel.errors import did_you_mean
from flowaccel.evaluation.metrics.bootstrap import ci95, resample_counts, resample_indices, stderr
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance, frechet_infinity, warn_if_rank_deficient
from flowaccel.evaluation.metrics.kid import kernel_distance_resampled
from flowaccel.evaluation.metrics.pixel_metrics import psnr, rel_l2, ssim
from flowaccel.evaluation.metrics.precision_recall import precision_indicators, recall_indicators

NOT_WORSE = 0.05
"""A row is not worse than another if the paired difference is at most this share of the other's value."""
_WIDE = 512  # features from which a Frechet distance takes seconds, so that fewer resamples must do
_NEIGHBOURS = 3  # arXiv 1904.06991


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMatch:
    """Agreement of each image of a row with its prompt, as measured by a CLIP network."""

    network: str
    """Its name."""
    prompts: tuple[str, ...]
    """The prompt of each of the N images; images of one prompt are resampled together."""
    cosine: Tensor
    """`(N,)` float: between the embeddings of image and prompt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributeMatch:
    """Stated and predicted attributes of a row's N images, of A attributes.

    Raises:
        ValueError: the shapes differ.
    """

    names: tuple[str, ...]
    """Names of the A attributes."""
    prompts: tuple[str, ...]
    """The prompt of each of the N images; images of one prompt are resampled together."""
    stated: Tensor
    """`(N, A)` integer: the index of the value asked for; negative where the prompt does not state the attribute."""
    seen: Tensor
    """`(N, A)` integer: the index of the value seen."""

    def __post_init__(self) -> None:
        shapes = {"stated": tuple(self.stated.shape), "seen": tuple(self.seen.shape)}
        for name, shape in shapes.items():
            if shape != (len(self.prompts), len(self.names)):
                raise ValueError(
                    f"{name} must have one row for each of the {len(self.prompts)} prompts and one column for each of "
                    f"the {len(self.names)} attributes, got {shape}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSamples:
    """Images of one row with their features. `ValueError` where the lengths differ."""

    name: str
    features: Tensor
    """`(N, d)` float."""
    labels: Tensor | None
    """`(N,)` integer: the class that was asked for; None for models without classes."""
    predicted: Tensor | None
    """`(N,)` integer: the class that the feature network's classifier sees."""
    images: Tensor
    """`(N, C, H, W)` uint8."""
    text_match: TextMatch | None = None
    """None without prompts or without a CLIP network."""
    attributes: AttributeMatch | None = None
    """None without prompts whose attributes can be read or without a network that sees them."""

    def __post_init__(self) -> None:
        fields: dict[str, Sized | None] = {"labels": self.labels, "predicted": self.predicted, "images": self.images}
        if self.text_match is not None:
            fields |= {"prompts": self.text_match.prompts, "cosine": self.text_match.cosine}
        if self.attributes is not None:
            fields |= {"attributes": self.attributes.seen}
        for name, value in fields.items():
            if value is not None and len(value) != len(self.features):
                raise ValueError(
                    f"row {self.name!r}: {name} must have one entry for each of the "
                    f"{len(self.features)} feature vectors, got {len(value)}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceSet:
    """Reference that generated images are compared with. `ValueError` where features and moments differ in width."""

    name: str
    features: Tensor | None
    """`(M, d)` float; None where only statistics are known (then only Fréchet distances can be had)."""
    moments: Moments
    image_shape: tuple[int, ...] | None = None
    """(C, H, W) of the images; None where they differ or are not known."""

    def __post_init__(self) -> None:
        width = len(self.moments.mean)
        if self.features is not None and tuple(self.features.shape[1:]) != (width,):
            raise ValueError(
                f"reference {self.name!r}: features must have shape (M, {width}) as its moments have, "
                f"got {tuple(self.features.shape)}"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Inputs of an estimator: one row, what it is compared with, and how to resample."""

    row: RowSamples
    baseline: RowSamples | None
    """The row of the untouched pipeline; None where the metric does not need it."""
    reference: ReferenceSet
    seed: int
    resamples: int

    def indices(self, n: int) -> Tensor:
        """Return `(R, n)` resampled positions: equal for every row, which is what pairs them."""
        return resample_indices(n, self.resamples, self.seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """Value of a metric and its bootstrap replicates."""

    value: float | None
    """None where it is undefined, such as the PSNR of identical images."""
    replicates: Tensor
    """`(R,)` float64; NaN where the resample leaves the value undefined."""
    extra: Mapping[str, float | dict[str, float]] = field(default_factory=dict)
    """Further entries of the result, by name."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Entry of the table `METRICS`."""

    title: str
    """Honest display name; `{features}`, the name of the `network`, and `{reference}` are filled in."""
    higher_is_better: bool
    estimate: Callable[[Case], Estimate]
    needs: tuple[str, ...] = ()
    """Keys of the table of needs: checked, with an error that says what is missing, before anything is computed."""
    network: str | None = "features"
    """Network that the value depends on: `features`, `clip` or None; it is then named."""
    against: str | None = "reference"
    """`reference` set, `baseline` row or None."""
    resamples: int | None = None
    """Largest number of resamples, where one is costly; None for no limit."""
    resamples_wide: int | None = None
    """The same for more than 512 features."""
    covariance: bool = False
    """Whether it rests on a covariance, which needs more samples than features."""

    def most_resamples(self, asked: int, width: int) -> int:
        """Return how many of the resamples `asked` for are drawn with features of this `width`."""
        limit = self.resamples_wide if width > _WIDE else self.resamples
        return asked if limit is None else min(asked, limit)


def _mean(values: Tensor, case: Case) -> Estimate:
    values = values.to(torch.float64)
    return Estimate(value=float(values.mean()), replicates=values[case.indices(len(values))].mean(dim=1))


def _mean_over_prompts(values: Tensor, prompts: Sequence[str], case: Case) -> Estimate:
    """Return the mean of the images' values. Prompts are resampled, each with all its images.

    Images of one prompt are alike, and an interval that took them for independent would be too narrow. With a single
    prompt the images are resampled.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) == 1:
        return _mean(values, case)
    values = values.to(torch.float64)
    group = torch.tensor([numbers[prompt] for prompt in prompts])
    total = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, group, values)
    count = torch.bincount(group)
    chosen = case.indices(len(numbers))
    return Estimate(value=float(values.mean()), replicates=total[chosen].sum(dim=1) / count[chosen].sum(dim=1))


def _fid(case: Case) -> Estimate:
    features = case.row.features.to(torch.float64)
    replicates = [
        frechet_distance(Moments.of(features[chosen]), case.reference.moments) for chosen in case.indices(len(features))
    ]
    value = frechet_distance(Moments.of(features), case.reference.moments)
    return Estimate(value=value, replicates=torch.tensor(replicates, dtype=torch.float64))


def _fid_inf(case: Case) -> Estimate:
    features = case.row.features.to(torch.float64)

    def distance(samples: Tensor) -> float:
        return frechet_infinity(samples, case.reference.moments, seed=case.seed)

    replicates = [distance(features[chosen]) for chosen in case.indices(len(features))]
    return Estimate(value=distance(features), replicates=torch.tensor(replicates, dtype=torch.float64))


def _kid(case: Case) -> Estimate:
    features, reference = case.row.features, case.reference.features
    assert reference is not None  # declared in `needs`
    counts = resample_counts(case.indices(len(features)))
    original = torch.ones_like(counts[:1])  # along with the resamples: the kernel is then computed once
    distances = kernel_distance_resampled(features, reference, torch.cat([original, counts]))
    return Estimate(value=float(distances[0]), replicates=distances[1:])


def _class_accuracy(case: Case) -> Estimate:
    assert case.row.labels is not None  # declared in `needs`
    assert case.row.predicted is not None
    return _mean(case.row.labels.eq(case.row.predicted), case)


def _clip_score(case: Case) -> Estimate:
    """Compute 100 max(cos, 0) (arXiv 2104.08718 with w = 100)."""
    match = case.row.text_match
    assert match is not None  # declared in `needs`
    return _mean_over_prompts(100 * match.cosine.to(torch.float64).clamp_min(0), match.prompts, case)


def _attribute_accuracy(case: Case) -> Estimate:
    """Compute the share of images that show all that their prompt states (as GenEval counts, arXiv 2310.11513)."""
    match = case.row.attributes
    assert match is not None  # declared in `needs`
    stated, right = match.stated >= 0, match.stated == match.seen
    by_attribute = {
        name: float(right[asked, column].double().mean())
        for column, (name, asked) in enumerate(zip(match.names, stated.T, strict=True))
        if asked.any()
    }
    estimate = _mean_over_prompts((right | ~stated).all(dim=1), match.prompts, case)
    return replace(estimate, extra={"attributes": by_attribute})


def _precision(case: Case) -> Estimate:
    assert case.reference.features is not None
    return _mean(precision_indicators(case.row.features, case.reference.features, _NEIGHBOURS), case)


def _recall(case: Case) -> Estimate:
    """Compute recall; the M reference samples are resampled, since recall is a mean over them.

    The generated set is held fixed. A resampled one would have fewer distinct samples and so a smaller manifold.

    A resampled generated set would have fewer distinct samples and so a smaller manifold.
    """
    assert case.reference.features is not None
    return _mean(recall_indicators(case.row.features, case.reference.features, _NEIGHBOURS), case)


def _psnr(case: Case) -> Estimate:
    assert case.baseline is not None
    ratio = psnr(case.row.images, case.baseline.images)
    chosen = case.indices(len(ratio.identical))
    replicates = ratio.decibels[chosen].sum(dim=1) / (~ratio.identical)[chosen].sum(dim=1)  # 0 / 0 is NaN: undefined
    extra = {"identical_fraction": ratio.identical_fraction}
    return Estimate(value=ratio.mean, replicates=replicates, extra=extra)


def _ssim(case: Case) -> Estimate:
    assert case.baseline is not None
    return _mean(ssim(case.row.images, case.baseline.images), case)


def _rel_l2(case: Case) -> Estimate:
    assert case.baseline is not None
    return _mean(rel_l2(case.row.images, case.baseline.images), case)


METRICS: dict[str, Metric] = {
    "fid": Metric(
        title="Frechet distance, {features}",
        higher_is_better=False,
        estimate=_fid,
        resamples_wide=20,
        covariance=True,
    ),
    "fid_inf": Metric(
        title="Frechet distance extrapolated to infinite n, {features}",
        higher_is_better=False,
        estimate=_fid_inf,
        resamples=50,
        resamples_wide=10,
        covariance=True,
    ),
    "kid": Metric(
        title="Kernel distance (unbiased cubic MMD^2), {features}",
        higher_is_better=False,
        estimate=_kid,
        needs=("reference_features",),
    ),
    "class_accuracy": Metric(
        title="Class accuracy, {features}",
        higher_is_better=True,
        estimate=_class_accuracy,
        needs=("classes",),
        against=None,
    ),
    "clip_score": Metric(
        title="CLIP score, {features}",
        higher_is_better=True,
        estimate=_clip_score,
        needs=("clip",),
        network="clip",
        against=None,
    ),
    "attribute_accuracy": Metric(
        title="Attribute accuracy (images that show all that their prompt states), {features}",
        higher_is_better=True,
        estimate=_attribute_accuracy,
        needs=("attributes",),
        against=None,
    ),
    "precision": Metric(
        title=f"Precision (k={_NEIGHBOURS}), {{features}}",
        higher_is_better=True,
        estimate=_precision,
        needs=("reference_features",),
    ),
    "recall": Metric(
        title=f"Recall (k={_NEIGHBOURS}), {{features}}",
        higher_is_better=True,
        estimate=_recall,
        needs=("reference_features",),
    ),
    "psnr": Metric(
        title="PSNR in dB against {reference}",
        higher_is_better=True,
        estimate=_psnr,
        needs=("baseline",),
        network=None,
        against="baseline",
    ),
    "ssim": Metric(
        title="SSIM against {reference}",
        higher_is_better=True,
        estimate=_ssim,
        needs=("baseline",),
        network=None,
        against="baseline",
    ),
    "rel_l2": Metric(
        title="Relative L2 error against {reference}",
        higher_is_better=False,
        estimate=_rel_l2,
        needs=("baseline",),
        network=None,
        against="baseline",
    ),
}
"""The metrics by name. Values depend on n, so compare only rows of one result."""

OF_PROMPTS = frozenset({"clip", "attributes"})
"""Needs that only prompts can meet."""

_NEEDS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "reference_features": (
        lambda case: case.reference.features is not None,
        "needs the features of the reference samples, but the reference {reference!r} has only moments; "
        "give the images of a data set as reference, or statistics made with `flowaccel stats --with-features`, or ask "
        "for fid or fid_inf",
    ),
    "classes": (
        lambda case: case.row.labels is not None and case.row.predicted is not None,
        "needs both labels and predicted classes, but row {row!r} lacks them; take a class-conditional pipeline and a "
        "feature network with a classifier, or leave the metric out",
    ),
    "clip": (
        lambda case: case.row.text_match is not None,
        "needs the prompts of the samples and a CLIP network, but row {row!r} lacks them; take a pipeline with prompts "
        "and name the network, or leave the metric out",
    ),
    "attributes": (
        lambda case: case.row.attributes is not None,
        "needs prompts whose attributes can be read and a feature network that sees them, but row {row!r} lacks them; "
        "name the set of attributes and the network, or leave the metric out",
    ),
    "baseline": (
        lambda case: case.baseline is not None,
        "is an error against the images of the untouched pipeline; give its row as paired_against",
    ),
}


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
        present, message = _NEEDS[need]
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
