"""Samples for other evaluators."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowaccel.evaluation import export_npz
from flowaccel.evaluation.samples.store import SampleStore, folder_name

ROW = "heun@3 + cache"


def finished(run: Path, count: int, channels: int = 3) -> Tensor:
    """A run folder with one row of `count` samples, written in another order than that of their ids."""
    images = torch.randint(256, (count, channels, 6, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    store = SampleStore(run / "rows" / folder_name(ROW))
    for i in reversed(range(count)):
        store.write(i, images[i])
    latency = {"median": 1.0, "p10": 1.0, "p90": 1.0, "rounds": 2}
    speedup = {"wall_clock": {"value": 1.0, "ci95": [1.0, 1.0]}}
    row = {"recipe": ROW, "num_inference_steps": 3, "nfe": 3.0, "latency_ms_per_image": latency, "speedup": speedup}
    protocol = {"dataset": "3 classes", "num_samples": count, "seed": 0, "batch_size": 2}
    results = {"schema": 1, "protocol": protocol, "environment": {}, "rows": [row | {"metrics": {}}]}
    (run / "results.json").write_text(json.dumps(results))
    return images


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_in_the_order_of_their_ids(channels: int, tmp_path: Path) -> None:
    images = finished(tmp_path, 12, channels)
    out = tmp_path / "new" / "samples.npz"
    assert export_npz(tmp_path, ROW, out) == 12
    with np.load(out, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        found = file["arr_0"]
    assert (found.dtype, found.shape) == (np.uint8, (12, 6, 4, 3))
    np.testing.assert_array_equal(found, images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    assert [path.name for path in out.parent.iterdir()] == ["samples.npz"]


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    finished(tmp_path, 3)
    with pytest.raises(ValueError, match=r"no row called 'heun@3'"):
        export_npz(tmp_path, "heun@3", tmp_path / "samples.npz")
    with pytest.raises(ValueError, match=r"to a .npz file, got .*samples.npy"):
        export_npz(tmp_path, ROW, tmp_path / "samples.npy")
    with pytest.raises(FileNotFoundError, match="no result file"):
        export_npz(tmp_path / "rows", ROW, tmp_path / "samples.npz")
    last = tmp_path / "rows" / folder_name(ROW) / "samples" / "000002.png"
    Image.new("RGB", (5, 6)).save(last)
    with pytest.raises(ValueError, match=r"sample 2 is \(6, 5\) pixels, sample 0 is \(6, 4\)"):
        export_npz(tmp_path, ROW, tmp_path / "samples.npz")
    last.unlink()
    with pytest.raises(ValueError, match=r"000002.png is missing or damaged"):
        export_npz(tmp_path, ROW, tmp_path / "samples.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "rows"]
