"""Errors that a user can meet. Every one is also a built-in exception, so that `except ValueError` keeps working."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlowaccelError(Exception):
    """Base class of the errors that flowaccel raises on purpose."""


class CheckpointError(FlowaccelError, ValueError):
    """A weight file is truncated, foreign, hostile or does not fit the model. Nothing was changed."""


class UnnamedCodeError(FlowaccelError, ValueError):
    """A file asks for code to be run, which the person at work has not named: files choose data, never code."""

    def __init__(self, where: str, option: str, name: str) -> None:
        self.reason: str = (
            f"{where} asks for the {option} network {name!r}, and loading that runs code, which a file may not choose"
        )
        super().__init__(
            f"{self.reason}; if you trust it, name it yourself: {option}={name!r}, on the command line "
            f"--{option} {name}"
        )
        self.option, self.name = option, name


class UnsupportedModelError(FlowaccelError, ValueError):
    """An accelerator was asked to work on a network or a pipeline that it does not know."""


class RecipeConflictError(FlowaccelError, ValueError):
    """Two accelerators, or an accelerator and the pipeline's present state, exclude each other."""


class PipelineBusyError(FlowaccelError, RuntimeError):
    """A pipeline was called, accelerated or restored while a call of it was going on. That call goes on unharmed."""


class MissingExtraError(FlowaccelError, ImportError):
    """An optional dependency is missing or broken. The message names the extra to install."""


class WeightsNotFoundError(FlowaccelError, FileNotFoundError):
    """Weights are neither on disk nor in the cache, and cannot be downloaded."""


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, prefix: str = "") -> str:
    """Return `"did you mean 'x'? "` with the nearest of the `known` names for a message, or nothing where none is near.

    Args:
        name: what was given.
        known: what is allowed.
        most: how many to name, at most.
        cutoff: how near they must be, from 0 to 1 (the same).
        prefix: put before the names that are found.
    """
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(repr(prefix + found) for found in near)}? " if near else ""
