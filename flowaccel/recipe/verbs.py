"""The verbs that put a recipe on a pipeline and take it off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from flowaccel.errors import RecipeConflictError
from flowaccel.hooks import close_session, open_session, wrap
from flowaccel.recipe.presets import RecipeLike, resolve
from flowaccel.recipe.recipe import Recipe

_ATTACHED = "_flowaccel_attached"


class _Attached(NamedTuple):
    """What hangs on an accelerated pipeline."""

    recipe: Recipe
    undo: ExitStack


def accelerate(pipe: Any, recipe: RecipeLike) -> Any:
    """Make `pipe` faster, in place; `restore` undoes it exactly.

    While it is in force, `pipe.save_pretrained(folder)` writes the components of before, the recipe and its learned
    parts: a folder that plain diffusers reads as the untouched pipeline, and `AcceleratedPipeline` as this one.

    Args:
        pipe: a diffusers pipeline.
        recipe: a `Recipe`, an accelerator, a list of them, a preset name, the path of a saved recipe, or a Hub id.

    Returns:
        `pipe`.

    Raises:
        RecipeConflictError: the pipeline is accelerated already, or the recipe was made for another configuration.
        ValueError: the recipe does not fit; the pipeline is left as it was.
    """
    if is_accelerated(pipe):
        raise RecipeConflictError("the pipeline is accelerated already; call flowaccel.restore(pipe) first")
    chosen = resolve(recipe).loaded(pipe)
    before = dict(pipe.components)
    with ExitStack() as undo:
        undo.callback(close_session, pipe)
        session = open_session(pipe)
        for accelerator in chosen.accelerators:
            undo.callback(accelerator.attach(pipe))
        session.follow()  # what was exchanged
        after = pipe.components
        exchanged = {name: (old, after[name]) for name, old in before.items() if after[name] is not old}
        undo.callback(wrap(pipe, "save_pretrained", _saving(pipe, chosen, exchanged)).remove)
        pipe.__dict__[_ATTACHED] = _Attached(chosen, undo.pop_all())
    return pipe


def is_accelerated(pipe: Any) -> bool:
    """Whether `accelerate` is in force on `pipe`."""
    return _ATTACHED in pipe.__dict__


def restore(pipe: Any) -> Any:
    """Make `pipe` what it was before `accelerate`; does nothing to a pipeline that is not accelerated. Returns
    `pipe`.
    """
    if is_accelerated(pipe):
        pipe.__dict__.pop(_ATTACHED).undo.close()
    return pipe


def recipe_of(pipe: Any) -> Recipe:
    """The recipe that is in force on `pipe`, an empty one if none is."""
    attached = pipe.__dict__.get(_ATTACHED)
    return Recipe() if attached is None else attached.recipe


@contextmanager
def accelerated(pipe: Any, recipe: RecipeLike) -> Iterator[Any]:
    """`with accelerated(pipe, recipe): ...` - accelerate, and restore at the end whatever happens."""
    accelerate(pipe, recipe)
    try:
        yield pipe
    finally:
        restore(pipe)


def _saving(pipe: Any, recipe: Recipe, exchanged: Mapping[str, tuple[Any, Any]]) -> Callable[..., Any]:
    """What surrounds `pipe.save_pretrained`; `exchanged` holds the old and the new object of components."""

    def around(save_pretrained: Callable[..., Any], save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # First, so that push_to_hub, which is the end of save_pretrained, finds it in the folder.
        recipe.save_beside(Path(save_directory), taken=pipe.components)
        with ExitStack() as undo:
            for name, (old, new) in exchanged.items():
                if getattr(pipe, name) is new:  # and not what the user put there meanwhile
                    setattr(pipe, name, old)
                    undo.callback(setattr, pipe, name, new)
            return save_pretrained(save_directory, *args, **kwargs)

    return around
