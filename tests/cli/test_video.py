"""Videos: what is written can be read back, frame by frame."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowaccel.cli.video import save_video, video_suffix
from flowaccel.errors import MissingExtraError


def frames(count: int = 5, width: int = 16, height: int = 12) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def test_webp_holds_every_frame_exactly(tmp_path: Path) -> None:
    made = frames()
    save_video(made, tmp_path / "a.webp", fps=8)
    with Image.open(tmp_path / "a.webp") as video:
        assert (video.format, video.n_frames, video.size) == ("WEBP", 5, (16, 12))
        for index, frame in enumerate(made):
            video.seek(index)
            assert np.array_equal(np.asarray(video.convert("RGB")), np.asarray(frame))
            assert video.info["duration"] == 125


def test_without_the_extra_there_is_webp_and_mp4_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "imageio", None)  # type: ignore[arg-type]
    assert video_suffix() == ".webp"
    with pytest.raises(MissingExtraError, match=r"flowaccel\[video\]"):
        save_video(frames(), tmp_path / "a.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], "a.webp", 8), "frames is empty"),
        ((frames(1), "a.webp", 0), "fps must be above 0, got 0"),
        ((frames(1), "a.webp", float("nan")), "fps must be above 0, got nan"),
        ((frames(1), "a.gif", 8), r"path must end in \.mp4 or \.webp, got 'a\.gif'"),
    ],
)
def test_wrong_use(arguments: tuple[list[Image.Image], str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_video(*arguments)
