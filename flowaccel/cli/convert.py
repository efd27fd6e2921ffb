"""`flowaccel convert`: official checkpoints into loadable folders, and back."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import save_file

from flowaccel.cli.common import friendly_errors, say
from flowaccel.errors import WeightsNotFoundError
from flowaccel.models import SiTTransformer2DModel
from flowaccel.models.official import dit_transformer_from_official


class Target(StrEnum):
    """What to make."""

    sit = "sit"
    dit = "dit"
    official = "official"


def convert(
    source: Annotated[Path, typer.Argument(help="An official .pt or .safetensors file; for --to official a folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; for --to official a .safetensors file.")],
    to: Annotated[
        Target, typer.Option(help="sit: SiTTransformer2DModel; dit: diffusers' own DiT; official: back.")
    ] = Target.sit,
    which: Annotated[str | None, typer.Option(help="Entry of a training checkpoint: ema, model, ...")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="For widths that no published size has.")] = None,
    out_channels: Annotated[int | None, typer.Option(help="Returned channels, for refiners (4).")] = None,
) -> None:
    """Convert a checkpoint in the layout of the official SiT and DiT repositories.

    Example: flowaccel convert SiT-XL-2-256x256.pt --out sit-xl
    """
    with friendly_errors():
        given = {"num_attention_heads": num_attention_heads, "out_channels": out_channels}
        overrides = {name: value for name, value in given.items() if value is not None}
        if to is Target.official:
            if not (source / "config.json").is_file():
                raise WeightsNotFoundError(f"no transformer in {source}: it has no config.json")
            out.parent.mkdir(parents=True, exist_ok=True)
            state = SiTTransformer2DModel.from_pretrained(source).to_official()
            save_file({key: value.contiguous() for key, value in state.items()}, out)
        elif to is Target.dit:
            dit_transformer_from_official(source, which, overrides).save_pretrained(out)
        else:
            model = SiTTransformer2DModel.from_official(source, which=which, **overrides)
            model.save_pretrained(out)
            shown = {key: value for key, value in model.config.items() if not key.startswith("_")}
            say(f"configuration: {json.dumps(shown)}")
        say(f"wrote {out}")
