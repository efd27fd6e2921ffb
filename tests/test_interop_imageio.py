"""mp4 through imageio, of the extra `video`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowaccel.cli.video import save_video, video_suffix

pytest.importorskip("imageio", reason="needs the extra video")
pytest.importorskip("imageio_ffmpeg", reason="needs the extra video")


@pytest.mark.parametrize(("width", "height"), [(48, 32), (50, 34), (47, 33)])
def test_mp4_can_be_read_back(width: int, height: int, tmp_path: Path) -> None:
    import imageio

    assert video_suffix() == ".mp4"
    levels = [30, 90, 150, 210, 250]
    save_video([Image.new("RGB", (width, height), (level, level, level)) for level in levels], tmp_path / "a.mp4", 8)
    with imageio.get_reader(tmp_path / "a.mp4") as video:
        found = np.stack([frame for frame in video])  # not list(): its len is infinite
        assert video.get_meta_data()["fps"] == 8
    assert found.shape == (5, height + height % 2, width + width % 2, 3)
    assert np.abs(found.mean((1, 2, 3)) - levels).max() < 4
