"""Writing of videos: mp4 with the extra `video`, else animated WebP, which Pillow writes by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from flowaccel.errors import MissingExtraError
from flowaccel.extras import require


def video_suffix() -> str:
    """Return `".mp4"` where it can be written, else `".webp"`."""
    try:
        _require_mp4()
    except MissingExtraError:
        return ".webp"
    return ".mp4"


def save_video(frames: Sequence[Image], path: str | Path, fps: float) -> None:
    """Write frames of equal size as a video; mp4 is small and lossy, WebP here lossless and large.

    Args:
        frames: PIL images in order, at least one. An odd width or height grows by one pixel in an mp4.
        path: the file, ending in `.mp4` or `.webp`.
        fps: frames per second, above 0.

    Raises:
        ValueError: no frame, fps not above 0, or another suffix.
        MissingExtraError: mp4 without the extra `video`.
    """
    path = Path(path)
    if not frames:
        raise ValueError("frames is empty: a video needs at least one")
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if path.suffix == ".mp4":
        from diffusers.utils import export_to_video

        _require_mp4()
        export_to_video(list(frames), str(path), fps=fps, quality=8, macro_block_size=2)
    elif path.suffix == ".webp":
        frames[0].save(
            path, save_all=True, append_images=list(frames[1:]), duration=round(1000 / fps), loop=0, lossless=True
        )
    else:
        raise ValueError(f"path must end in .mp4 or .webp, got {str(path)!r}")


def _require_mp4() -> None:
    require("imageio")
    require("imageio_ffmpeg")
