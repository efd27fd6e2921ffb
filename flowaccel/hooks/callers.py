"""Whose call it is: which pipeline, or which loop of the user's own, called a network or a scheduler.

Nothing that a pipeline calls is told by whom. The stack knows: the pipeline's own frames are on it, those of a second
pipeline are further inside, and another thread has another stack.
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

_LIBRARIES = ("flowaccel.hooks", "torch", "diffusers", "accelerate")


@dataclass(frozen=True)
class Caller:
    """A call of a pipeline that is going on, or a loop of the user's own."""

    thread: int
    frame: int
    """Identity of the frame of the pipeline's call, or of the user's function."""
    code: CodeType | None
    own_loop: bool
    """Whether no pipeline is among the callers."""

    def is_same(self, other: Caller) -> bool:
        """Whether both are one call of a pipeline, wherever it is resumed, or loops in one thread."""
        if self.own_loop or other.own_loop:
            return self.own_loop and other.own_loop and self.thread == other.thread
        return (self.frame, self.code) == (other.frame, other.code)

    def owns(self, other: Caller) -> bool:
        """Whether calls of `other` belong to a run that this one started: to that of a loop of the user's own belong
        those of a pipeline that it calls, too."""
        return self.is_same(other) or (self.own_loop and self.thread == other.thread)

    def is_running(self, pipe: Any) -> bool:
        """Whether its frame is on the stack of any thread; `pipe` tells it from a later frame in the same memory."""
        return any(
            id(frame) == self.frame and frame.f_code is self.code and (self.own_loop or _is_part(_self_of(frame), pipe))
            for innermost in sys._current_frames().values()
            for frame, _ in _stack(innermost)
        )


def caller_of(pipe: Any) -> Caller | None:
    """The call of `pipe` that the present function is called in, or the user's own loop if no pipeline is among the
    callers; None in a call of another pipeline, or in a callback.
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


def is_called(pipe: Any) -> bool:
    """Whether another thread is in a call of `pipe`, or this one is in a callback of such a call."""
    return any(
        frame.f_code.co_name == "__call__"
        and _self_of(frame) is pipe
        and (thread != threading.get_ident() or _calls_back(frame, inner))
        for thread, innermost in sys._current_frames().items()
        for frame, inner in _stack(innermost)
    )


def _stack(frame: FrameType | None) -> Iterator[tuple[FrameType, FrameType | None]]:
    """Frames from the innermost on, each with the one that it called."""
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


def _is_part(owner: Any, pipe: Any) -> bool:
    """Whether an object is a pipeline, or one of those that it is made of."""
    return owner is pipe or any(value is owner for value in vars(pipe).values())


def _is_pipeline(owner: Any) -> bool:
    return isinstance(owner, ConfigMixin) and isinstance(getattr(type(owner), "components", None), property)


def _calls_back(frame: FrameType, inner: FrameType | None) -> bool:
    """Whether a pipeline's frame called a callback that it was given."""
    return inner is not None and any(
        name.startswith("callback") and _code_of(value) is inner.f_code for name, value in frame.f_locals.items()
    )


def _code_of(function: Any) -> CodeType | None:
    while hasattr(function, "func"):  # of a partial
        function = function.func
    if not hasattr(function, "__code__"):
        function = inspect.getattr_static(function, "__call__", None)
    return getattr(function, "__code__", None)
