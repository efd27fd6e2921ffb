"""Wrappers around the blocks of a network, with inputs and outputs in one form for all model families."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from flowaccel.errors import FlowaccelError, RecipeConflictError, UnsupportedModelError
from flowaccel.hooks.calls import Call, in_rows, take_rows
from flowaccel.hooks.derived_rows import Walk
from flowaccel.hooks.families import FAMILIES, BlockList, Family, TimeSignal, unsupported, unwrapped
from flowaccel.hooks.wrap import entry_point, wrap

BlockInterceptor = Callable[[Callable[..., Any], Call, "Block"], Any]
"""Wrapper of a block: `interceptor(call_next, call, block)` returns the block's output; see `Block.pack`."""

ModuleInterceptor = Callable[[Callable[[], Any], Call, str], Any]
"""Wrapper of a module: `interceptor(call_next, call, path)` returns its output; `path` is its name."""

ATTENTION, FEED_FORWARD = ("attn", "attention", "self_attn"), ("ff", "ffn", "mlp", "proj_mlp")
"""Prefixes of the names of attention and feed-forward modules within a block."""


_PRESENT: ContextVar[Call | None] = ContextVar("flowaccel_call", default=None)


@contextmanager
def during(call: Call | None) -> Iterator[None]:
    """Attribute blocks that run inside the context, in this thread, to `call`; with None, none is surrounded."""
    token = _PRESENT.set(call)
    try:
        yield
    finally:
        _PRESENT.reset(token)


def is_present(call: Call) -> bool:
    """Return whether the code that runs now belongs to `call`, or to some of its rows."""
    present = _PRESENT.get()
    return present is not None and present.record is call.record


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of one network call."""

    index: int
    """Position among all blocks of the network, counted across its lists."""
    count: int
    """Number of blocks in the network."""
    path: str
    """Name within the network, such as `transformer_blocks.3`."""
    blocks: BlockList
    module: nn.Module
    bind: Callable[[], dict[str, Any]]
    """Computes `arguments`, on demand."""
    part: int = 0
    """Number of lists up to its own that are `apart`."""
    closes: bool = False
    """Whether the next block is of another part."""
    beside: dict[str, Any] = field(default_factory=dict)
    """What `unpack` found beside the tokens, the skip connections of a UNet's block, for `pack`."""

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the block, by name."""
        return self.bind()

    def take(self, rows: Tensor, full: int) -> dict[str, Any]:
        """Return the arguments for some of the rows.

        `rows` are their indices among `full`. Arguments that all rows share are kept, and so are those with another
        number of rows, which were selected earlier.
        """
        return {
            name: value if name in self.blocks.shared else take_rows(value, rows, full)
            for name, value in self.arguments.items()
        }

    @property
    def hidden(self) -> Tensor:
        """Image tokens (rows, tokens, width) that enter the block (text tokens first where `blocks.joined`)."""
        return self.arguments[self.blocks.hidden]

    @property
    def encoder(self) -> Tensor | None:
        """Text tokens (rows, text tokens, width) that enter the block, or None if it takes none; a shared row is
        expanded."""
        found = None if self.blocks.encoder is None else self.arguments.get(self.blocks.encoder)
        return None if found is None else in_rows(found, len(self.hidden))

    @property
    def condition(self) -> Tensor:
        """Embedding (rows, D) of the timestep and the conditioning, which modulates the blocks.

        Raises:
            UnsupportedModelError: the block has no such argument of this shape.
        """
        found = self.arguments.get(self.blocks.condition)
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} takes no embedding (rows, D) as {self.blocks.condition!r}, so what "
                "modulates it is not known; SD3, FLUX, SiT and Z-Image have one"
            )
        return in_rows(found, len(self.hidden))

    def unpack(self, output: Any) -> tuple[Tensor, Tensor | None]:
        """Return the block's output as (image tokens, text tokens or None)."""
        if len(self.blocks.returns) == 1:
            return output, None
        found = dict(zip(self.blocks.returns, output, strict=True))
        hidden, encoder = found.pop("hidden"), found.pop("encoder", None)
        self.beside.update(found)
        return hidden, None if encoder is None else in_rows(encoder, len(hidden))

    def pack(self, hidden: Tensor, encoder: Tensor | None) -> Any:
        """Return the tokens in the form of the block's output; the inverse of `unpack`."""
        if len(self.blocks.returns) == 1:
            return hidden
        found = {"hidden": hidden, "encoder": encoder, **self.beside}
        return tuple(found[name] for name in self.blocks.returns)


