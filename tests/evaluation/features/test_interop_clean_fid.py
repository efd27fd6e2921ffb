"""Our resize and clean-fid's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowaccel.evaluation.features.preprocessing import resize

clean = pytest.importorskip("cleanfid.resize", reason="clean-fid is not installed")


@pytest.mark.parametrize("shape", [(64, 40), (299, 299), (500, 333)])
def test_resize_is_the_clean_one(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    theirs = clean.build_resizer("clean")(pixels)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1), 299)
    np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), theirs)
