"""Scopes: the part of the network that is replaced when a step is not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowaccel.checks import check_whole


@dataclass(frozen=True)
class Output:
    """Output of the whole network, which is not called at all.

    Args:
        residual: cache the output minus the input and add it to the present input (EasyCache), where both have one
            shape; else the output itself.
    """

    name: ClassVar[str] = "output"

    residual: bool = False


@dataclass(frozen=True)
class Stack:
    """Sum of what all blocks add to the tokens, except for the blocks that the gate runs first.

    Embedding, gate, and the network's final layer still run.
    """

    name: ClassVar[str] = "stack"

    @property
    def front(self) -> int:
        """Number of blocks at the front that always run, 0."""
        return 0

    @property
    def back(self) -> int:
        """Number of blocks at the back that always run, 0."""
        return 0


@dataclass(frozen=True)
class Range:
    """Sum of what the middle blocks add to the tokens; the others always run.

    Args:
        front: number of blocks that run before, including those of the gate.
        back: number of blocks that run after.

    Raises:
        ValueError: a number below 0.
    """

    name: ClassVar[str] = "range"

    front: int = 1
    back: int = 1

    def __post_init__(self) -> None:
        check_whole(self, front=0, back=0)


@dataclass(frozen=True)
class Module:
    """Output of every attention and feed-forward module of every block; norms, modulation and gates still run.

    It holds about two tensors per block, branch and value of the predictor: too much memory for long videos.

    Args:
        attention: cache attention modules.
        feed_forward: cache feed-forward modules.

    Raises:
        ValueError: neither.
    """

    name: ClassVar[str] = "module"

    attention: bool = True
    feed_forward: bool = True

    def __post_init__(self) -> None:
        if not (self.attention or self.feed_forward):
            raise ValueError("scope 'module' must cache attention or feed_forward, got neither")


Scope = Output | Stack | Range | Module
SCOPES: dict[str, type[Scope]] = {kind.name: kind for kind in (Output, Stack, Range, Module)}
"""Scopes by their names in recipes."""


def middle(scope: Stack | Range, probe: int, count: int) -> tuple[int, int]:
    """Return the first block and the end of the reused range among `count` blocks, if a gate runs `probe` blocks first.

    In a shallow network both ends shrink, the back first, so that one block is left to reuse.
    """
    front = min(max(scope.front, probe), count - 1)
    return front, count - min(scope.back, count - 1 - front)
