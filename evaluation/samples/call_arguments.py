"""Further keyword arguments of pipeline calls, such as `height` or `negative_prompt`, and their checks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from flowaccel.errors import did_you_mean
from flowaccel.hooks import Pipeline

_CONDITIONS = "use --prompts or --classes (conditions=)"
_SEED = "use --seed (seed=)"
_STEPS = "use --steps (steps=), or a recipe with another sampler"
_OURS = "leave it out"
RESERVED = {
    "prompt": _CONDITIONS,
    "prompt_2": _CONDITIONS,
    "prompt_3": _CONDITIONS,
    "prompt_4": _CONDITIONS,
    "prompt_embeds": _CONDITIONS,
    "pooled_prompt_embeds": _CONDITIONS,
    "class_labels": _CONDITIONS,
    "num_inference_steps": _STEPS,
    "sigmas": _STEPS,
    "timesteps": _STEPS,
    "guidance_scale": "use --guidance-scale (guidance_scale=)",
    "generator": _SEED,
    "latents": _SEED,
    "num_images_per_prompt": "use --num-samples (num_samples=), or --num-images of generate",
    "num_videos_per_prompt": "use --num-samples (num_samples=), or --num-images of generate",
    "output_type": _OURS,
    "return_dict": _OURS,
}
"""Arguments that flowaccel sets itself, and what to do instead of giving them."""


def parameters(pipe: Pipeline) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline call, by name."""
    return inspect.signature(type(pipe).__call__).parameters


def check_names(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError for an argument that flowaccel sets itself, or a value that JSON cannot hold."""
    for name, value in arguments.items():
        if name in RESERVED:
            raise ValueError(f"the pipeline argument {name!r} is set by flowaccel; {RESERVED[name]}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the pipeline argument {name!r} must be a plain number, text, list or object, as JSON has them, got "
                f"{value!r}"
            ) from error


def check_arguments(pipe: Pipeline, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError as `check_names` does, and for an argument that a call of the pipeline does not take."""
    check_names(arguments)
    for name in arguments:
        if name not in parameters(pipe):
            raise unknown_argument(pipe, name, f"the argument {name!r}")


def unknown_argument(pipe: Pipeline, name: str, spelled: str) -> ValueError:
    """Return the error for an argument that a pipeline call does not take; `spelled` is how the user gave it."""
    known = [parameter for parameter in parameters(pipe) if parameter != "self"]
    hint = did_you_mean(name, known)
    return ValueError(f"{type(pipe).__name__} does not take {spelled}; {hint}its arguments are {', '.join(known)}")
