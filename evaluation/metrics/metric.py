"""Definition of a metric: a function from the samples of a row to a value with its bootstrap replicates.

`N` images per row, `M` reference samples, `d` features, `R` resamples. All tensors are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowaccel.evaluation.metrics.bootstrap import resample_indices
from flowaccel.evaluation.metrics.frechet import Moments

_WIDE = 512  # features from which a Frechet distance takes seconds, so that fewer resamples must do


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
    """One metric; a module of this folder lists its metrics by name in `METRICS`."""

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


NEEDS: dict[str, tuple[Callable[[Case], bool], str]] = {
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
"""Needs of metrics: whether they are met, and the message if not."""

OF_PROMPTS = frozenset({"clip", "attributes"})
"""Needs that only prompts can meet."""


def mean(values: Tensor, case: Case) -> Estimate:
    """Return the mean of the images' values (N,)."""
    values = values.to(torch.float64)
    return Estimate(value=float(values.mean()), replicates=values[case.indices(len(values))].mean(dim=1))


def mean_over_prompts(values: Tensor, prompts: Sequence[str], case: Case) -> Estimate:
    """Return the mean of the images' values. Prompts are resampled, each with all its images.

    Images of one prompt are alike, and an interval that took them for independent would be too narrow. With a single
    prompt the images are resampled.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    if len(numbers) == 1:
        return mean(values, case)
    values = values.to(torch.float64)
    group = torch.tensor([numbers[prompt] for prompt in prompts])
    total = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, group, values)
    count = torch.bincount(group)
    chosen = case.indices(len(numbers))
    return Estimate(value=float(values.mean()), replicates=total[chosen].sum(dim=1) / count[chosen].sum(dim=1))
