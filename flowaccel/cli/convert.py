"""`flowaccel convert`: official checkpoints into loadable folders, and back."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from flowaccel.cli.common import friendly_errors, say
from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.dynamic_width.networks import DynamicSiTTransformer2DModel
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel
from flowaccel.models import SiTTransformer2DModel
from flowaccel.models.official import dit_transformer_from_official
from flowaccel.recipe.loading import load_network


class Target(StrEnum):
    """Kind of folder or file to write."""

    sit = "sit"
    dydit = "dydit"
    diffmoe = "diffmoe"
    dit = "dit"
    official = "official"


NETWORKS: dict[Target, type[SiTTransformer2DModel]] = {
    Target.sit: SiTTransformer2DModel,
    Target.dydit: DynamicSiTTransformer2DModel,
    Target.diffmoe: MoESiTTransformer2DModel,
}
"""Networks with an official layout of their own, which they also write."""


def convert(
    source: Annotated[Path, typer.Argument(help="An official .pt or .safetensors file; for --to official a folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; for --to official a .safetensors file.")],
    to: Annotated[
        Target,
        typer.Option(
            help="sit: SiTTransformer2DModel; dydit and diffmoe: its forms with dynamic width and with experts, from "
            "checkpoints of DyDiT and DiffMoE; dit: diffusers' own DiT; official: back."
        ),
    ] = Target.sit,
    which: Annotated[str | None, typer.Option(help="Entry of a training checkpoint: ema, model, ...")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="For widths that no published size has.")] = None,
    out_channels: Annotated[int | None, typer.Option(help="Returned channels, for refiners (4).")] = None,
) -> None:
    """Convert a checkpoint in the layout of the official SiT, DiT, DyDiT and DiffMoE repositories.

    Example: flowaccel convert SiT-XL-2-256x256.pt --out sit-xl
    """
    with friendly_errors():
        given = {"num_attention_heads": num_attention_heads, "out_channels": out_channels}
        overrides = {name: value for name, value in given.items() if value is not None}
        if to is Target.official:
            write_official(source, out)
        elif to is Target.dit:
            dit_transformer_from_official(source, which, overrides).save_pretrained(out)
        else:
            model = NETWORKS[to].from_official(source, which=which, **overrides)
            model.save_pretrained(out)
            shown = {key: value for key, value in model.config.items() if not key.startswith("_")}
            say(f"configuration: {json.dumps(shown)}")
        say(f"wrote {out}")


def write_official(folder: Path, out: Path) -> None:
    """Write the network in `folder` to the file `out`, in the layout of the repository that it comes from.

    Raises:
        WeightsNotFoundError, CheckpointError: no network in `folder`.
        UnsupportedModelError: a network without an official layout, or settings that the layout cannot express.
    """
    network = load_network(folder, "transformer")
    if not isinstance(network, SiTTransformer2DModel):
        known = ", ".join(kind.__name__ for kind in NETWORKS.values())
        raise UnsupportedModelError(f"{folder} holds a {type(network).__name__}; a layout is known of {known}")
    state = network.to_official()
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, out)
