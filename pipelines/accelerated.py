"""Loading of a diffusers pipeline with a recipe by one `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from flowaccel.pipelines.loading import load_pipeline
from flowaccel.recipe import HUB_OPTIONS, RecipeLike, accelerate, resolve, saved_recipe


class AcceleratedPipeline:
    """Loads any diffusers pipeline and applies a recipe to it; use it in place of the pipeline's own class.

    It has no instances: `from_pretrained` returns one of the pipeline's own class, so everything that works on that
    class works on it, and `flowaccel.restore(pipe)` gives the untouched pipeline. The number of steps stays an
    argument of the call, also where the recipe has one (`heun@8`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "AcceleratedPipeline has no instances; call AcceleratedPipeline.from_pretrained(path_or_id, recipe=...), "
            "or flowaccel.accelerate(pipe, recipe) on a pipeline that you have"
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        recipe: RecipeLike | None = None,
        torch_dtype: torch.dtype | None = None,
        *,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> DiffusionPipeline:
        """Load a pipeline and accelerate it.

        Args:
            path_or_id: a folder with `model_index.json`, zoo:NAME, or a Hub id.
            recipe: what `flowaccel.accelerate` takes; None takes the `flowaccel.json` beside `model_index.json`, which
                `save_pretrained` of an accelerated pipeline wrote, and without one leaves the pipeline as it is.
            torch_dtype: dtype of the weights; None means float32.
            dtype: another name for `torch_dtype`, as in diffusers.
            kwargs: further arguments of diffusers' `from_pretrained`: components (`transformer=...`,
                `text_encoder_3=None`), `variant`, `revision`, `cache_dir`, `local_files_only` and others.

        Returns:
            An instance of the class that `model_index.json` names.

        Raises:
            WeightsNotFoundError: neither a pipeline folder nor to be had from the Hub.
            UnsupportedModelError: its class is no pipeline of diffusers or flowaccel, or the recipe is for another one.
            ValueError, TypeError, FileNotFoundError: `recipe` names none or does not fit.
        """
        chosen = None if recipe is None else resolve(recipe)  # first, so that a misspelt name is found at once
        pipe = load_pipeline(path_or_id, torch_dtype=torch_dtype, dtype=dtype, **kwargs)
        if recipe is None:
            hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
            chosen = saved_recipe(path_or_id, **hub)
        return pipe if chosen is None else accelerate(pipe, chosen)
