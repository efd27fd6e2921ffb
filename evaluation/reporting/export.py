"""Samples in the formats of other evaluators."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from flowaccel.evaluation.results import load_results
from flowaccel.evaluation.results import row as find_row
from flowaccel.evaluation.samples.store import SampleStore, folder_name


def export_npz(run: str | Path, row: str, out: str | Path) -> int:
    """Write a row's samples in the order of their ids as guided-diffusion's (ADM's) sample file.

    The file holds `arr_0`, uint8 (N, H, W, 3); grey images are repeated, since its reader wants colour. Written image
    by image, and as a whole or not at all.

    Args:
        run: the run folder that `evaluate` wrote.
        row: name of the row.
        out: `*.npz`.

    Returns:
        N.

    Raises:
        FileNotFoundError: no result file there.
        ValueError: unknown row, another suffix, or a sample that is missing, damaged or of another size.
    """
    run, out = Path(run), Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"samples are exported to a .npz file, got {out}")
    results = load_results(run)
    find_row(results, row)
    count = results["protocol"]["num_samples"]
    store = SampleStore(run / "rows" / folder_name(row))
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            _write_images(archive, store, count)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write_images(archive: zipfile.ZipFile, store: SampleStore, count: int) -> None:
    shape = tuple(store.read([0]).shape[2:])
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape, 3)}
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for sample_id in range(count):
            image = store.read([sample_id])[0]
            if tuple(image.shape[1:]) != shape:
                raise ValueError(f"sample {sample_id} is {tuple(image.shape[1:])} pixels, sample 0 is {shape}")
            file.write(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy().tobytes())
