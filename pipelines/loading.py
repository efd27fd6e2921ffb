"""Loading any diffusers pipeline, flowaccel's own classes included, from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from flowaccel.errors import UnsupportedModelError, WeightsNotFoundError
from flowaccel.pipelines.sit import SiTPipeline
from flowaccel.pipelines.sit_image import SiTImg2ImgPipeline, SiTInpaintPipeline

_OWN = {kind.__name__: kind for kind in (SiTPipeline, SiTImg2ImgPipeline, SiTInpaintPipeline)}


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
        UnsupportedModelError: its class is no pipeline of diffusers or flowaccel.
    """
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsNotFoundError(f"{path} is not a pipeline: it has no model_index.json")
    try:
        pipeline_class = _pipeline_class(path, DiffusionPipeline.load_config(str(path)))
        # Without use_safetensors diffusers falls back to pickled weights where the safetensors file is missing.
        pipe = pipeline_class.from_pretrained(str(path), dtype=torch_dtype or torch.float32, use_safetensors=True)
    except OSError as error:
        reason = str(error).split("\n")[0]
        if folder.exists():
            raise WeightsNotFoundError(f"cannot load {path}: the folder is incomplete or damaged ({reason})") from error
        raise WeightsNotFoundError(
            f"cannot load {path}: it is no folder here, and the Hub did not give it ({reason}). Give the path of a "
            "pipeline folder, or download it first on a machine with network"
        ) from error
    return pipe if device is None else pipe.to(device)


def _pipeline_class(path: str | Path, index: Any) -> Any:
    name = index.get("_class_name") if isinstance(index, dict) else None
    found = _OWN.get(name) or getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UnsupportedModelError(f"{path} needs the class {name!r}, which is no pipeline of flowaccel or diffusers")
    return found
