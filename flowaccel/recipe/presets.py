"""Preset names, and everything else that names a recipe."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import nn

from flowaccel.accelerators import (
    CACHE_PRESETS,
    LEVELS,
    Accelerator,
    AgentAttention,
    DynamicWidth,
    GuidanceSkip,
    LearnedPolicy,
    Level,
    LevelCache,
    Mediators,
    MediatorSchedule,
    MixtureOfExperts,
    Sampler,
    SparseAttention,
    VelocityRefiner,
    cache_preset,
)
from flowaccel.accelerators.sampler import SAMPLERS
from flowaccel.errors import WeightsNotFoundError
from flowaccel.recipe.recipe import Recipe
from flowaccel.recipe.storage import holds_recipe, is_hub_id
from flowaccel.samplers import Blocks


def _sampler(name: str, **options: Any) -> Sampler:
    return Sampler(name, options)


def _mediators(**options: Any) -> Mediators:
    """What is no field of the accelerator belongs to its schedule."""
    own = {field.name for field in fields(Mediators)}
    given = {name: value for name, value in options.items() if name in own}
    schedule = {name: value for name, value in options.items() if name not in own}
    if schedule:
        given["schedule"] = MediatorSchedule(**schedule)
    return Mediators(**given)


_WITH_OPTIONS: dict[str, Callable[..., Accelerator]] = {
    **{name: functools.partial(_sampler, name) for name in SAMPLERS if name != "flowturbo"},
    **{name: functools.partial(cache_preset, name) for name in CACHE_PRESETS},
    "guidance_skip": GuidanceSkip,
    "guidance_interval": functools.partial(GuidanceSkip, "interval"),
    "agent_attention": AgentAttention,
    "sparse_attention": SparseAttention,
    "dynamic_width": DynamicWidth,
    "mixture_of_experts": MixtureOfExperts,
    "mediators": _mediators,
    "learned_policy": LearnedPolicy,
}
"""Presets of one accelerator that take options, and what makes it of them."""

PRESETS = {
    "none": "nothing: the pipeline as it is",
    **{name: f"the {name} sampler" for name in SAMPLERS if name != "flowturbo"},
    "flowturbo-BLOCKS": "FlowTurbo with BLOCKS such as H2P4R2; append -consistent or -single for other refiner steps",
    **{name: preset.summary for name, preset in CACHE_PRESETS.items()},
    "guidance_skip": "Stop guiding an image once its conditional and unconditional predictions agree.",
    "agent_attention": "Self-attention of UNets and DiT through pooled queries in the first steps, at high resolution.",
    "sparse_attention": "Attention of SD3, FLUX and SiT without the blocks of least attention, at high resolution.",
    "dynamic_width": "The network with dynamic width that lies beside the pipeline's components, in `width`.",
    "mixture_of_experts": "The network with experts that lies beside the pipeline's components, in `moe`.",
    "learned_policy": "The heads that lie beside the pipeline's components, in `policy`, decide per image and step.",
    "mediators": "The network with mediators that lies beside the pipeline's components, in `mediators`.",
    "guidance_interval": "Guide in one part of the run only, by default its first half.",
    **{
        name: f"the cache calibrated for the model and steps, {speedup}x fewer computed calls; else a generic one"
        for name, speedup in LEVELS.items()
    },
}
"""Preset names and what they are. `@N` after a name asks for N steps; samplers, caches and guidance take options,
`fbcache:threshold=0.1`."""


def preset(name: str) -> Recipe:
    """The recipe of a preset name, such as `heun@8`, `flowturbo-H2P4R2` or `fbcache:threshold=0.1,max_run=3`.

    Raises:
        ValueError: unknown name; the message names the nearest ones. Or an option that the preset does not take.
    """
    stem, at, steps = name.partition("@")
    if at and not re.fullmatch(r"0*[1-9][0-9]*", steps):
        raise ValueError(f"the part after @ must be a number of steps, at least 1, got {name!r}")
    count = int(steps) if at else None
    if stem == "none":
        return Recipe(name=name, num_inference_steps=count)
    if stem in LEVELS:
        return Recipe([LevelCache(cast(Level, stem))], name=name, num_inference_steps=count)
    kind, colon, options_text = stem.partition(":")
    if kind in _WITH_OPTIONS:
        return Recipe([_with_options(kind, options_text)], name=name, num_inference_steps=count)
    if colon and kind in PRESETS:
        raise ValueError(
            f"preset {kind!r} takes no options, got {name!r}; those that do are {', '.join(_WITH_OPTIONS)}"
        )
    match = re.fullmatch(r"flowturbo-([^-]+)(?:-(released|consistent|single))?", stem)
    if match:
        options = {"blocks": match[1], "refiner_mode": match[2] or "released"}
        sampler = Sampler("flowturbo", options)
        parts: list[Accelerator] = [sampler] if _refines_nothing(match[1]) else [sampler, VelocityRefiner()]
        return Recipe(parts, name=name, num_inference_steps=count)
    near = difflib.get_close_matches(stem, PRESETS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"unknown recipe {name!r}: {hint}presets are {', '.join(PRESETS)}; or give a recipe file or folder, "
        "or a Hub id (OWNER/NAME)"
    )


def _with_options(name: str, text: str) -> Accelerator:
    """`threshold=0.1,parity` after the colon; values are JSON, or else text."""
    options: dict[str, Any] = {}
    for part in _separate(text) if text else ():
        key, equals, value = part.partition("=")
        if not key.isidentifier():
            raise ValueError(f"options of {name!r} look like threshold=0.1,max_run=3,parity, got {text!r}")
        options[key] = _value(value) if equals else True
    try:
        return _WITH_OPTIONS[name](**options)
    except TypeError as error:
        raise ValueError(f"preset {name!r}: {error}") from error


def _separate(text: str) -> list[str]:
    """At commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    for read in (json.loads, float):  # JSON knows no .3
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _refines_nothing(blocks: str) -> bool:
    return Blocks.parse(blocks).refine == 0


