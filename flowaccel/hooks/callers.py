"""Detection of the caller: the pipeline, or the user's own loop, that calls a network or a scheduler.

A pipeline does not identify itself in its calls, but the stack does: the pipeline's own frames are on it, those of a
second pipeline are further inside, and another thread has another stack.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from diffusers import ConfigMixin

from flowaccel.hooks.pipeline import Pipeline

_LIBRARIES = ("flowaccel.hooks", "torch", "diffusers", "accelerate")


@dataclass(frozen=True)
class Caller:
    """A running call of a pipeline, or a loop of the user's own."""

    thread: int
    frame: int
    """Identity (`id`) of the frame of the pipeline's call, or of the user's function."""
    code: CodeType | None
    own_loop: bool
    """Whether the call stack holds no pipeline."""

    def is_same(self, other: Caller) -> bool:
        """Return whether both are the same pipeline call, even if resumed elsewhere, or loops in the same thread."""
        if self.own_loop or other.own_loop:
            return self.own_loop and other.own_loop and self.thread == other.thread
        return (self.frame, self.code) == (other.frame, other.code)

    def owns(self, other: Caller) -> bool:
        """Return whether calls of `other` belong to a run that this caller started.

        A loop of the user's own also owns the calls of a pipeline in its thread.
        """
        return self.is_same(other) or (self.own_loop and self.thread == other.thread)

    def is_running(self, pipe: Pipeline) -> bool:
        """Return whether the frame is on any thread's stack; `pipe` tells it from a later frame at the same address."""
        return any(
            id(frame) == self.frame and frame.f_code is self.code and (self.own_loop or _is_part(_self_of(frame), pipe))
            for innermost in sys._current_frames().values()
            for frame, _ in _stack(innermost)
        )


def caller_of(pipe: Pipeline) -> Caller | None:
    """Return the call of `pipe` that the current function runs in, if any.

    It is the user's own loop if no pipeline is on the stack, and None within a call of another pipeline or a callback.
    """
    found = user = None
    for frame, inner in _stack(sys._getframe(1)):
        owner = _self_of(frame)
        if owner is not None and _is_pipeline(owner):
            if not _is_part(owner, pipe):
                break
            if _calls_back(frame, inner):
                return None
            found = frame
            if owner is pipe and frame.f_code.co_name == "__call__":
                break
        elif user is None and not _module(frame).startswith(_LIBRARIES):
            user = frame
    else:
        if found is None:
            code = None if user is None else user.f_code
            return Caller(threading.get_ident(), id(user), code, own_loop=True)
    return None if found is None else Caller(threading.get_ident(), id(found), found.f_code, own_loop=False)


def is_called(pipe: Pipeline) -> bool:
    """Return whether another thread is in a call of `pipe`, or this thread is in a callback of such a call."""
    return any(
        frame.f_code.co_name == "__call__"
        and _self_of(frame) is pipe
        and (thread != threading.get_ident() or _calls_back(frame, inner))
        for thread, innermost in sys._current_frames().items()
        for frame, inner in _stack(innermost)
    )


def _stack(frame: FrameType | None) -> Iterator[tuple[FrameType, FrameType | None]]:
    """Yield the frames from the innermost outwards, each with the frame that it called."""
    inner = None
    while frame is not None:
        yield frame, inner
        inner, frame = frame, frame.f_back


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _self_of(frame: FrameType) -> Any:
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] != "self" or _module(frame).startswith("torch."):
        return None
    return frame.f_locals.get("self")


def _is_part(owner: Any, pipe: Pipeline) -> bool:
    """Return whether an object is the pipeline or one of its attributes."""
    return owner is pipe or any(value is owner for value in vars(pipe).values())


def _is_pipeline(owner: Any) -> bool:
    return isinstance(owner, ConfigMixin) and isinstance(getattr(type(owner), "components", None), property)


def _calls_back(frame: FrameType, inner: FrameType | None) -> bool:
    """Return whether a pipeline's frame called one of its callback arguments."""
    return inner is not None and any(
        name.startswith("callback") and _code_of(value) is inner.f_code for name, value in frame.f_locals.items()
    )


def _code_of(function: Any) -> CodeType | None:
    while hasattr(function, "func"):  # a partial
        function = function.func
    if not hasattr(function, "__code__"):
        function = inspect.getattr_static(function, "__call__", None)
    return getattr(function, "__code__", None)
