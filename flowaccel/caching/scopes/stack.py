"""Scopes `stack` and `range`: consecutive blocks are skipped, and what they would add is predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from flowaccel.caching.gates.base import TIME_SIGNALS
from flowaccel.caching.runtime import Cache, CachedCall, CallNext, not_run
from flowaccel.caching.scopes.base import Range, Stack, middle
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks import (
    Block,
    BlockList,
    Call,
    Session,
    attention_input,
    family_of,
    networks,
    tensors_of,
    time_signal,
    time_source,
)

Tokens = tuple[Tensor, Tensor | None]
"""Image tokens (rows, tokens, width), and text tokens if the blocks carry them."""


class StackCache(Cache):
    """Cache of what the blocks in a range add to the tokens."""

    def __init__(self, scope: Stack | Range, **parts: Any) -> None:
        super().__init__(**parts)
        self._scope = scope
        self._pass: _Pass | None = None
        self._proved: WeakSet[nn.Module] = WeakSet()  # networks that passed `_prove`

    def attach(self, session: Session) -> Callable[[], None]:
        """Wrap network calls and blocks.

        Raises:
            UnsupportedModelError: the gate reads a time signal that is not known for a network.
        """
        if self.gate.signal in TIME_SIGNALS:
            for network in networks(session.pipe).values():
                time_source(network, family_of(network), self.gate.signal)
        removers = [session.on_block(self._intercept_block), super().attach(session)]
        return lambda: [remove() for remove in removers].clear()

    def run(self, call_next: CallNext, cached: CachedCall) -> Any:
        """Call the network with wrapped blocks."""
        proved = not cached.call.family.derived or cached.call.module in self._proved
        outer, self._pass = self._pass, _Pass(cached, self._scope)
        signal = self.gate.signal
        try:
            if signal not in TIME_SIGNALS or cached.decision is not None:
                output = call_next()
            else:
                with time_signal(cached.call, signal) as self._pass.time_signal:
                    output = call_next()
            if not proved and self._pass.left is not None:
                self._prove(call_next, self._pass, tensors_of(output))
        finally:
            self._pass = outer
        return output

    def _prove(self, call_next: CallNext, passed: _Pass, expected: tuple[Tensor, ...]) -> None:
        """Check a derived family by calling the network again with the blocks skipped.

        The tokens that the blocks returned in this call replace them, so the output must be the same.
        """
        call = passed.cached.call
        passed.replays = True
        found = tensors_of(call_next())
        if not all(_alike(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
            raise UnsupportedModelError(
                f"scope {self._scope.name!r} cannot be used with this {type(call.module).__name__}: with what the "
                "blocks made handed on in their place it makes something else, so it takes more from within the blocks "
                "than their last tokens, as skip connections do. Leave out other blocks (scope 'stack', or 'range' "
                "with a smaller back), or use scope 'output'"
            )
        self._proved.add(call.module)

    def _intercept_block(self, call_next: CallNext, call: Call, block: Block) -> Any:
        return call_next() if self._pass is None else self._pass.block(call_next, block)


class _Pass:
    """State of one network call on its way through the blocks."""

    def __init__(self, cached: CachedCall, scope: Stack | Range) -> None:
        self.cached, self._scope = cached, scope
        self._nested = cached.call.family.nested
        self.left: Tokens | None = None  # tokens after the reused range, if all rows were computed
        self.replays = False  # whether `left` replaces the blocks
        self._ends = (0, 0)  # first block and end of the reused range
        self._text = 0  # number of text tokens, which come first in joined blocks
        self._entry: Tensor | None = None  # image tokens before the first block
        self._before: Tokens | None = None  # tokens at the start of the reused range, or of its present part
        self._part: int | None = None  # number of the part that runs
        self._key = ""  # of its history: parts after the first have their own
        self._standing: dict[BlockList, Any] = {}  # replacements of the outputs of a list's blocks
        self._rows: Tensor | None = None  # rows that are computed, on the network's device
        self._gathered = False  # whether the blocks run for these rows only
        self.time_signal: Callable[[Block], Tensor] | None = None

    def block(self, call_next: CallNext, block: Block) -> Any:
        """Run, skip or replace one block."""
        if self.replays:
            assert self.left is not None
            return self._packed(block, self.left) if self._ends[0] <= block.index < self._ends[1] else call_next()
        if block.index == 0:
            self._ends = self._middle(block)
            self._enter(call_next, block)
        first, end = self._ends
        if block.index == first:
            self._arrive(block)
        elif first < block.index < end and block.part != self._part:
            self._before, self._key = self._tokens(block, block.hidden, block.encoder), f"part {block.part}"
        self._part = block.part
        if not first <= block.index < end:
            output = call_next()
            self._show_middle(block, output, None)
            return output
        assert self._rows is not None
        call = self.cached.call
        if not len(self._rows) or self._gathered:
            not_run(call.record, block.path, call.rows - len(self._rows))
        if not len(self._rows):
            if self._nested and block.index < end - 1:
                return self._placeholder(block)
            if block.blocks not in self._standing:
                self._standing[block.blocks] = self._packed(block, self._forecast())
            return self._standing[block.blocks]  # at every block: a ControlNet may have added to it in between
        output = self._compute(call_next, block)
        if self._nested and len(self._rows) == call.rows:
            self.cached.state.forms[call.network, block.path] = _output_form(output)
        self._show_middle(block, output, self._rows if self._gathered else None)
        return self._leave(block, output) if block.closes or block.index == end - 1 else output

    def _compute(self, call_next: CallNext, block: Block) -> Any:
        if not self._gathered:
            return call_next()
        assert self._rows is not None
        with self.cached.call.only(self.cached.computing):
            return call_next(block.take(self._rows, self.cached.call.rows))

    def _middle(self, block: Block) -> tuple[int, int]:
        probe = self.cached.cache.gate.probe
        if block.count <= 1 and probe:
            raise UnsupportedModelError(
                "the network has a single block, so nothing is left to reuse after those that the gate "
                f"{self.cached.cache.gate.name!r} runs; use one that reads no block, such as 'easy'"
            )
        first, end = middle(self._scope, probe, block.count)
        if self._nested:  # as many blocks at either end, as the skip connections join them
            outer = min(max(first, block.count - end), block.count // 2)
            return outer, block.count - outer
        return first, end

    def _enter(self, call_next: CallNext, block: Block) -> None:
        gate, cached = self.cached.cache.gate, self.cached
        if block.encoder is not None and not block.blocks.joined:
            self._text = block.encoder.shape[1]
        if gate.signal == "first_block" and cached.decides:
            self._entry = cached.of_units(self._tokens(block, block.hidden, block.encoder)[0])
        if gate.signal == "condition" and cached.decision is None:
            cached.decide(cached.of_units(block.condition))
        if self.time_signal is not None:
            cached.decide(cached.of_units(self.time_signal(block)))
        if gate.signal == "modulated_input" and cached.decision is None:
            cached.decide(cached.of_units(attention_input(call_next, block)))

    def _arrive(self, block: Block) -> None:
        cached = self.cached
        self._before = self._tokens(block, block.hidden, block.encoder)
        if cached.decision is None:
            assert self._entry is not None
            reached = cached.of_units(self._before[0])
            cached.decide(reached if self._nested else reached - self._entry)
        self._entry = None
        cached.require(cached.history())
        self._rows = cached.computing.to(block.hidden.device)
        self._gathered = 0 < len(self._rows) < cached.call.rows and cached.call.gathers

    def _forecast(self) -> Tokens:
        assert self._before is not None
        image, text = self._before
        added_image, added_text = self.cached.predict(self._key)
        assert added_image is not None
        if self._nested:
            return added_image, None
        return image + added_image, text if text is None or added_text is None else text + added_text

    def _leave(self, block: Block, output: Any) -> Any:
        """Store what the blocks added, and set the rows that were not computed to their prediction."""
        assert self._before is not None and self._rows is not None
        cached, rows = self.cached, self._rows
        found = self._tokens(block, *block.unpack(output))
        if len(rows) == cached.call.rows:
            cached.store(self._added(found, self._before), self._key)
            self._show_feature()
            self.left = found
            return output
        if not self._gathered:
            found = _chosen(found, rows)
        forecast = self._forecast()
        cached.store(self._added(found, _chosen(self._before, rows)), self._key, cached.computing)
        self._show_feature()
        image = forecast[0].index_copy(0, rows, found[0])
        text = forecast[1]
        if text is not None and found[1] is not None:
            text = text.index_copy(0, rows, found[1])
        return self._packed(block, (image, text))

    def _added(self, found: Tokens, before: Tokens) -> Tokens:
        """Return what is cached: what the blocks added, of a UNet their output, which has another shape."""
        return (found[0], None) if self._nested else _difference(found, before)

    def _placeholder(self, block: Block) -> Any:
        """Return zeros in the form of a deep block's output; they reach other deep blocks alone, which do not run."""
        shapes = self.cached.state.forms[self.cached.call.network, block.path]
        hidden, *skips = (block.hidden.new_zeros(()).expand(self.cached.call.rows, *shape) for shape in shapes)
        return (hidden, tuple(skips)) if len(block.blocks.returns) > 1 else hidden

    def _show_feature(self) -> None:
        feature = self.cached.history(self._key).newest[0]
        if self.cached.cache.gate.feedback == "feature" and feature is not None:
            self.cached.give_back(feature)

    def _show_middle(self, block: Block, output: Any, rows: Tensor | None) -> None:
        """Pass the residual of the middle block to the gate."""
        if self.cached.cache.gate.feedback != "middle_block" or block.index != block.count // 2:
            return
        after = self._tokens(block, *block.unpack(output))[0]
        before = self._tokens(block, block.hidden, block.encoder)[0]
        if rows is None:
            self.cached.give_back(after - before)
            return
        before = before[rows] if len(before) != len(rows) else before
        whole = after.new_zeros(self.cached.call.rows, *after.shape[1:])
        self.cached.give_back(whole.index_copy(0, rows, after - before))

    def _tokens(self, block: Block, hidden: Tensor, encoder: Tensor | None) -> Tokens:
        if block.blocks.joined and self._text:
            return hidden[:, self._text :], hidden[:, : self._text]
        return hidden, encoder

    def _packed(self, block: Block, tokens: Tokens) -> Any:
        image, text = tokens
        if block.blocks.joined and text is not None:
            return torch.cat([text, image], dim=1)
        return block.pack(image, text)


def _output_form(output: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of a UNet block's output and of its skip connections, without the rows."""
    hidden, skips = output if isinstance(output, tuple) else (output, ())
    return tuple(tuple(tensor.shape[1:]) for tensor in (hidden, *skips))


def _alike(found: Tensor, expected: Tensor) -> bool:
    bound = 10 * torch.finfo(expected.dtype).eps * float(expected.nan_to_num().abs().max())
    return float((found - expected).nan_to_num().abs().max()) <= bound


def _difference(new: Tokens, old: Tokens) -> Tokens:
    text = None if new[1] is None or old[1] is None else new[1] - old[1]
    return new[0] - old[0], text


def _chosen(tokens: Tokens, rows: Tensor) -> Tokens:
    return tokens[0][rows], None if tokens[1] is None else tokens[1][rows]
