"""Reference statistics files: our own safetensors, and the `mu`/`sigma` npz files that others publish."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.metrics.frechet import Moments
from flowaccel.evaluation.metrics.metric import ReferenceSet
from flowaccel.evaluation.samples.store import write_atomically

_FORMAT = "flowaccel-statistics-1"
_LARGEST = 8 * 20_000**2 + 1000
"""Bytes of a covariance of 20,000 features in float64; the networks in use have 2048 at most."""
_KEYS = ("format", "features", "fingerprint", "source", "n", "image_shape")


def is_statistics(name: str) -> bool:
    """Whether a reference is a statistics file by its name: `*.safetensors` or `*.npz`."""
    return Path(name).suffix.lower() in (".safetensors", ".npz") and not Path(name).is_dir()


def save_statistics(
    reference: ReferenceSet, network: FeatureNetwork, path: str | Path, *, with_features: bool = False
) -> None:
    """Write statistics that `load_reference` reads: `count`, `mean` (d) and `scatter` (d, d) in float64, and origin.

    Args:
        reference: reference returned by `load_reference`.
        network: the network that it was given.
        path: `*.safetensors`; replaced as a whole or not at all.
        with_features: also the features (n, d) in float32, which kid, precision and recall need.

    Raises:
        ValueError: another suffix, or statistics that do not say how many samples they are of.
        OSError: the file cannot be written.
    """
    path = Path(path)
    moments = reference.moments
    if path.suffix != ".safetensors":
        raise ValueError(f"statistics are written to a .safetensors file, got {path}")
    if moments.count is None or (with_features and reference.features is None):
        raise ValueError(f"{reference.name!r} is not a set of images: statistics are made from those")
    tensors = {"count": torch.tensor(moments.count), "mean": moments.mean, "scatter": moments.scatter}
    if with_features and reference.features is not None:
        tensors["features"] = reference.features.to(torch.float32)
    said = {
        "format": _FORMAT,
        "features": network.name,
        "fingerprint": network.fingerprint,
        "source": reference.name,
        "n": str(moments.count),
        "image_shape": json.dumps(reference.image_shape),
    }
    write_atomically(path, save({key: value.contiguous() for key, value in tensors.items()}, said))


def load_statistics(path: str | Path, *, features: str, fingerprint: str) -> ReferenceSet:
    """Load the reference in a statistics file.

    Args:
        path: file that `save_statistics` wrote, or an npz file with `mu` and `sigma`. The latter names neither its
            network nor its count, and the name of the reference then says so.
        features, fingerprint: name and fingerprint of the network in use.

    Raises:
        ValueError: damaged, foreign, or made with another network.
    """
    path = Path(path)
    return _imported(path) if path.suffix.lower() == ".npz" else _own(path, features, fingerprint)


def _own(path: Path, features: str, fingerprint: str) -> ReferenceSet:
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"statistics {path} are damaged ({error}); make them again with `flowaccel stats`") from error
    if said.get("format") != _FORMAT or not set(_KEYS) <= set(said) or not {"count", "mean", "scatter"} <= set(tensors):
        raise ValueError(f"{path} is no statistics file of this flowaccel; make one with `flowaccel stats`")
    if said["fingerprint"] != fingerprint:
        raise ValueError(
            f"the statistics {path} were made with {said['features']}, fingerprint {said['fingerprint']}, but the "
            f"feature network is {features}, fingerprint {fingerprint}; take that network, or make the statistics "
            "again with `flowaccel stats`"
        )
    try:
        shape = json.loads(said["image_shape"])
        mean, scatter = (tensors[key].to(torch.float64) for key in ("mean", "scatter"))
        moments = Moments(count=int(tensors["count"]), mean=mean, scatter=scatter)
        moments.factor  # noqa: B018  # at least two samples, and a covariance
        return ReferenceSet(
            name=str(path),
            features=tensors.get("features"),
            moments=moments,
            image_shape=None if shape is None else tuple(shape),
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"statistics {path} are damaged ({error}); make them again with `flowaccel stats`") from error


def _imported(path: Path) -> ReferenceSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            _check_declared(path)
            missing = [key for key in ("mu", "sigma") if key not in file]
            if missing:
                raise ValueError(f"it has no {' and no '.join(missing)}, only {', '.join(file) or 'nothing'}")
            mean, covariance = (_real(file[key], key) for key in ("mu", "sigma"))
        moments = Moments.from_mean_covariance(torch.from_numpy(mean), torch.from_numpy(covariance))
        moments.factor  # noqa: B018
    except (OSError, ValueError, TypeError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as statistics ({error}); it must be an npz file with mu (d) and sigma (d, d)"
        ) from error
    return ReferenceSet(name=f"{path} (no fingerprint)", features=None, moments=moments)


def _check_declared(path: Path) -> None:
    """Refuse members that declare more than statistics can hold, before numpy makes room for them."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename in ("mu.npy", "sigma.npy") and member.file_size > _LARGEST:
                raise ValueError(f"{member.filename} declares {member.file_size} bytes; at most {_LARGEST} are read")


def _real(array: Any, name: str) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"{name} must be real numbers")
    return array.astype(np.float64)
