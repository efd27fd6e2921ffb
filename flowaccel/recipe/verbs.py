"""Functions that attach a recipe to a pipeline and detach it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from flowaccel.errors import RecipeConflictError
from flowaccel.hooks import Pipeline, close_session, lend, open_session, require_idle, session_of, swapped, wrap
from flowaccel.recipe.recipe import Recipe
from flowaccel.recipe.resolution import RecipeLike, resolve

_ATTACHED = "_flowaccel_attached"
_TURNS = threading.RLock()  # serialises accelerate and restore, also of pipelines that share networks

P = TypeVar("P", bound=Pipeline)


class _Attachment(NamedTuple):
    """The recipe and the undo functions that are stored on an accelerated pipeline."""

    recipe: Recipe
    undo: ExitStack


def accelerate(pipe: P, recipe: RecipeLike) -> P:
    """Accelerate `pipe` in place; `restore` undoes it exactly.

    Until then, `pipe.save_pretrained(folder)` writes the original components, the recipe and its learned parts: a
    folder that plain diffusers loads as the original pipeline, and `AcceleratedPipeline` as this one.

    Args:
        pipe: a diffusers pipeline.
        recipe: a `Recipe`, an accelerator, a preset name, the path of a saved recipe, zoo:NAME, a Hub id, or a list of
            these; see `flowaccel.recipe.resolve`.

    Returns:
        `pipe`.

    Raises:
        RecipeConflictError: the pipeline is accelerated already, or the recipe was made for another configuration.
        PipelineBusyError: it is being called.
        ValueError: the recipe does not fit; the pipeline is left as it was.
    """
    with _TURNS, ExitStack() as undo:
        if is_accelerated(pipe):
            raise RecipeConflictError("the pipeline is accelerated already; call flowaccel.restore(pipe) first")
        require_idle(pipe, "accelerate")
        chosen = resolve(recipe).loaded(pipe)
        before = dict(pipe.components)
        undo.callback(close_session, pipe)
        session = open_session(pipe)
        with session.idle(), ExitStack() as attached:
            for accelerator in chosen.accelerators:
                attached.callback(accelerator.attach(pipe))
            session.follow()  # wrap the swapped components
            after = pipe.components
            changes = {name: (old, after[name]) for name, old in before.items() if after[name] is not old}
            attached.callback(swapped(pipe, changes))
            attached.callback(wrap(pipe, "save_pretrained", _saving(pipe, chosen)).remove)
            undo.push(attached.pop_all())
            lasting = undo.pop_all()
            lasting.callback(lend(pipe, _ATTACHED, _Attachment(chosen, lasting)))
    return pipe


def is_accelerated(pipe: Pipeline) -> bool:
    """Return whether `pipe` is accelerated."""
    return _ATTACHED in pipe.__dict__


def restore(pipe: P) -> P:
    """Undo `accelerate` on `pipe`, if it is accelerated, and return it.

    Raises:
        PipelineBusyError: it is being called.
    """
    with _TURNS:
        if is_accelerated(pipe):
            require_idle(pipe, "restore")
            with session_of(pipe).idle():
                pipe.__dict__[_ATTACHED].undo.close()
    return pipe


def recipe_of(pipe: Pipeline) -> Recipe:
    """Return the recipe that `pipe` is accelerated with, an empty one if it is not."""
    attached = pipe.__dict__.get(_ATTACHED)
    return Recipe() if attached is None else attached.recipe


@contextmanager
def accelerated(pipe: P, recipe: RecipeLike) -> Iterator[P]:
    """Accelerate a pipeline within a `with` statement; it is restored at the end, even on an exception."""
    accelerate(pipe, recipe)
    try:
        yield pipe
    finally:
        restore(pipe)


def _saving(pipe: Pipeline, recipe: Recipe) -> Callable[..., Any]:
    """Return a wrapper of `pipe.save_pretrained`."""

    def interceptor(save_pretrained: Callable[..., Any], save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # First, so that push_to_hub, which is the end of save_pretrained, finds it in the folder.
        recipe.save_beside(Path(save_directory), taken=pipe.components)
        return copy.copy(pipe).save_pretrained(save_directory, *args, **kwargs)

    return interceptor
