"""Model families: what cannot be read off a network at run time, and how it is derived for unknown networks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from flowaccel.compat import block_output_order
from flowaccel.errors import UnsupportedModelError
from flowaccel.hooks.pipeline import Pipeline

Guidance = Literal["uncond_cond", "cond_uncond"]
Time = Literal["timestep", "sigma", "one_minus_sigma"]


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """A `ModuleList` of blocks that run one after the other, or a single block, with their arguments and outputs."""

    path: str
    """Name of the network's attribute."""
    returns: tuple[str, ...]
    """Output of a block: `("hidden",)` for a bare tensor, else the order of the returned tuple, such as
    `("encoder", "hidden")`; empty if derived and still to be determined by the first network call. A block of a UNet
    that returns its skip connections as well: `("hidden", "skips")`."""
    hidden: str = "hidden_states"
    """Name of the argument with the image tokens (rows, tokens, width)."""
    encoder: str | None = None
    """Name of the argument with the text tokens, if the block has one."""
    shared: tuple[str, ...] = ()
    """Names of arguments that all rows share: they have no leading rows axis."""
    joined: bool = False
    """Whether `hidden` holds the text tokens followed by the image tokens."""
    apart: bool = False
    """Whether its tokens are others than those that left the list before: what its blocks add is then cached for
    itself, rather than as one sum with what came before."""
    condition: str = "temb"
    """Name of the argument (rows, D) that modulates the blocks."""


@dataclass(frozen=True, kw_only=True)
class TimeSignal:
    """Source of a network's time embedding (rows, ...); either `argument` or `module` is given."""

    argument: str = ""
    """Name of an argument of the first block."""
    module: str = ""
    """Path of the network's module that returns it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Calling conventions of the networks of one model family."""

    name: str
    networks: tuple[str, ...]
    """Class names of the networks; subclasses are included."""
    blocks: tuple[BlockList, ...]
    """Lists of blocks, in the order in which they run."""
    guidance: Guidance = "uncond_cond"
    """Order of a batch that holds both branches. Pipelines that call the network once per branch call the
    conditional one first, regardless of this."""
    time: Time = "timestep"
    """Unit of the `timestep` argument: the scheduler's timestep, that divided by `num_train_timesteps`, or one minus
    the latter."""
    nested: bool = False
    """Whether the blocks are those of a UNet: down, middle and up, with skip connections from the down to the up
    blocks. Its deep blocks are reused as DeepCache does (arXiv 2312.00858): the outer ones run, with fresh skips."""
    time_argument: str = "timestep"
    """Name of the network's argument for the time."""
    shared: tuple[str, ...] = ()
    """Names of the network's arguments that all rows share."""
    lists: tuple[str, ...] = ()
    """Names of arguments that are lists with one entry per row, as Z-Image takes images."""
    extra: tuple[str, ...] = ()
    """Names of arguments that mark a call as beyond guidance when they are given and not False, such as SD3's
    `skip_layers`."""
    time_embedding: TimeSignal | None = None
    """Source of the time embedding, the output of the network's first module for the time; None if not known."""
    time_projection: TimeSignal | None = None
    """Source of the projected time embedding from which the blocks take their shifts and scales, if the network has
    one for all blocks."""
    own_timesteps: bool = False
    """Whether the pipelines pass timesteps that are not the scheduler's noise levels (CogView4 passes unshifted ones
    to the network), so that only the scheduler they were made with fits."""
    derived: bool = False
    """Whether the family was derived from the network instead of registered."""

    @property
    def velocity_sign(self) -> float:
        """Factor between the network's velocity and diffusers', noise - data: pipelines whose time runs to data at 1
        negate it."""
        return -1.0 if self.time == "one_minus_sigma" else 1.0

    def argument_of(self, timestep: Tensor, scale: int) -> Tensor:
        """Return the network's time argument at timesteps of a scheduler with `scale` of them in training."""
        return {"timestep": timestep, "sigma": timestep / scale, "one_minus_sigma": 1 - timestep / scale}[self.time]

    def timestep_of(self, argument: float, scale: int) -> float:
        """Return the timestep at which the network is given this time argument; the inverse of `argument_of`."""
        return {"timestep": argument, "sigma": argument * scale, "one_minus_sigma": (1 - argument) * scale}[self.time]


_JOINT = ("encoder", "hidden")
_TEXT = "encoder_hidden_states"
_ROTARY = ("image_rotary_emb",)

FAMILIES: dict[str, Family] = {}
"""Registered families by name; `register_family` adds to it."""


