"""Check of a derived family in the network's first call: whether the blocks behave as it states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowaccel.hooks.calls import Call, in_rows
from flowaccel.hooks.families import BlockList, unsupported

Tokens = tuple[Tensor, Tensor | None]
"""Image tokens (rows, tokens, width), after the text tokens if these are joined, and text tokens if separate."""


@dataclass
class _List:
    """Progress of the call through one list of blocks."""

    blocks: BlockList
    count: int
    done: int = 0
    fits: bool = True
    """Whether the blocks of this list run in order and keep the number of tokens."""
    left: Tokens | None = None
    """Output tokens of the last block that ran."""


class Walk:
    """Checks one fully computed call from block to block.

    Args:
        call: the call.
        lists: the family's block lists, each with its number of blocks.
    """

    def __init__(self, call: Call, lists: Sequence[tuple[BlockList, int]]) -> None:
        self._call = call
        self._lists = {blocks.path: _List(blocks, count) for blocks, count in lists}
        self._due = [f"{path}.{place}" for path, entry in self._lists.items() for place in range(entry.count)]
        self._chains: list[list[_List]] = []  # lists whose input tokens are the output of the list before
        self._passed = 0
        self._misfit = ""

    def pass_by(self, path: str, arguments: Mapping[str, Any], output: Any) -> BlockList | None:
        """Check one block by its name in the network, its arguments and its output.

        Returns the list's description with what this block shows, or None from the first block on that does not fit.
        """
        expected = self._due[min(self._passed, len(self._due) - 1)]
        if path != expected:
            self._refuse(f"it runs {path} where {expected} would be next")
        self._passed += 1
        name, _, place = path.rpartition(".")
        entry = self._lists[name]
        image, text = arguments.get(entry.blocks.hidden), arguments.get(entry.blocks.encoder or "")
        if isinstance(image, Tensor) and isinstance(text, Tensor | None):
            tokens = image, None if text is None else in_rows(text, len(image))
            self._arrive(entry, int(place), tokens)
            self._leave(entry, tokens, output)
        else:
            self._refuse(f"its blocks {name!r} take no tensor {entry.blocks.hidden!r}, or text in parts", entry)
        return None if self._misfit else entry.blocks

    def finish(self) -> None:
        """Finish the check at the end of the call.

        Raises:
            UnsupportedModelError: the family is wrong; the message prints the one that the call shows.
        """
        if self._passed < len(self._due):
            self._refuse(f"a call ran {self._passed} of its {len(self._due)} blocks")
        if self._misfit:
            shown = [chain for chain in self._chains if all(e.fits and e.done == e.count for e in chain)]
            best = max(shown, key=lambda chain: sum(entry.count for entry in chain), default=[])
            blocks = tuple(entry.blocks for entry in best) or self._call.family.blocks
            raise unsupported(self._call.module, replace(self._call.family, blocks=blocks), self._misfit)

    def _refuse(self, reason: str, entry: _List | None = None) -> None:
        self._misfit = self._misfit or reason
        if entry is not None:
            entry.fits = False

    def _arrive(self, entry: _List, place: int, tokens: Tokens) -> None:
        rows = self._call.rows
        if len(tokens[0]) != rows:
            self._refuse(f"its blocks {entry.blocks.path!r} take {len(tokens[0])} rows in a call of {rows}", entry)
        if place != entry.done:
            entry.fits = False
        elif place == 0:
            self._begin(entry, tokens)
        elif entry.left is not None and _shapes(entry.left) != _shapes(tokens):
            self._refuse(
                f"the network changes the tokens between its blocks {entry.blocks.path!r}: {_said(entry.left)} leave "
                f"one, and {_said(tokens)} enter the next",
                entry,
            )
        entry.done += 1

    def _begin(self, entry: _List, tokens: Tokens) -> None:
        """Determine where the tokens of a list come from."""
        before = self._chains[-1][-1] if self._chains else None
        if before is None or before.left is None or before.done < before.count:
            self._chains.append([entry])
            return
        image, text = before.left
        if _same(image, tokens[0]) and (text is None or tokens[1] is None or _same(text, tokens[1])):
            entry.blocks = replace(entry.blocks, joined=before.blocks.joined)
        elif text is not None and _same(torch.cat([text, image], dim=1), tokens[0]):
            entry.blocks = replace(entry.blocks, joined=True)
        else:
            self._chains.append([entry])
            self._refuse(
                f"what leaves its blocks {before.blocks.path!r} ({_said(before.left)}) is not what enters "
                f"{entry.blocks.path!r} ({_said(tokens)}), neither as it is nor text and image joined"
            )
            return
        self._chains[-1].append(entry)

    def _leave(self, entry: _List, tokens: Tokens, output: Any) -> None:
        returns = _order(entry.blocks, tokens, output)
        if returns:
            entry.blocks = replace(entry.blocks, returns=returns)
            found = dict(zip(returns, output if isinstance(output, tuple) else (output,), strict=True))
            text = found.get("encoder", tokens[1])
            entry.left = found["hidden"], None if text is None else in_rows(text, len(tokens[0]))
            return
        made = ", ".join(map(_said_one, output if isinstance(output, (tuple, list)) else [output]))
        self._refuse(
            f"its blocks {entry.blocks.path!r} map {_said(tokens)} to {made}, which does not tell image from text "
            "tokens",
            entry,
        )


def _order(blocks: BlockList, tokens: Tokens, output: Any) -> tuple[str, ...]:
    """Return the order of image and text tokens in a block's output by their shapes; empty if it is ambiguous."""
    shapes = _shapes(tokens)
    if isinstance(output, Tensor):
        return ("hidden",) if output.shape == shapes[0] else ()
    if not isinstance(output, tuple) or len(output) != 2 or tokens[1] is None:
        return ()
    made = [tensor.shape if isinstance(tensor, Tensor) else None for tensor in output]
    orders = [
        order
        for order, (image, text) in ((("hidden", "encoder"), made), (("encoder", "hidden"), made[::-1]))
        if image == shapes[0] and text in (shapes[1], None)
    ]
    if len(orders) == 1:
        return orders[0]
    return blocks.returns if blocks.returns in orders else ()


def _shapes(tokens: Tokens) -> tuple[torch.Size | None, ...]:
    return tuple(None if tensor is None else tensor.shape for tensor in tokens)


def _same(left: Tensor, entering: Tensor) -> bool:
    """Return whether the tokens are equal up to their dtype, which a network may change between blocks."""
    if left.shape != entering.shape:
        return False
    left = left.to(entering)
    return bool(((left == entering) | (left.isnan() & entering.isnan())).all())


def _said(tokens: Tokens) -> str:
    return " and ".join(map(_said_one, (tensor for tensor in tokens if tensor is not None)))


def _said_one(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
