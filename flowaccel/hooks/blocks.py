"""Surrounding the blocks of a network: which they are, what goes in and what comes out, whatever the family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flowaccel.errors import FlowaccelError, RecipeConflictError
from flowaccel.hooks.families import BlockList, Family, unsupported, unwrapped
from flowaccel.hooks.wrap import entry_point, wrap

if TYPE_CHECKING:
    from flowaccel.hooks.session import Call

BlockAround = Callable[[Callable[..., Any], "Call", "Block"], Any]
"""`around(proceed, call, block)` returns what the block is to return; see `Block.pack`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of one network call."""

    index: int
    """Position among all blocks of the network, over its lists."""
    count: int
    """How many blocks the network has."""
    blocks: BlockList
    module: nn.Module
    arguments: dict[str, Any]
    """What the block was called with, by name."""

    @property
    def hidden(self) -> Tensor:
        """(rows, tokens, width) the image tokens that go in (text tokens first where `blocks.joined`)."""
        return self.arguments[self.blocks.hidden]

    @property
    def encoder(self) -> Tensor | None:
        """(rows, text tokens, width) the text tokens that go in, where the block takes them."""
        return None if self.blocks.encoder is None else self.arguments.get(self.blocks.encoder)

    def unpack(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """The block's return value as (image tokens, text tokens or None)."""
        if len(self.blocks.returns) == 1:
            return output, None
        found = dict(zip(self.blocks.returns, output, strict=True))
        return found["hidden"], found["encoder"]

    def pack(self, hidden: Tensor, encoder: Tensor | None) -> Any:
        """The inverse of `unpack`: what the block would return."""
        if len(self.blocks.returns) == 1:
            return hidden
        return tuple(hidden if name == "hidden" else encoder for name in self.blocks.returns)


class BlockHooks:
    """The wrapped blocks of a session. Nothing is wrapped while nobody surrounds blocks."""

    def __init__(self, networks: Callable[[], Iterable[Any]]) -> None:
        self._networks = networks
        self._arounds: list[BlockAround] = []
        self._wrapped: dict[nn.Module, _WrappedBlock] = {}
        self._call: Call | None = None

    def add(self, around: BlockAround) -> Callable[[], None]:
        """Surround every block; returns what undoes it.

        Raises:
            UnsupportedModelError: a network without known blocks.
            RecipeConflictError: a network that was compiled as a whole.
        """
        self._arounds.append(around)
        try:
            self.refresh()
        except FlowaccelError:
            self._remove(around)
            raise
        return lambda: self._remove(around)

    def _remove(self, around: BlockAround) -> None:
        self._arounds.remove(around)
        self.refresh()

    def clear(self) -> None:
        """Unwrap all blocks."""
        self._arounds.clear()
        self.refresh()

    def refresh(self) -> None:
        """Wrap the blocks of the present networks, where anybody surrounds blocks; unwrap all others."""
        wanted: dict[nn.Module, Block] = {}
        for network in self._networks() if self._arounds else ():
            _refuse_whole_graph(network.module)
            wanted |= {block.module: block for block in _blocks_of(network.module, network.family)}
        for module in list(self._wrapped):
            if module not in wanted or not self._wrapped[module].in_place:
                self._wrapped.pop(module).wrapped.remove()
        for module, block in wanted.items():
            if module not in self._wrapped:
                self._wrapped[module] = _WrappedBlock(block, self._around)

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """The blocks that run inside belong to `call`."""
        outer, self._call = self._call, call
        try:
            yield
        finally:
            self._call = outer

    def _around(self, wrapped: _WrappedBlock, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = self._call
        if call is None:
            return forward(*args, **kwargs)
        block = replace(wrapped.block, arguments=dict(wrapped.signature.bind(*args, **kwargs).arguments))

        def compute(arguments: dict[str, Any] | None = None) -> Any:
            return forward(*args, **kwargs) if arguments is None else forward(**arguments)

        proceed = compute
        if call.family.derived and not wrapped.learned:
            proceed = _once(compute)
            returns = _output_order(call, block, proceed())
            wrapped.block = replace(wrapped.block, blocks=replace(block.blocks, returns=returns))
            wrapped.learned = True
            block = replace(block, blocks=wrapped.block.blocks)
        for around in self._arounds:
            proceed = _surrounded(around, proceed, call, block)
        return proceed()


class _WrappedBlock:
    def __init__(self, block: Block, around: Callable[..., Any]) -> None:
        self.block, self.learned = block, False
        self.signature = inspect.signature(block.module.forward)
        self._entry = entry_point(block.module)

        def surround(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return around(self, forward, args, kwargs)

        self.wrapped = wrap(block.module, self._entry, surround)

    @property
    def in_place(self) -> bool:
        return self.wrapped.reachable and self._entry == entry_point(self.block.module)


def _refuse_whole_graph(network: nn.Module) -> None:
    if unwrapped(network) is not network or entry_point(network) != "forward":
        raise RecipeConflictError(
            f"the {type(unwrapped(network)).__name__} is compiled as a whole, so its blocks cannot be told apart; "
            "compile the blocks instead (transformer.compile_repeated_blocks())"
        )


def _blocks_of(network: nn.Module, family: Family) -> list[Block]:
    found = []
    for blocks in family.blocks:
        modules = getattr(unwrapped(network), blocks.path, None)
        if not isinstance(modules, nn.ModuleList):
            raise unsupported(network, family, f"it has no list of blocks {blocks.path!r}")
        found += [(blocks, module) for module in modules]
    if not found:
        raise unsupported(network, family, "it has no list of alike blocks that take hidden_states")
    return [
        Block(index=index, count=len(found), blocks=blocks, module=module, arguments={})
        for index, (blocks, module) in enumerate(found)
    ]


def _surrounded(around: BlockAround, proceed: Callable[..., Any], call: Call, block: Block) -> Callable[..., Any]:
    return lambda arguments=None: around(proceed if arguments is None else lambda: proceed(arguments), call, block)


def _once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` that does not repeat the work of its first call without arguments."""
    kept: list[Any] = []

    def proceed(arguments: dict[str, Any] | None = None) -> Any:
        if arguments is not None:
            return compute(arguments)
        if not kept:
            kept.append(compute())
        return kept[0]

    return proceed


def _output_order(call: Call, block: Block, output: Any) -> tuple[str, ...]:
    """Which of a block's outputs are the image tokens and which the text tokens, from their shapes."""
    if isinstance(output, Tensor):
        return ("hidden",)
    hidden, encoder = block.hidden, block.encoder
    if isinstance(output, tuple) and len(output) == 2 and encoder is not None:
        shapes = [None if tensor is None else tensor.shape for tensor in output]
        orders = [
            order
            for order, places in ((("hidden", "encoder"), (0, 1)), (("encoder", "hidden"), (1, 0)))
            if shapes[places[0]] == hidden.shape and shapes[places[1]] in (encoder.shape, None)
        ]
        if len(orders) == 1:
            return orders[0]
        if block.blocks.returns in orders:
            return block.blocks.returns
    raise unsupported(
        call.module,
        call.family,
        f"its blocks {block.blocks.path!r} map {tuple(hidden.shape)} to {_shapes(output)}, which does not tell "
        "image from text tokens",
    )


def _shapes(output: Any) -> str:
    parts = output if isinstance(output, (tuple, list)) else [output]
    return ", ".join(str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__ for part in parts)
