"""Embedded data sets for training the parts of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import StableDiffusion3Pipeline

from flowaccel import zoo
from flowaccel.data import DATASETS, CaptionedSet, ImageSet
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import Pipeline
from flowaccel.pipelines import SiTPipeline
from flowaccel.training.text_to_image import prompted_data

FLOW_PIPELINES = (SiTPipeline, StableDiffusion3Pipeline)


def known_data(name: str) -> str:
    """Return the name of an embedded data set; raises ValueError for another."""
    if name not in DATASETS:
        raise ValueError(f"--data must be one of {sorted(DATASETS)}, got {name!r}")
    return name


def training_data(
    pipe: str, pipeline: Pipeline, data_set: str, kinds: tuple[Any, ...] = FLOW_PIPELINES
) -> tuple[ImageSet, Callable[[Any], Any]]:
    """Return the training data of a pipeline of one of `kinds`, and a function that adapts its networks to it.

    Raises:
        ValueError: images without what the pipeline is conditioned on, or that its network does not take.
        UnsupportedModelError: another pipeline.
    """
    if not isinstance(pipeline, kinds):
        *others, last = (f"a {kind.__name__}" for kind in kinds)
        listed = f"{', '.join(others)} or {last}" if others else last
        raise UnsupportedModelError(f"this trains parts of {listed}, got a {type(pipeline).__name__}")
    data = DATASETS[data_set]("generator")
    if not isinstance(pipeline, StableDiffusion3Pipeline):
        if not isinstance(data, ImageSet):
            raise ValueError(f"--data {data_set} has captions, and a {type(pipeline).__name__} takes classes")
        _check_fit(data, data_set, pipeline.transformer)
        return data, lambda network: network
    if not isinstance(data, CaptionedSet):
        raise ValueError(f"--data {data_set} has no captions, and a {type(pipeline).__name__} takes prompts")
    called = zoo.entry(pipe).arguments if pipe.startswith(zoo.PREFIX) else {}
    default = inspect.signature(pipeline.__call__).parameters["max_sequence_length"].default
    prompted = prompted_data(pipeline, data, called.get("max_sequence_length", default))
    return prompted.latents, prompted.wrap


def _check_fit(data: ImageSet, data_set: str, network: Any) -> None:
    """Raise a ValueError unless a class-conditional network takes such images and classes."""
    size = network.config.sample_size
    wanted, found = (network.config.in_channels, size, size), tuple(data.images.shape[1:])
    if found != wanted:
        raise ValueError(
            f"--data {data_set} has images of shape {found}, and the network of this pipeline takes {wanted}"
        )
    if (classes := int(data.labels.max()) + 1) > null_label(network):
        raise ValueError(
            f"--data {data_set} has {classes} classes, and the network of this pipeline knows {null_label(network)}"
        )


def null_label(network: Any) -> int:
    """Return the label of the unconditional class."""
    found: int = getattr(network, "null_label", None) or network.config.num_embeds_ada_norm
    return found
