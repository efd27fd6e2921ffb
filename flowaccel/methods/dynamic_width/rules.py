"""Rules for dynamic networks: the parts that can be left out, one row per model family.

A gate switches units, attention heads or groups of hidden channels, by the linear layers whose rows make them and whose
columns read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from flowaccel.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """Units of one module of a block."""

    name: str
    """The module, such as `attn` or `ff`."""
    kind: Literal["heads", "channels"]
    rows: tuple[str, ...]
    """Linear layers of the block whose output rows are the units."""
    columns: tuple[tuple[str, int], ...]
    """Linear layers whose input columns are the units, and at which multiple of the network's width these begin."""
    everywhere: tuple[str, ...] = ()
    """Entries of `rows` that are computed for all tokens even where tokens are left out."""


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """Modules at which a feed-forward can leave out tokens."""

    norm: str
    """The module that is given the residual stream before the feed-forward."""
    feed_forward: str


@dataclass(frozen=True, kw_only=True)
class BlockRule:
    """Rules for the blocks of one module list."""

    path: str
    gates: tuple[GateRule, ...]
    tokens: TokenRule | None = None
    """None: no tokens are left out, unless `fused`."""
    fused: bool = False
    """Attention and feed-forward run side by side on text and image tokens joined (FLUX's single-stream block): tokens
    are left out of both."""


@dataclass(frozen=True, kw_only=True)
class DynamicRule:
    """Rules for one model family."""

    family: str
    base: str
    """Class name of the network."""
    time_proj: str
    """The module that makes sinusoids of the timestep."""
    time_embed: str
    """The module that embeds them: what it returns depends on time alone, and routers read it."""
    time_span: float
    """The largest `timestep` argument."""
    time_scale: float = 1.0
    """Factor that the network applies to that argument before `time_proj`."""
    blocks: tuple[BlockRule, ...]


def _heads(name: str, *, text: bool = False) -> GateRule:
    rows = [f"{name}.to_q", f"{name}.to_k", f"{name}.to_v"]
    columns = [(f"{name}.to_out.0", 0)]
    if text:  # joint attention needs the same heads in both streams
        rows += [f"{name}.add_q_proj", f"{name}.add_k_proj", f"{name}.add_v_proj"]
        columns += [(f"{name}.to_add_out", 0)]
    return GateRule(name=name, kind="heads", rows=tuple(rows), columns=tuple(columns))


def _channels(name: str) -> GateRule:
    return GateRule(name=name, kind="channels", rows=(f"{name}.net.0.proj",), columns=((f"{name}.net.2", 0),))


def _tokens(norm: str) -> TokenRule:
    return TokenRule(norm=norm, feed_forward="ff")


RULES = (
    DynamicRule(
        family="sit",
        base="SiTTransformer2DModel",
        time_proj="time_proj",
        time_embed="time_embed",
        time_span=1.0,
        blocks=(
            BlockRule(path="transformer_blocks", gates=(_heads("attn"), _channels("ff")), tokens=_tokens("norm2")),
        ),
    ),
    DynamicRule(
        family="dit",
        base="DiTTransformer2DModel",
        # every block has its own embedder; all hold the same weights in the released checkpoints
        time_proj="transformer_blocks.0.norm1.emb.time_proj",
        time_embed="transformer_blocks.0.norm1.emb.timestep_embedder",
        time_span=1000.0,
        blocks=(
            BlockRule(path="transformer_blocks", gates=(_heads("attn1"), _channels("ff")), tokens=_tokens("norm3")),
        ),
    ),
    DynamicRule(
        family="sd3",
        base="SD3Transformer2DModel",
        time_proj="time_text_embed.time_proj",
        time_embed="time_text_embed.timestep_embedder",
        time_span=1000.0,
        blocks=(
            BlockRule(
                path="transformer_blocks",
                gates=(_heads("attn", text=True), _heads("attn2"), _channels("ff"), _channels("ff_context")),
                tokens=_tokens("norm2"),
            ),
        ),
    ),
    DynamicRule(
        family="flux",
        base="FluxTransformer2DModel",
        time_proj="time_text_embed.time_proj",
        time_embed="time_text_embed.timestep_embedder",
        time_span=1.0,
        time_scale=1000.0,
        blocks=(
            BlockRule(
                path="transformer_blocks",
                gates=(_heads("attn", text=True), _channels("ff"), _channels("ff_context")),
                tokens=_tokens("norm2"),
            ),
            BlockRule(
                path="single_transformer_blocks",
                gates=(
                    GateRule(
                        name="attn",
                        kind="heads",
                        rows=("attn.to_q", "attn.to_k", "attn.to_v"),
                        columns=(("proj_out", 0),),
                        everywhere=("attn.to_k", "attn.to_v"),
                    ),
                    GateRule(name="proj_mlp", kind="channels", rows=("proj_mlp",), columns=(("proj_out", 1),)),
                ),
                fused=True,
            ),
        ),
    ),
    DynamicRule(
        family="latte",
        base="LatteTransformer3DModel",
        time_proj="adaln_single.emb.time_proj",
        time_embed="adaln_single.emb.timestep_embedder",
        time_span=1000.0,
        # attention to the text (attn2) stays whole: nothing is published about it
        blocks=tuple(
            BlockRule(path=path, gates=(_heads("attn1"), _channels("ff")), tokens=_tokens("norm2"))
            for path in ("transformer_blocks", "temporal_transformer_blocks")
        ),
    ),
)


def rule_of(network: nn.Module | type) -> DynamicRule:
    """Return the rule for a network or its class.

    Raises:
        UnsupportedModelError: there is none; the message names those there are.
    """
    kind = network if isinstance(network, type) else type(network)
    names = {base.__name__ for base in kind.__mro__}
    for rule in RULES:
        if rule.base in names:
            return rule
    raise UnsupportedModelError(
        f"{kind.__name__} has no rules for dynamic width; there are some for "
        f"{', '.join(rule.base for rule in RULES)}. A family is a row in flowaccel/methods/dynamic_width/rules.py: "
        "which linear layers make and read its heads and channels, and which module embeds time alone"
    )