def register_family(family: Family) -> Family:
    """Register a family, or replace the one of the same name; the last one registered for a network class applies.

    Raises:
        ValueError: a family without networks, or a block list that returns no `hidden`.
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
            BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),
            BlockList(path="single_transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),
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
        blocks=(BlockList(path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=_ROTARY),),
        shared=_ROTARY,
        time_embedding=TimeSignal(argument="temb"),
    ),
    Family(
        name="cogview4",
        networks=("CogView4Transformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=_ROTARY),),
        shared=_ROTARY,
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
    Family(
        name="z_image",
        networks=("ZImageTransformer2DModel",),
        blocks=(BlockList(path="layers", returns=("hidden",), hidden="x", condition="adaln_input"),),
        guidance="cond_uncond",
        time="one_minus_sigma",
        time_argument="t",
        lists=("x", "cap_feats"),
        time_embedding=TimeSignal(module="t_embedder"),
    ),
    Family(
        name="flux2",
        networks=("Flux2Transformer2DModel",),
        blocks=(
            BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),
            BlockList(path="single_transformer_blocks", returns=("hidden",), shared=_ROTARY, joined=True),
        ),
        time="sigma",
    ),
    Family(
        name="chroma",
        networks=("ChromaTransformer2DModel",),
        blocks=(
            BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),
            BlockList(path="single_transformer_blocks", returns=("hidden",), shared=_ROTARY, joined=True),
        ),
        time="sigma",
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        name="qwen_image",
        networks=("QwenImageTransformer2DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),),
        time="sigma",
        lists=("img_shapes",),
    ),
    Family(
        name="ltx",
        networks=("LTXVideoTransformer3DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden",), encoder=_TEXT),),
        shared=("video_coords",),
    ),
    Family(
        name="hunyuan_video",
        networks=("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
        blocks=(
            BlockList(path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=("freqs_cis",)),
            BlockList(path="single_transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=_ROTARY),
        ),
    ),
    Family(
        name="lumina2",
        networks=("Lumina2Transformer2DModel",),
        blocks=(BlockList(path="layers", returns=("hidden",)),),
        time="one_minus_sigma",
    ),
    Family(
        name="ltx2",
        networks=("LTX2VideoTransformer3DModel",),
        # The second stream is the sound.
        blocks=(BlockList(path="transformer_blocks", returns=("hidden", "encoder"), encoder="audio_hidden_states"),),
        shared=("video_coords", "audio_coords", "spatio_temporal_guidance_blocks"),
        extra=("spatio_temporal_guidance_blocks", "isolate_modalities"),
    ),
    Family(
        name="wan_vace",
        networks=("WanVACETransformer3DModel",),
        blocks=(BlockList(path="blocks", returns=("hidden",), encoder=_TEXT, shared=("rotary_emb",)),),
        shared=("control_hidden_states_scale",),
        time_embedding=TimeSignal(module="condition_embedder.time_embedder"),
        time_projection=TimeSignal(argument="temb"),
    ),
    Family(
        name="wan_animate",
        networks=("WanAnimateTransformer3DModel",),
        blocks=(BlockList(path="blocks", returns=("hidden",), encoder=_TEXT, shared=("rotary_emb",)),),
        time_projection=TimeSignal(argument="temb"),
    ),
    Family(
        name="consisid",
        networks=("ConsisIDTransformer3DModel",),
        blocks=(BlockList(path="transformer_blocks", returns=("hidden", "encoder"), encoder=_TEXT, shared=_ROTARY),),
        shared=_ROTARY,
        time_embedding=TimeSignal(argument="temb"),
    ),
    Family(
        name="hidream",
        networks=("HiDreamImageTransformer2DModel",),
        blocks=(
            BlockList(path="double_stream_blocks", returns=("hidden", "encoder"), encoder=_TEXT),
            BlockList(path="single_stream_blocks", returns=("hidden",), apart=True),
        ),
        time_argument="timesteps",
    ),
    Family(
        name="bria_fibo",
        networks=("BriaFiboTransformer2DModel",),
        blocks=(
            BlockList(path="transformer_blocks", returns=_JOINT, encoder=_TEXT, shared=_ROTARY),
            BlockList(path="single_transformer_blocks", returns=("hidden",), shared=_ROTARY, apart=True),
        ),
        shared=("img_ids", "txt_ids"),
    ),
    Family(
        name="unet",
        networks=("UNet2DConditionModel",),
        blocks=(
            BlockList(path="down_blocks", returns=("hidden", "skips"), encoder=_TEXT),
            BlockList(path="mid_block", returns=("hidden",), encoder=_TEXT),
            BlockList(path="up_blocks", returns=("hidden",), encoder=_TEXT),
        ),
        nested=True,
        time_embedding=TimeSignal(module="time_embedding"),
    ),
):
    register_family(_family)


def networks(pipe: Pipeline) -> dict[str, nn.Module]:
    """Return the networks that a pipeline calls at its steps, by component name.

    These are `transformer` and, if present, `transformer_2` (Wan 2.2 switches to it during the run), or else `unet`.

    Raises:
        TypeError: the pipeline has none.
    """
    for names in (("transformer", "transformer_2"), ("unet",)):
        found = {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
        if found:
            return found
    raise TypeError(f"{type(pipe).__name__} has neither a transformer nor a unet to accelerate")


def denoiser(pipe: Pipeline) -> Any:
    """Return the first of `networks(pipe)`.

    Raises:
        TypeError: the pipeline has none.
    """
    return next(iter(networks(pipe).values()))


def unwrapped(network: nn.Module) -> nn.Module:
    """Return the network inside `torch.compile(network)`."""
    inner = network.__dict__.get("_modules", {}).get("_orig_mod")
    return network if inner is None else inner


def family_of(network: nn.Module) -> Family:
    """Return the family of a network: the registered one, or one derived from its block lists."""
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
    """Yield the children that are lists of blocks of one class with an argument `hidden_states`."""
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
    """Return the error for a network whose family could not be derived; its message prints the code to register it."""
    lists = family.blocks or (BlockList(path="transformer_blocks", returns=("hidden",)),)
    rows = ", ".join(
        f"BlockList(path={blocks.path!r}, returns={blocks.returns or ('encoder', 'hidden')!r}, "
        f"hidden={blocks.hidden!r}, encoder={blocks.encoder!r}, shared={blocks.shared!r}, joined={blocks.joined!r}, "
        f"apart={blocks.apart!r})"
        for blocks in lists
    )
    if not family.derived:
        return UnsupportedModelError(
            f"the row of family {family.name!r} does not fit this {type(unwrapped(network)).__name__}: {reason}; "
            "correct it, or use scope 'output' (such as 'ab_cache'), which needs no row"
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
