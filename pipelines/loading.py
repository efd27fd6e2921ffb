"""Loading of any diffusers pipeline, including flowaccel's own classes, from a folder or the Hub."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from flowaccel import zoo
from flowaccel.errors import CheckpointError, UnsupportedModelError, WeightsNotFoundError
from flowaccel.models.weights import check_folder
from flowaccel.pipelines.sit import SiTPipeline
from flowaccel.pipelines.sit_image import SiTImg2ImgPipeline, SiTInpaintPipeline

_OWN = {kind.__name__: kind for kind in (SiTPipeline, SiTImg2ImgPipeline, SiTInpaintPipeline)}
# Each would read pickled weights or run code that came with the weights.
_REFUSED = {"use_safetensors": False, "trust_remote_code": True}
_LIBRARIES = ("diffusers", "transformers", "flowaccel")
_OF_THE_HUB = ("revision", "cache_dir", "local_files_only", "token", "force_download", "proxies")


def load_pipeline(
    path: str | Path,
    *,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Load the pipeline in a folder or on the Hub as an instance of the class that its `model_index.json` names.

    Args:
        path: a folder with `model_index.json`, zoo:NAME, or a Hub id.
        torch_dtype: dtype of the weights; None means float32.
        dtype: another name for `torch_dtype`, as in diffusers.
        device: where to put it; None leaves it on the CPU.
        kwargs: further arguments of diffusers' `from_pretrained`: components (`transformer=...`,
            `text_encoder_3=None`), `variant`, `revision`, `cache_dir`, `local_files_only` and others.

    Raises:
        WeightsNotFoundError: neither a pipeline folder nor to be had from the Hub.
        UnsupportedModelError: its class is no pipeline of diffusers or flowaccel, or a component of another library.
        CheckpointError: its files are damaged, name other files than safetensors, or declare what cannot be built.
        ValueError: an argument that would read pickles or run foreign code, or two dtypes.
    """
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise ValueError(f"dtype is {dtype} and torch_dtype is {torch_dtype}; give one of them")
    path = zoo.located(path)
    folder = Path(path)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise WeightsNotFoundError(f"{path} is not a pipeline: it has no model_index.json")
    _check_safe(kwargs)
    try:
        of_the_hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
        index = DiffusionPipeline.load_config(str(path), **of_the_hub)
        pipeline_class = _pipeline_class(path, index)
        for name, component in index.items():
            if isinstance(component, (list, tuple)) and name not in kwargs:
                _check_component(path, name, component)
        if folder.exists():
            check_folder(folder)
        # diffusers saves a pipeline without its third text encoder, but loads it only if told so again.
        absent = {name: None for name, component in index.items() if component in ([None, None], (None, None))}
        # Without use_safetensors diffusers falls back to pickled weights where the safetensors file is missing.
        options = {**absent, **kwargs, "dtype": dtype or torch_dtype or torch.float32, "use_safetensors": True}
        pipe = pipeline_class.from_pretrained(str(path), **options)
    except OSError as error:
        reason = str(error).split("\n")[0]
        if folder.exists():
            raise WeightsNotFoundError(f"cannot load {path}: the folder is incomplete or damaged ({reason})") from error
        raise WeightsNotFoundError(
            f"cannot load {path}: it is no folder here, and the Hub did not give it ({reason}). Give the path of a "
            "pipeline folder, or download it first on a machine with network"
        ) from error
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"cannot load {path}: a component cannot be built or does not fit its weights ({reason})"
        ) from error
    return pipe if device is None else pipe.to(device)


def _check_safe(kwargs: dict[str, Any]) -> None:
    for name, refused in _REFUSED.items():
        if name in kwargs and kwargs[name] is not None and bool(kwargs[name]) is refused:
            raise ValueError(
                f"{name}={refused} is not allowed: flowaccel reads safetensors and JSON only and runs no foreign code; "
                "leave it out"
            )
    if kwargs.get("custom_pipeline") is not None:
        raise ValueError(
            "custom_pipeline is not allowed: flowaccel runs no code that comes with weights; load the pipeline with "
            "diffusers and call flowaccel.accelerate(pipe, recipe)"
        )


def _pipeline_class(path: str | Path, index: Any) -> Any:
    name = index.get("_class_name") if isinstance(index, dict) else None
    found = _OWN.get(name) or getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, DiffusionPipeline)):
        raise UnsupportedModelError(f"{path} needs the class {name!r}, which is no pipeline of flowaccel or diffusers")
    return found


def _check_component(path: str | Path, name: str, component: Sequence[Any]) -> None:
    """Refuse a component of any module but the libraries', because naming a module would import it."""
    if not any(isinstance(part, str) for part in component):
        return
    library, kind = component if len(component) == 2 else (None, None)
    if not isinstance(library, str) or not isinstance(kind, str):
        raise UnsupportedModelError(f"{path} must name a library and a class for {name!r}, got {list(component)!r}")
    if library in _LIBRARIES:
        found = getattr(importlib.import_module(library), kind, diffusers.ModelMixin)  # diffusers knows old names too
    else:  # a folder of diffusers.pipelines, or a module that the caller imported already
        found = getattr(getattr(diffusers.pipelines, library, sys.modules.get(library)), kind, None)
    if not isinstance(found, type) or issubclass(found, (DiffusionPipeline, diffusers.OnnxRuntimeModel)):
        raise UnsupportedModelError(
            f"{path} needs {library}.{kind} for {name!r}, which is no network, scheduler, tokenizer or processor of "
            f"{', '.join(_LIBRARIES)}: no other module is imported. Make it yourself, and load the pipeline with "
            f"load_pipeline(path, {name}=...)"
        )
