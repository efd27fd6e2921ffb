"""Error of each image against the same image of another run (same id, same seed): PSNR, SSIM, relative L2.

Images are uint8 `(N, C, H, W)` on both sides and of equal size: nothing is resized or cropped here, since a silent
resize decides the result. Differences are taken in float64: uint8 arithmetic wraps around, which makes a constant
difference of 16 an error of 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric, mean

_CHUNK = 256  # images in float64 at a time
_WINDOW = 11  # the window of the SSIM paper: 11 x 11 pixels, Gaussian with sigma 1.5
_SIGMA = 1.5
_SMALLEST_NORM = 1 / 255  # of an 8-bit image that is not black: one channel of one pixel, one level


@dataclass(frozen=True, kw_only=True, eq=False)
class Psnr:
    """Peak signal-to-noise ratio of each image; read `decibels` only where `identical` is False."""

    decibels: Tensor
    """`(N,)` float64, finite; 0 where the images are identical, whose ratio is infinite."""
    identical: Tensor
    """`(N,)` bool: equal in every pixel."""

    @property
    def mean(self) -> float | None:
        """Mean over the images that are not identical; None where all are."""
        return None if bool(self.identical.all()) else float(self.decibels[~self.identical].mean())

    @property
    def identical_fraction(self) -> float:
        """Share of identical images, in [0, 1]."""
        return float(self.identical.double().mean())


def psnr(images: Tensor, baseline: Tensor) -> Psnr:
    """Return the PSNR in dB of each of the uint8 `images` `(N, C, H, W)` against `baseline`, `10 log10(255^2 / mse)`.

    `ValueError` unless both are uint8 and of one shape.
    """
    _check_images(images, baseline)
    error = torch.cat([_difference(x, y).square().mean(dim=1) for x, y in _chunks(images, baseline)])
    identical = error == 0
    decibels = 10 * torch.log10(255**2 / torch.where(identical, 255.0**2, error))
    return Psnr(decibels=decibels, identical=identical)


def ssim(images: Tensor, baseline: Tensor) -> Tensor:
    """Return the structural similarity of each image, `(N,)` float64 in [-1, 1] (Wang et al. 2004).

    It is 1 for identical images.

    Gaussian window of 11 x 11 pixels (sigma 1.5); for smaller images the largest odd window that fits, sigma in
    proportion, so values of small images compare only with images of that size. `ValueError` as `psnr`.
    """
    _check_images(images, baseline)
    # imported here, because torchmetrics takes seconds to import and only this metric needs it
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = _SIGMA * ssim_window(images.shape[-2], images.shape[-1]) / _WINDOW
    values = []
    for x, y in _chunks(images, baseline):
        similarity = structural_similarity_index_measure(
            x.double() / 255, y.double() / 255, sigma=sigma, data_range=1.0, reduction="none"
        )
        assert isinstance(similarity, Tensor)  # it is a pair only when asked for the contrast term
        values.append(similarity.reshape(len(x)))  # a single image comes back without its axis
    return torch.cat(values)


def ssim_window(height: int, width: int) -> int:
    """Return the side in pixels of the window that `ssim` uses for images of this size: odd, at most 11."""
    side = min(_WINDOW, height, width)
    return side if side % 2 else side - 1


def rel_l2(images: Tensor, baseline: Tensor) -> Tensor:
    """Return the relative error `|x - y| / |y|` of each image x against its baseline y, `(N,)` float64, >= 0.

    The norm of y is at least that of the darkest 8-bit image that is not black (a single level in a single channel of
    one pixel), so that a black baseline gives 0 for a black image and a large finite number for any other.
    `ValueError` as `psnr`.
    """
    _check_images(images, baseline)
    pairs = [(_difference(x, y) / 255, y.flatten(1).double() / 255) for x, y in _chunks(images, baseline)]
    return torch.cat([error.norm(dim=1) / y.norm(dim=1).clamp_min(_SMALLEST_NORM) for error, y in pairs])


def _difference(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() - y.double()).flatten(1)


def _chunks(images: Tensor, baseline: Tensor) -> zip[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, _CHUNK), torch.split(baseline, _CHUNK), strict=True)


def _check_images(images: Tensor, baseline: Tensor) -> None:
    for name, value in (("images", images), ("baseline", baseline)):
        if value.dtype != torch.uint8 or value.ndim != 4 or 0 in value.shape:
            raise ValueError(
                f"{name} must be uint8 of shape (N, C, H, W), got {value.dtype} {tuple(value.shape)}; "
                "round floats in [0, 1] by (x * 255).round().clamp(0, 255).to(torch.uint8)"
            )
    if images.shape != baseline.shape:
        raise ValueError(
            f"images and baseline must be of one shape, got {tuple(images.shape)} and "
            f"{tuple(baseline.shape)}; make both at one size and with the same ids, nothing is resized"
        )


def _psnr(case: Case) -> Estimate:
    assert case.baseline is not None
    ratio = psnr(case.row.images, case.baseline.images)
    chosen = case.indices(len(ratio.identical))
    replicates = ratio.decibels[chosen].sum(dim=1) / (~ratio.identical)[chosen].sum(dim=1)  # 0 / 0 is NaN: undefined
    extra = {"identical_fraction": ratio.identical_fraction}
    return Estimate(value=ratio.mean, replicates=replicates, extra=extra)


def _ssim(case: Case) -> Estimate:
    assert case.baseline is not None
    return mean(ssim(case.row.images, case.baseline.images), case)


def _rel_l2(case: Case) -> Estimate:
    assert case.baseline is not None
    return mean(rel_l2(case.row.images, case.baseline.images), case)


_error = functools.partial(Metric, needs=("baseline",), network=None, against="baseline")

METRICS = {
    "psnr": _error(title="PSNR in dB against {reference}", higher_is_better=True, estimate=_psnr),
    "ssim": _error(title="SSIM against {reference}", higher_is_better=True, estimate=_ssim),
    "rel_l2": _error(title="Relative L2 error against {reference}", higher_is_better=False, estimate=_rel_l2),
}
