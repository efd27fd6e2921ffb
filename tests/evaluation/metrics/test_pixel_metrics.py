"""Paired errors against independent formulas, at the ends of the uint8 range and on small images."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from flowaccel.evaluation.metrics.pixel_metrics import Psnr, psnr, rel_l2, ssim, ssim_window


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def constant(*levels: int) -> Tensor:
    return torch.tensor(levels, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


def gaussian_ssim(x: numpy.ndarray, y: numpy.ndarray, sigma: float) -> float:
    """Wang et al. 2004 for one channel in [0, 1], through scipy's filter."""

    def blur(image: numpy.ndarray) -> numpy.ndarray:
        return scipy.ndimage.gaussian_filter(image, sigma, truncate=3.5, mode="mirror")

    mx, my = blur(x), blur(y)
    sxx, syy, sxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sxx + syy + c2))).mean())


@pytest.mark.parametrize(("level", "other"), [(0, 255), (255, 0), (0, 16), (250, 10), (10, 250), (127, 128)])
def test_psnr_does_not_wrap_around(level: int, other: int) -> None:
    expected = 20 * numpy.log10(255 / abs(level - other))
    assert psnr(constant(level), constant(other)).mean == pytest.approx(expected, abs=1e-9)


def test_psnr_equals_numpy_per_image() -> None:
    x, y = noise(0, 6, 3, 5, 7), noise(1, 6, 3, 5, 7)
    error = ((x.numpy().astype("float64") - y.numpy().astype("float64")) ** 2).mean(axis=(1, 2, 3))
    numpy.testing.assert_allclose(psnr(x, y).decibels.numpy(), 10 * numpy.log10(255**2 / error), rtol=1e-12)


def test_identical_images_are_counted_and_left_out_of_the_mean() -> None:
    found = psnr(constant(3, 0, 9, 9), constant(3, 51, 9, 9))
    assert found.identical.tolist() == [True, False, True, True]
    assert found.decibels.isfinite().all()
    assert found.mean == pytest.approx(20 * numpy.log10(5))  # of the one that differs, by 255 / 5
    assert found.identical_fraction == 0.75


def test_all_identical_have_no_mean() -> None:
    found = psnr(constant(3, 4), constant(3, 4))
    assert isinstance(found, Psnr)
    assert found.mean is None
    assert found.identical_fraction == 1.0


@pytest.mark.parametrize(("size", "window"), [(8, 7), (16, 11), (9, 9), (4, 3)])
def test_ssim_equals_the_formula(size: int, window: int) -> None:
    x, y = noise(2, 3, 1, size, size), noise(3, 3, 1, size, size)
    expected = [gaussian_ssim(x[i, 0].numpy() / 255, y[i, 0].numpy() / 255, 1.5 * window / 11) for i in range(3)]
    assert ssim_window(size, size) == window
    numpy.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 1, 8, 8), (3, 3, 8, 6), (2, 3, 1, 1), (300, 1, 8, 8)])
def test_ssim_is_one_per_identical_image_of_any_size(shape: tuple[int, ...]) -> None:
    images = noise(4, *shape)
    torch.testing.assert_close(ssim(images, images), torch.ones(shape[0], dtype=torch.float64))


def test_ssim_falls_with_noise() -> None:
    x = noise(5, 4, 1, 8, 8)
    little = (x.int() + noise(6, 4, 1, 8, 8).int() // 16 - 8).clamp(0, 255).to(torch.uint8)
    much = (x.int() + noise(6, 4, 1, 8, 8).int() - 128).clamp(0, 255).to(torch.uint8)
    assert (ssim(little, x) > ssim(much, x)).all()


def test_rel_l2_equals_numpy_and_ignores_the_batch() -> None:
    x, y = noise(7, 300, 1, 4, 4), noise(8, 300, 1, 4, 4)
    a, b = x.numpy().reshape(300, -1) / 255, y.numpy().reshape(300, -1) / 255
    expected = numpy.linalg.norm(a - b, axis=1) / numpy.linalg.norm(b, axis=1)
    numpy.testing.assert_allclose(rel_l2(x, y).numpy(), expected, rtol=1e-12)
    assert rel_l2(x[5:6], y[5:6]).item() == pytest.approx(expected[5])


def test_rel_l2_of_a_black_baseline_is_finite() -> None:
    black = constant(0, 0)
    assert rel_l2(constant(0, 255), black).tolist() == [0.0, pytest.approx(8 * 255)]


def test_rel_l2_of_the_darkest_image_is_not_bent_by_the_floor() -> None:
    dark = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    dark[0, 0, 0, 0] = 1
    assert rel_l2(2 * dark, dark).item() == pytest.approx(1.0)


@pytest.mark.parametrize("function", [psnr, ssim, rel_l2])
@pytest.mark.parametrize(
    ("images", "baseline", "message"),
    [
        (noise(0, 2, 1, 8, 8), noise(0, 2, 1, 8, 9), r"of one shape, got \(2, 1, 8, 8\) and \(2, 1, 8, 9\)"),
        (noise(0, 2, 1, 8, 8), noise(0, 3, 1, 8, 8), "of one shape"),
        (torch.zeros(2, 1, 8, 8), noise(0, 2, 1, 8, 8), r"images must be uint8.* got torch.float32"),
        (noise(0, 2, 1, 8, 8), noise(0, 2, 8, 8), r"baseline must be uint8 of shape \(N, C, H, W\)"),
    ],
)
def test_wrong_use_is_explained(
    function: Callable[[Tensor, Tensor], object], images: Tensor, baseline: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(images, baseline)
