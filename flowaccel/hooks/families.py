"""What cannot be read off a network at run time: one row per model family, and how a missing row is derived."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from flowaccel.compat import block_output_order
from flowaccel.errors import UnsupportedModelError

Guidance = Literal["uncond_cond", "cond_uncond"]
Time = Literal["timestep", "sigma", "one_minus_sigma"]


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A `ModuleList` of blocks that the network runs one after the other, and what they take and return."""

    path: str
    """Attribute of the network."""
    returns: tuple[str, ...]
    """`("hidden",)` for a bare tensor, else the order of the returned tuple, such as `("encoder", "hidden")`; empty in
    a derived row whose order the first network call is to show."""
    hidden: str = "hidden_states"
    """Argument with the image tokens (rows, tokens, width)."""
    encoder: str | None = None
    """Argument with the text tokens, where the block has one."""
    shared: tuple[str, ...] = ()
    """Arguments that all rows share: they have no leading rows axis."""
    joined: bool = False
    """`hidden` holds the text tokens first, then the image tokens."""


@dataclass(frozen=True, kw_only=True)
class TimeSignal:
    """Where a network has an embedding of the time (rows, ...) while it runs; one of the two is given."""

    argument: str = ""
    """Argument of the first block."""
    module: str = ""
    """Path of a module of the network that returns it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the pipelines of one model family call their network."""

    name: str
    networks: tuple[str, ...]
    """Class names of the networks, subclasses included."""
    blocks: tuple[BlockList, ...]
    """In the order in which they run."""
    guidance: Guidance = "uncond_cond"
    """Order of a batch that holds both branches. Pipelines that call the network once per branch call the conditional
    one first, whatever is said here."""
    time: Time = "timestep"
    """What the `timestep` argument holds: the scheduler's timestep, that divided by `num_train_timesteps`, or one minus
    the latter."""
    shared: tuple[str, ...] = ()
    """Arguments of the network that all rows share."""
    lists: tuple[str, ...] = ()
    """Arguments that are lists with one entry per row, such as the images of Z-Image."""
    extra: tuple[str, ...] = ()
    """Arguments that mark a call as beyond guidance when they are given, such as SD3's `skip_layers`."""
    time_embedding: TimeSignal | None = None
    """The embedding of the time as the network's first module for it makes it; None where it is not known."""
    time_projection: TimeSignal | None = None
    """The projection of it from which the blocks take their shifts and scales, where the network has one for all."""
    own_timesteps: bool = False
    """Whether the pipelines hand their scheduler timesteps that are not its noise levels (CogView4 shows its network
    unshifted ones), so that only the scheduler they were made with fits."""
    derived: bool = False
    """Whether the row was derived from the network instead of written."""


_JOINT = ("encoder", "hidden")
_TEXT = "encoder_hidden_states"

FAMILIES: dict[str, Family] = {}
"""All rows by name; `register_family` adds to it."""


def register_family(family: Family) -> Family:
    """Add a row, or replace the one of the same name; later rows win where two name the same network class.

    Raises:
        ValueError: a row without networks, or a block list that returns no `hidden`.
    """
    if not family.networks:
        raise ValueError(f"family {family.name!r} must name at least one network class")
    for blocks in family.blocks:
        if blocks.returns and "hidden" not in blocks.returns:
            raise ValueError(
                f"family {family.name!r}: blocks {blocks.path!r} must return 'hidden', got {blocks.returns}"
            )
    FAMILIES.pop(family.name, None)
    FAMILIES[family.name] = family
    return family


