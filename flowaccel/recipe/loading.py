"""Loading of learned networks from the folders that they were saved to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError
from torch import nn

from flowaccel import models
from flowaccel.errors import CheckpointError, WeightsNotFoundError
from flowaccel.hooks import Pipeline
from flowaccel.models.weights import check_finite, check_folder
from flowaccel.recipe.registry import NETWORKS


def beside(pipe: Pipeline | None, name: str, what: str, advice: str) -> Path:
    """Return the folder of a learned part that is stored next to the pipeline's components.

    Args:
        pipe: the pipeline, if there is one.
        name: name of the folder.
        what: name of the part in errors.
        advice: advice in the error if it is missing.

    Raises:
        WeightsNotFoundError: there is none.
    """
    source = "" if pipe is None else pipe.config.get("_name_or_path", "")
    found = Path(str(source)) / name
    if not found.is_dir():
        raise WeightsNotFoundError(f"no {what} at {found}; {advice}")
    return found


def _network_class(name: str) -> Any:
    """Return the class of a network of diffusers, of flowaccel or of one of the methods; None if there is none."""
    if name in NETWORKS:
        return NETWORKS[name]
    return getattr(models, name, None) or getattr(diffusers, name, None)


def load_network(folder: Path, what: str) -> nn.Module:
    """Load a network saved by `save_pretrained`, whatever its class.

    Args:
        folder: folder of the network.
        what: name of the network in errors.

    Raises:
        WeightsNotFoundError: no configuration in `folder`.
        CheckpointError: not a network of diffusers or flowaccel, or its weights are damaged, missing or not finite.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise WeightsNotFoundError(f"no {what} in {folder}: it has no config.json")
    try:
        class_name = json.loads(config_file.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{config_file} is not the configuration of a network: {type(error).__name__}: {error}"
        ) from error
    network_class = _network_class(str(class_name))
    is_network = isinstance(network_class, type) and issubclass(network_class, diffusers.ModelMixin)
    if not is_network:
        raise CheckpointError(
            f"{config_file} names the class {class_name!r}, which is no network that flowaccel or diffusers has"
        )
    check_folder(folder)
    try:
        network, info = network_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError, SafetensorError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"cannot load the {what} in {folder} ({type(error).__name__}: {reason})") from error
    misfits = [*info["missing_keys"], *info["unexpected_keys"]]
    if misfits:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json: {len(misfits)} entries missing or unexpected, "
            f"{', '.join(sorted(misfits)[:3])} among them"
        )
    check_finite(network, folder)
    return network
