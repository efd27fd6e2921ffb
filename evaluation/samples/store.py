"""Sample store: one file per sample id, written atomically, so that any interruption can be resumed exactly.

The file is the record: what is there is done, what is missing is made. Seeds depend on the run's seed and the id
alone, so batch size, interruptions and processes change nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MANIFEST = "manifest.json"
_PNG_LEVEL = 1  # a fifth of the default level's time for a sixth more bytes


def sample_seed(run_seed: int, sample_id: int) -> int:
    """Return a seed in [0, 2**63) from a hash of the run's seed and the sample's id.

    Runs with neighbouring seeds share nothing.
    """
    digest = hashlib.blake2b(f"{run_seed}:{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_generator(run_seed: int, sample_id: int) -> torch.Generator:
    """Return the CPU generator that draws everything random about one sample."""
    return torch.Generator("cpu").manual_seed(sample_seed(run_seed, sample_id))


@dataclass(frozen=True)
class SampleStore:
    """Samples of one row of an evaluation.

    Args:
        folder: the row's folder; made on first use.
    """

    folder: Path

    def open(self, manifest: dict[str, Any]) -> None:
        """Claim the folder for `manifest`, which says what the samples depend on.

        A folder that was started with another manifest is refused.

        Raises:
            ValueError: the folder holds samples of another manifest; the message names what differs.
        """
        path = self.folder / MANIFEST
        wanted = json.loads(json.dumps(manifest))
        if path.exists():
            found = json.loads(path.read_text())
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            if differing:
                changes = "; ".join(f"{key}: there {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
                raise ValueError(
                    f"{self.folder} holds samples made differently ({changes}); choose another --out or delete it"
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=1).encode())

    def missing(self, ids: Sequence[int]) -> list[int]:
        """Return those `ids` that have no sample yet."""
        return [sample_id for sample_id in ids if not self._path(sample_id).exists()]

    def write(self, sample_id: int, image: Tensor) -> None:
        """Store one image, uint8 (C, H, W) with 1 or 3 channels, as a lossless PNG."""
        array = image.permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(
            buffer, "PNG", compress_level=_PNG_LEVEL
        )
        write_atomically(self._path(sample_id), buffer.getvalue())

    def read(self, ids: Sequence[int]) -> Tensor:
        """Read the images of `ids`, uint8 (N, C, H, W).

        Raises:
            ValueError: one is missing or unreadable; the message names the file.
        """
        return torch.stack([self._read(sample_id) for sample_id in ids])

    def _read(self, sample_id: int) -> Tensor:
        path = self._path(sample_id)
        try:
            with Image.open(path) as image:
                array = np.array(image)
        except (
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # SyntaxError is what PIL raises on a broken chunk
            raise ValueError(f"sample {path} is missing or damaged ({error}); delete it and run again") from error
        return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)

    def digest(self, ids: Sequence[int]) -> str:
        """Return the sha256 over the files of `ids`, in order."""
        total = hashlib.sha256()
        for sample_id in ids:
            total.update(self._path(sample_id).read_bytes())
        return total.hexdigest()

    def _path(self, sample_id: int) -> Path:
        return self.folder / "samples" / f"{sample_id:06d}.png"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def generate(
    store: SampleStore, ids: Sequence[int], batch_size: int, make: Callable[[list[int]], Tensor]
) -> Iterator[int]:
    """Generate every missing sample of `ids` in batches; yields the number of samples made after each batch.

    Args:
        store: store of the samples.
        ids: all sample ids of the run.
        batch_size: most samples per call.
        make: ids -> uint8 images (len(ids), C, H, W).
    """
    todo = store.missing(ids)
    yield from generate_batches(store, in_batches(todo, batch_size), make)


def in_batches(ids: Sequence[int], batch_size: int) -> list[list[int]]:
    """Split `ids` into lists of `batch_size`, the last one perhaps shorter."""
    return [list(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)]


def generate_batches(
    store: SampleStore, batches: Sequence[list[int]], make: Callable[[list[int]], Tensor]
) -> Iterator[int]:
    """Generate the samples of each batch, whether they exist or not; yields the number of samples of each."""
    for batch in batches:
        for sample_id, image in zip(batch, make(batch), strict=True):
            store.write(sample_id, image)
        yield len(batch)


def folder_name(row: str) -> str:
    """Return a row's name as a folder name.

    A name with other characters than letters, digits and `._@+-` gets a hash.
    """
    safe = re.sub(r"[^\w.@+-]", "_", row)
    return (
        safe
        if safe == row and not row.startswith(".")
        else f"row_{safe}_{hashlib.sha256(row.encode()).hexdigest()[:8]}"
    )
