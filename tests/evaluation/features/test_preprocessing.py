"""The one resize of the feature networks, against PIL itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowaccel.evaluation.features.preprocessing import Preprocessing, resize

PREPROCESSING = Preprocessing(size=12, shift=(10.0, 20.0, 30.0), scale=(2.0, 4.0, 8.0))


def image(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("shape", [(40, 23), (7, 9), (12, 30)])
def test_resize_is_that_of_pil_in_float(shape: tuple[int, int]) -> None:
    source = image(*shape)
    for channel, found in zip(source, resize(source, 12), strict=True):
        plane = Image.fromarray(channel.numpy()).convert("F").resize((12, 12), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found.numpy(), np.clip(np.asarray(plane), 0, 255))


def test_resize_is_antialiased_clipped_and_not_rounded() -> None:
    stripes = torch.zeros(3, 48, 48, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = resize(stripes, 12)
    assert (small[:, :, 2:-2] - 127.5).abs().max() < 2  # without antialiasing it would be 0 or 255
    edge = torch.zeros(3, 6, 6, dtype=torch.uint8)
    edge[:, :, 3:] = 255
    large = resize(edge, 24)
    assert (large.min(), large.max()) == (0, 255)
    assert (large != large.round()).any()


def test_size_of_the_network_changes_nothing() -> None:
    source = image(12, 12)
    assert torch.equal(resize(source, 12), source.float())


def test_grey_is_colour_of_equal_channels() -> None:
    grey = image(9, 9, channels=1)
    assert torch.equal(resize(grey, 12), resize(grey.expand(3, -1, -1), 12))


def test_images_of_any_sizes_are_normalised_per_channel() -> None:
    images = [image(9, 20), image(30, 8, seed=1)]
    found = PREPROCESSING(images)
    assert found.shape == (2, 3, 12, 12)
    assert found.dtype == torch.float32
    for channel, (shift, scale) in enumerate([(10, 2), (20, 4), (30, 8)]):
        torch.testing.assert_close(found[1, channel], (resize(images[1], 12)[channel] - shift) / scale)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (image(9, 9).float(), TypeError, r"must be uint8, got torch.float32; round them first"),
        (image(9, 9, channels=4), ValueError, r"1 or 3 channels, .* got shape \(4, 9, 9\)"),
        (image(9, 9)[0], ValueError, r"got shape \(9, 9\)"),
    ],
)
def test_wrong_images(wrong: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PREPROCESSING([wrong])
