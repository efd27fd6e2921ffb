"""Loading any diffusers pipeline, flowaccel's own classes included, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from flowaccel.pipelines.sit import SiTPipeline
from flowaccel.errors import UnsupportedModelError, WeightsNotFoundError


_OWN = {kind.__name__: kind for kind in (SiTPipeline,)}


def load_pipeline(
    path: str | Path, *, torch_dtype: torch.dtype | None = None, device: str | None = None
) -> DiffusionPipeline:
    """The pipeline in a folder or on the Hub, as an instance of the class that its `model_index.json` names.

    Args:
        path: a folder with `model_index.json`, or a Hub id.
        torch_dtype: dtype of the weights; None means float32.
        device: where to put it; None leaves it on the CPU.

    Raises:
        WeightsNotFoundError: neither a pipeline folder nor to be had from the Hub.
        UnsupportedModelError: its class is neither diffusers' nor flowaccel's.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsNotFoundError(f"{path} is not a pipeline: it has no model_index.json")
    try:
        class_name = DiffusionPipeline.load_config(str(path))["_class_name"]
        pipeline_class = _OWN.get(class_name) or getattr(diffusers, class_name, None)
        if pipeline_class is None:
            raise UnsupportedModelError(f"{path} needs the class {class_name!r}, which neither flowaccel nor diffusers has")
        pipe: Any = pipeline_class.from_pretrained(str(path), torch_dtype=torch_dtype or torch.float32)
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise WeightsNotFoundError(
            f"cannot load {path}: it is no folder here, and the Hub did not give it ({reason}). Give the path of a pipeline "
            "folder, or download it first on a machine with network"
        ) from error
    return pipe if device is None else pipe.to(device)