# not the sign of a number's exponent, as in threshold=1e+9
_JOIN = re.compile(r"\s*\+\s*(?=[A-Za-z_./~])")

RecipeLike = Recipe | Accelerator | Sequence[Accelerator] | str | Path


def resolve(recipe: RecipeLike) -> Recipe:
    """Whatever names a recipe, as a `Recipe`: itself, an accelerator, a list of them, or a text or path.

    A text is, in this order, a file or folder, several of what follows joined by `+` (`ab2@12+guidance_skip`), a preset
    name, or a Hub id (OWNER/NAME).

    Raises:
        RecipeConflictError: what is joined does not go together.
        ValueError, TypeError, FileNotFoundError: it names none.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Accelerator):
        return Recipe([recipe], name=recipe.name)
    if isinstance(recipe, Path) or (isinstance(recipe, str) and Path(recipe).exists()):
        return Recipe.from_pretrained(recipe)
    if isinstance(recipe, str) and len(parts := _JOIN.split(recipe)) > 1:
        return joined(recipe, [resolve(part) for part in parts])
    if isinstance(recipe, str):
        return _from_hub(recipe) if is_hub_id(recipe) else preset(recipe)  # no preset has a slash
    if isinstance(recipe, (list, tuple)) and all(isinstance(part, Accelerator) for part in recipe):
        return Recipe(recipe)
    if isinstance(recipe, nn.Module):
        raise TypeError(
            f"recipe must be a Recipe or an accelerator, got the network {type(recipe).__name__}; put it in its "
            "accelerator, such as LearnedPolicy(network) or VelocityRefiner(network)"
        )
    raise TypeError(
        f"recipe must be a Recipe, an accelerator, a list of them, a preset name, a path or a Hub id, got {recipe!r}"
    )


def joined(name: str, recipes: Sequence[Recipe]) -> Recipe:
    """One recipe of the accelerators of several, in their order.

    Raises:
        ValueError: they ask for different numbers of steps, or were made for different networks.
        RecipeConflictError: they do not go together.
    """
    counts = {recipe.num_inference_steps for recipe in recipes if recipe.num_inference_steps is not None}
    if len(counts) > 1:
        raise ValueError(f"recipe {name!r} joins parts with different numbers of steps: {sorted(counts)}")
    bases = [recipe.base for recipe in recipes if recipe.base is not None]
    if any(base != bases[0] for base in bases):
        raise ValueError(f"recipe {name!r} joins parts that were made for different networks: {bases}")
    accelerators = [part for recipe in recipes for part in recipe.accelerators]
    return Recipe(accelerators, name=name, num_inference_steps=next(iter(counts), None), base=next(iter(bases), None))


def _from_hub(repo_id: str) -> Recipe:
    try:
        return Recipe.from_pretrained(repo_id)
    except WeightsNotFoundError as error:
        raise WeightsNotFoundError(
            f"cannot get recipe {repo_id!r}: there is no file or folder of that name here, no preset ("
            f"{', '.join(PRESETS)}), and on the Hub: {error}"
        ) from error


def saved_recipe(path_or_id: str | Path, **hub: Any) -> Recipe | None:
    """The recipe that lies beside the components of a saved pipeline, or None.

    Args:
        path_or_id: the pipeline's folder, or its Hub id.
        hub: `revision`, `cache_dir`, `local_files_only` and `token`, for the Hub.

    Raises:
        ValueError, FileNotFoundError: there is one, and it cannot be read; or the Hub cannot be asked.
    """
    return Recipe.from_pretrained(path_or_id, **hub) if holds_recipe(path_or_id, **hub) else None
