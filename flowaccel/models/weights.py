"""Checks of weights wherever they are loaded: which files they are in, how many, and that all are finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowaccel.errors import CheckpointError

_FEWEST_LAYERS = 1000
_COUNTS = ("layer", "depth", "block", "expert")
_SIZES, _LARGEST = ("size", "dim", "channel", "width", "head", "feature"), 2**20


def check_folder(folder: Path) -> None:
    """Check the JSON files of a network or a pipeline for what they select, before a library builds anything from them.

    Raises:
        CheckpointError: an index names shards that are no safetensors files beside it (libraries would unpickle them
            or read elsewhere), or a configuration declares more layers than its weights have tensors, or
            sizes that no network has.
    """
    for index in sorted(folder.rglob("*.index.json")):
        shards = _read(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) and shards else {None}
        wrong = [name for name in names if not _is_shard(name)]
        if wrong:
            raise CheckpointError(
                f"{index} must name .safetensors files beside it in weight_map, got {wrong[0]!r}; other files are not "
                "read. Download the folder again, or save the network with save_pretrained"
            )
    for config in sorted(folder.rglob("config.json")):
        weights = sorted(config.parent.glob("*.safetensors"))
        if weights:
            _check_counts(config, max(_FEWEST_LAYERS, sum(map(_tensors, weights))))


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and not {"/", "\\", ":"} & set(name)


def _check_counts(config: Path, most: int) -> None:
    for name, value in _read(config).items():
        limit = most if any(part in name for part in _COUNTS) else _LARGEST
        if isinstance(value, int) and value > limit and any(part in name for part in (*_COUNTS, *_SIZES)):
            raise CheckpointError(
                f"{config} declares {name}={value}, above the {limit} that it can be for the weights beside it; copy "
                "it again from its source"
            )


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} must hold an object, got {type(found).__name__}")
    return found


def _tensors(file: Path) -> int:
    try:
        with safe_open(file, "pt") as weights:
            return len(weights.keys())
    except (OSError, SafetensorError):
        return 0  # its loader reports the error


def not_finite(network: nn.Module) -> str | None:
    """Return the name of the first parameter that holds NaN or infinity, or None."""
    return next((name for name, value in network.named_parameters() if not is_finite(value)), None)


def is_finite(values: Tensor) -> bool:
    """Return whether all of `values` are finite, without a copy as large as they are."""
    if values.device.type == "meta" or not values.numel() or not values.is_floating_point():
        return True
    if values.element_size() == 1:  # float8 has no minimum
        values = values.float()
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())


def check_finite(network: nn.Module, where: Any) -> None:
    """Raise a CheckpointError if a parameter of a network that was loaded from `where` holds NaN or infinity."""
    name = not_finite(network)
    if name is not None:
        raise CheckpointError(
            f"the weights in {where} are damaged: {name} holds NaN or infinity. Copy them again from their source, or "
            "train them again"
        )
