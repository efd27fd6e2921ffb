"""Conversion of everything that denotes a recipe into a `Recipe`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flowaccel import zoo
from flowaccel.errors import WeightsNotFoundError
from flowaccel.recipe import registry
from flowaccel.recipe.accelerator import Accelerator
from flowaccel.recipe.grammar import parse_term, split_joined
from flowaccel.recipe.presets import NONE, PRESETS, find_preset
from flowaccel.recipe.recipe import Recipe
from flowaccel.recipe.storage import holds_recipe, is_hub_id

RecipePart = Recipe | Accelerator | str | Path
RecipeLike = RecipePart | Sequence[RecipePart]


def resolve(recipe: RecipeLike) -> Recipe:
    """Return the recipe that a name, an object or a folder denotes.

    Args:
        recipe: a recipe; an accelerator; a path; a text; or a list of these, which are joined. A text is, in this
            order, a file or folder, several texts joined by `+` (`ab2@12+guidance_skip`), `zoo:NAME`, a preset name
            (see `flowaccel.recipe.grammar`), or a Hub id (OWNER/NAME).

    Raises:
        RecipeConflictError: the joined recipes are incompatible.
        ValueError, TypeError, FileNotFoundError: it denotes no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Accelerator):
        return Recipe([recipe], name=recipe.name)
    if isinstance(recipe, (str, Path)):
        return _named(recipe)
    if isinstance(recipe, (list, tuple)) and all(isinstance(part, Accelerator) for part in recipe):
        return Recipe(recipe)
    if isinstance(recipe, (list, tuple)):
        parts = [resolve(part) for part in recipe]
        return joined("+".join(part.name for part in parts), parts)
    if isinstance(recipe, nn.Module):
        raise TypeError(
            f"recipe must be a Recipe or an accelerator, got the network {type(recipe).__name__}; put it in its "
            "accelerator, such as LearnedPolicy(network) or VelocityRefiner(network)"
        )
    raise TypeError(
        f"recipe must be a Recipe, an accelerator, a list of them, a preset name, a path, zoo:NAME or a Hub id, got "
        f"{recipe!r}"
    )


def _named(name: str | Path) -> Recipe:
    if isinstance(name, Path) or Path(name).exists():
        return Recipe.from_pretrained(name)
    if len(parts := split_joined(name)) > 1:
        return joined(name, [resolve(part) for part in parts])
    if name.startswith(zoo.PREFIX):
        return Recipe.from_pretrained(zoo.recipe_folder(name))
    return _from_hub(name) if is_hub_id(name) else preset(name)  # no preset has a slash


def preset(name: str) -> Recipe:
    """Return the recipe of a preset name, such as `heun@8`, `flowturbo-H2P4R2` or `fbcache:threshold=0.1,max_run=3`.

    Raises:
        ValueError: unknown name; the message names the nearest ones. Or an option that the preset does not take.
    """
    term = parse_term(name)
    if term.name == NONE and not term.options:
        return Recipe(name=name, num_inference_steps=term.steps)
    if term.name == NONE:
        raise _no_options(name, NONE)
    found, told = find_preset(term.name, name)
    if term.options and not found.options:
        raise _no_options(name, term.name)
    try:
        made = registry.load(found.make)(**found.arguments, **told, **term.options)
    except TypeError as error:
        raise ValueError(f"preset {term.name!r}: {error}") from error
    return Recipe(made if isinstance(made, list) else [made], name=name, num_inference_steps=term.steps)


def _no_options(name: str, stem: str) -> ValueError:
    takers = [known for known, found in registry.entries("presets").items() if found.options]
    return ValueError(f"preset {stem!r} takes no options, got {name!r}; those that do are {', '.join(takers)}")


def joined(name: str, recipes: Sequence[Recipe]) -> Recipe:
    """Return one recipe with the accelerators of several, in their order.

    Raises:
        ValueError: they ask for different numbers of steps, or were made for different networks.
        RecipeConflictError: they are incompatible.
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
    """Return the recipe saved with a pipeline, or None.

    Args:
        path_or_id: the pipeline's folder, zoo:NAME, or its Hub id.
        hub: `revision`, `cache_dir`, `local_files_only` and `token`, for the Hub.

    Raises:
        ValueError, FileNotFoundError: there is one, and it cannot be read; or the Hub cannot be asked.
    """
    path_or_id = zoo.located(path_or_id)
    return Recipe.from_pretrained(path_or_id, **hub) if holds_recipe(path_or_id, **hub) else None