for _family in (
    Family(
        name="sit",
        networks=("SiTTransformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden",)),),
        guidance="cond_uncond",
        time="one_minus_sigma",
    ),
    Family(
        name="dit",
        networks=("DiTTransformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden",)),),
        guidance="cond_uncond",
    ),
    Family(
        name="sd3",
        networks=("SD3Transformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT),),
        extra=("skip_layers",),
    ),
    Family(
        name="flux",
        networks=("FluxTransformer2DModel",),
        blocks=(
            BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=("image_rotary_emb",)),
            BlockList(path="single_transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=("image_rotary_emb",)),
        ),
        time="sigma",
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        name="pixart",
        networks=("PixArtTransformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden",), encoder=_TEXT),),
    ),
    Family(
        name="wan",
        networks=("WanTransformer3DModel",),
        blocks=(BlockList(path="blocks", returns=("hidden",), encoder=_TEXT, shared=("rotary_emb",)),),
        time_embedding=TimeSignal(module="condition_embedder.time_embedder"),
        time_projection=TimeSignal(argument="temb"),
    ),
    Family(
        name="cogvideox",
        networks=("CogVideoXTransformer3DModel",),
        blocks=(
            BlockList(
                path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=("image_rotary_emb",)
            ),
        ),
        shared=("image_rotary_emb",),
        time_embedding=TimeSignal(argument="temb"),
    ),
    Family(
        name="cogview4",
        networks=("CogView4Transformer2DModel",),
        blocks=(
            BlockList(
                path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=("image_rotary_emb",)
            ),
        ),
        shared=("image_rotary_emb",),
        own_timesteps=True,
    ),
    Family(
        name="auraflow",
        networks=("AuraFlowTransformer2DModel",),
        blocks=(
            BlockList(path="joint_transformer_blocks", returns=_JOINT, encoder=_TEXT),
            BlockList(path="single_transformer_blocks", returns=("hidden",), joined=True),
        ),
        time="sigma",
    ),
):
    register_family(_family)


def networks(pipe: Any) -> dict[str, nn.Module]:
    """The networks that a pipeline calls at its steps, by component name: `transformer` and, where there is one,
    `transformer_2` (Wan 2.2 changes over on the way), or else `unet`.

    Raises:
        TypeError: the pipeline has none.
    """
    for names in (("transformer", "transformer_2"), ("unet",)):
        found = {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
        if found:
            return found
    raise TypeError(f"{type(pipe).__name__} has neither a transformer nor a unet to accelerate")


def denoiser(pipe: Any) -> Any:
    """The first of `networks(pipe)`.

    Raises:
        TypeError: the pipeline has none.
    """
    return next(iter(networks(pipe).values()))


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside `torch.compile(network)`."""
    inner = network.__dict__.get("_modules", {}).get("_orig_mod")
    return network if inner is None else inner


def family_of(network: nn.Module) -> Family:
    """The row for a network: the registered one, or one derived from its block lists."""
    names = {kind.__name__ for kind in type(unwrapped(network)).__mro__}
    for family in reversed(FAMILIES.values()):
        if names & set(family.networks):
            return family
    return _derived(unwrapped(network))


def _derived(network: nn.Module) -> Family:
    return Family(
        name=f"derived:{type(network).__name__}",
        networks=(type(network).__name__,),
        blocks=tuple(_derived_lists(network)),
        derived=True,
    )


def _derived_lists(network: nn.Module) -> Iterator[BlockList]:
    """Children that are lists of alike blocks with a tensor argument that by its name holds the tokens."""
    for path, child in network.named_children():
        if not isinstance(child, nn.ModuleList) or len({type(block) for block in child}) != 1:
            continue
        parameters = inspect.signature(type(child[0]).forward).parameters
        if "hidden_states" in parameters:
            yield BlockList(
                path=path,
                returns=block_output_order(type(child[0])),
                encoder=_TEXT if _TEXT in parameters else None,
                shared=tuple(name for name in parameters if "rotary" in name),
            )


def unsupported(network: nn.Module, family: Family, reason: str) -> UnsupportedModelError:
    """The error for a network whose row could not be derived; it prints the row to write."""
    lists = family.blocks or (BlockList(path="transformer_blocks", returns=("hidden",)),)
    rows = ", ".join(
        f"BlockList(path={blocks.path!r}, returns={blocks.returns or ('encoder', 'hidden')!r}, "
        f"hidden={blocks.hidden!r}, encoder={blocks.encoder!r}, shared={blocks.shared!r}, joined={blocks.joined!r})"
        for blocks in lists
    )
    known = ", ".join(sorted(FAMILIES))
    return UnsupportedModelError(
        f"{type(unwrapped(network)).__name__} is not among the known families ({known}) and its row could not be "
        f"derived: {reason}. What reuses the network's output (scope 'output', such as 'ab_cache') needs no "
        "row; to reuse blocks, correct and register this one before accelerating:\n"
        f"from flowaccel.hooks import BlockList, Family, register_family\n"
        f"register_family(Family(name='mine', networks=({type(unwrapped(network)).__name__!r},), blocks=({rows},), "
        f"guidance={family.guidance!r}, time={family.time!r}, shared={family.shared!r}))"
    )