class BlockHooks:
    """The wrapped blocks of a session, and modules within them; wrapped only while some accelerator surrounds them."""

    def __init__(self, networks: Callable[[], Iterable[Any]]) -> None:
        self._networks = networks
        self._interceptors: list[BlockInterceptor] = []
        self._inner: list[tuple[ModuleInterceptor, tuple[str, ...]]] = []
        self._wrapped: dict[nn.Module, _WrappedBlock | _WrappedModule] = {}
        self._unchecked: set[nn.Module] = set()  # networks whose derived families no call has confirmed
        self._walk: Walk | None = None

    def add(self, interceptor: BlockInterceptor) -> Callable[[], None]:
        """Surround every block; see `Session.on_block`."""
        return self._added(self._interceptors, interceptor)

    def add_inner(self, interceptor: ModuleInterceptor, kinds: tuple[str, ...]) -> Callable[[], None]:
        """Surround modules within the blocks; see `Session.on_module`."""
        return self._added(self._inner, (interceptor, kinds))

    def _added(self, entries: list[Any], entry: Any) -> Callable[[], None]:
        def remove() -> None:
            entries.remove(entry)
            self.refresh()

        entries.append(entry)
        try:
            self.refresh()
        except FlowaccelError:
            remove()
            raise
        return remove

    def clear(self) -> None:
        """Unwrap everything."""
        self._interceptors.clear()
        self._inner.clear()
        self.refresh()

    def refresh(self) -> None:
        """Wrap what is surrounded in the pipeline's current networks, and unwrap all else."""
        wanted: dict[nn.Module, Callable[[], _WrappedBlock | _WrappedModule]] = {}
        for network in self._networks() if self._interceptors or self._inner else ():
            wanted |= self._wanted(network.module, network.family)
        for module in list(self._wrapped):
            if module not in wanted or not self._wrapped[module].in_place:
                self._wrapped.pop(module).wrapped.remove()
        for module, wrapped in wanted.items():
            if module not in self._wrapped:
                self._wrapped[module] = wrapped()

    def _wanted(self, network: nn.Module, family: Family) -> dict[nn.Module, Any]:
        """Return what is surrounded in a network, each with a function that wraps it."""
        _refuse_whole_graph(network)
        if self._inner and family.nested:
            raise UnsupportedModelError(
                f"the blocks of a {type(unwrapped(network)).__name__} hold their attention modules in lists within "
                "lists, which scope 'module' does not reach; use scope 'range' or 'output'"
            )
        blocks = _blocks_of(network, family)
        inner = _inner_modules(network, blocks, [kind for _, kinds in self._inner for kind in kinds])
        if self._inner and not inner:
            raise unsupported(network, family, "its blocks have no modules named like attention")
        wanted: dict[nn.Module, Any] = {
            module: functools.partial(_WrappedModule, module, path, name, self._inner)
            for module, (path, name) in inner.items()
        }
        if self._interceptors:
            wanted |= {block.module: functools.partial(self._wrapped_block, block, network, family) for block in blocks}
        return wanted

    def _wrapped_block(self, block: Block, network: nn.Module, family: Family) -> _WrappedBlock:
        if family.derived:
            self._unchecked.add(network)
        return _WrappedBlock(block, self._intercept)

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """Attribute the blocks that run inside the context to `call`.

        Raises:
            UnsupportedModelError: the family was derived, and this first call contradicts it.
        """
        outer = self._walk
        self._walk = walk = Walk(call, _lists_of(call)) if call.module in self._unchecked else None
        try:
            with during(call):
                yield
            if walk is not None:
                walk.finish()
                self._unchecked.discard(call.module)
        finally:
            self._walk = outer

    def _intercept(self, wrapped: _WrappedBlock, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = _PRESENT.get()
        if call is None:
            return forward(*args, **kwargs)
        block = wrapped.called(args, kwargs)

        def compute(arguments: dict[str, Any] | None = None) -> Any:
            return forward(*args, **kwargs) if arguments is None else forward(**arguments)

        call_next = compute
        if self._walk is not None:
            call_next = _once(compute)
            learned = self._walk.pass_by(block.path, block.arguments, call_next())
            if learned is None:
                return call_next()
            wrapped.block = replace(wrapped.block, blocks=learned)
            block = wrapped.called(args, kwargs)
        for interceptor in self._interceptors:
            call_next = _surrounded(interceptor, call_next, call, block)
        return call_next()


class _WrappedBlock:
    def __init__(self, block: Block, interceptor: Callable[..., Any]) -> None:
        self.block = block
        self.signature = inspect.signature(block.module.forward)
        self._entry = entry_point(block.module)

        def surround(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return interceptor(self, forward, args, kwargs)

        self.wrapped = wrap(block.module, self._entry, surround)

    def called(self, args: Any, kwargs: Any) -> Block:
        """Return the block with the arguments of one call."""
        known = self.block
        return Block(
            index=known.index,
            count=known.count,
            path=known.path,
            blocks=known.blocks,
            module=known.module,
            bind=lambda: dict(self.signature.bind(*args, **kwargs).arguments),
            part=known.part,
            closes=known.closes,
        )

    @property
    def in_place(self) -> bool:
        return self.wrapped.reachable and self._entry == entry_point(self.block.module)


class _WrappedModule:
    """Attention or feed-forward module within a block, and those who surround it, who may change meanwhile."""

    def __init__(
        self, module: nn.Module, path: str, name: str, entries: list[tuple[ModuleInterceptor, tuple[str, ...]]]
    ) -> None:
        def surround(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = _PRESENT.get()
            call_next: Callable[[], Any] = functools.partial(forward, *args, **kwargs)
            for interceptor, kinds in entries:
                if call is not None and name.startswith(kinds):
                    call_next = functools.partial(interceptor, call_next, call, path)
            return call_next()

        self.wrapped = wrap(module, "forward", surround)

    @property
    def in_place(self) -> bool:
        return self.wrapped.reachable


def _inner_modules(network: nn.Module, blocks: list[Block], kinds: list[str]) -> dict[nn.Module, tuple[str, str]]:
    """Return the modules to surround, each with its path in the network and its name in the block."""
    found = {}
    for block in blocks:
        for name, child in block.module.named_children():
            if not name.startswith(tuple(kinds)) or isinstance(child, nn.ModuleList):
                continue
            if entry_point(block.module) != "forward":
                raise RecipeConflictError(
                    f"the blocks of the {type(unwrapped(network)).__name__} are compiled, so the modules in them "
                    "cannot be surrounded; compile nothing, or reuse whole blocks (scope 'stack')"
                )
            found[child] = (f"{block.path}.{name}", name)
    return found


def attention_input(call_next: Callable[..., Any], block: Block) -> Tensor:
    """Return the input (rows, tokens, width) of the block's first attention module for the image tokens.

    It is normalised, and modulated by the timestep. The block runs up to that module, uncompiled, and no further.

    Args:
        call_next: runs the block.
        block: the block.

    Raises:
        UnsupportedModelError: the block has no attention module.
    """
    children = block.module.named_children()
    attention = next((m for n, m in children if n.startswith(ATTENTION) and not isinstance(m, nn.ModuleList)), None)
    if attention is None:
        raise UnsupportedModelError(
            f"{type(block.module).__name__} has no attention module by name, so there is no modulated input to read; "
            "use a gate that reads something else, such as 'first_block' or 'easy'"
        )
    signature, call = inspect.signature(attention.forward), _PRESENT.get()

    def stop(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _PRESENT.get() is not call:  # called in another thread, or by another pipeline
            return forward(*args, **kwargs)
        raise _Reached(next(iter(signature.bind(*args, **kwargs).arguments.values())))

    compiled = entry_point(block.module) != "forward"
    wrapped = wrap(attention, "forward", stop)
    try:
        if compiled:
            type(block.module).forward(block.module, **block.arguments)
        else:
            call_next(block.arguments)
    except _Reached as reached:
        return reached.hidden
    finally:
        wrapped.remove()
    raise UnsupportedModelError(f"{type(block.module).__name__} does not call its attention module")


def time_source(network: nn.Module, family: Family, name: str) -> TimeSignal:
    """Return where the network computes a time signal, `time_embedding` or `time_projection`.

    Raises:
        UnsupportedModelError: the family does not state where it is.
    """
    source: TimeSignal | None = getattr(family, name)
    if source is None:
        known = ", ".join(sorted(row.name for row in FAMILIES.values() if getattr(row, name) is not None))
        raise UnsupportedModelError(
            f"where a {type(unwrapped(network)).__name__} has its {name} is not known (it is for {known}): "
            f"add {name}=TimeSignal(module=PATH) to its row and register it with flowaccel.hooks.register_family, or "
            "use a gate that reads something else, such as 'first_block' or 'easy'"
        )
    return source


@contextmanager
def time_signal(call: Call, name: str) -> Iterator[Callable[[Block], Tensor]]:
    """Record a time signal while the network runs inside the context.

    The function that the context yields returns the signal (rows, ...) of this call; call it at the first block.

    Args:
        call: the network call.
        name: `time_embedding` or `time_projection`.

    Raises:
        UnsupportedModelError: the family does not state where it is.
    """
    source = time_source(call.module, call.family, name)
    if source.argument:
        yield lambda block: block.arguments[source.argument]
        return
    seen: list[Tensor] = []

    def watch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        returned = forward(*args, **kwargs)
        seen.append(returned)
        return returned

    wrapped = wrap(unwrapped(call.module).get_submodule(source.module), "forward", watch)
    try:
        yield lambda block: seen[-1]
    finally:
        wrapped.remove()


class _Reached(Exception):
    """Carries the input of the attention module out of the block; not an error."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _refuse_whole_graph(network: nn.Module) -> None:
    if unwrapped(network) is not network or entry_point(network) != "forward":
        raise RecipeConflictError(
            f"the {type(unwrapped(network)).__name__} is compiled as a whole, so its blocks cannot be told apart; "
            "compile the blocks instead (transformer.compile_repeated_blocks())"
        )


def _blocks_of(network: nn.Module, family: Family) -> list[Block]:
    found: list[tuple[BlockList, str, nn.Module]] = []
    for blocks in family.blocks:
        modules = getattr(unwrapped(network), blocks.path, None)
        if not isinstance(modules, nn.Module):
            raise unsupported(network, family, f"it has no blocks {blocks.path!r}")
        if isinstance(modules, nn.ModuleList):
            found += [(blocks, f"{blocks.path}.{place}", module) for place, module in enumerate(modules)]
        else:
            found.append((blocks, blocks.path, modules))
    if not found:
        raise unsupported(network, family, "it has no list of alike blocks that take hidden_states")
    parts: list[int] = []
    last = found[0][0]
    for blocks, _, _ in found:
        parts.append((parts[-1] if parts else 0) + (blocks.apart and blocks is not last))
        last = blocks
    return [
        Block(
            index=index,
            count=len(found),
            path=path,
            blocks=blocks,
            module=module,
            bind=dict,
            part=parts[index],
            closes=parts[index : index + 2] == [parts[index], parts[index] + 1],
        )
        for index, (blocks, path, module) in enumerate(found)
    ]


def _lists_of(call: Call) -> list[tuple[BlockList, int]]:
    return [(blocks, len(getattr(unwrapped(call.module), blocks.path))) for blocks in call.family.blocks]


def _surrounded(
    interceptor: BlockInterceptor, call_next: Callable[..., Any], call: Call, block: Block
) -> Callable[..., Any]:
    return lambda arguments=None: interceptor(
        call_next if arguments is None else lambda: call_next(arguments), call, block
    )


def _once(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return `compute` with the result of its first call without arguments cached."""
    kept: list[Any] = []

    def call_next(arguments: dict[str, Any] | None = None) -> Any:
        if arguments is not None:
            return compute(arguments)
        if not kept:
            kept.append(compute())
        return kept[0]

    return call_next
