"""`flowaccel stats` and `flowaccel export-npz`: reference statistics, and samples for other evaluators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowaccel.cli.common import DeviceOption, friendly_errors, say
from flowaccel.cli.loading import own_modules, resolve_device
from flowaccel.evaluation import export_npz, load_features, load_reference, save_statistics
from flowaccel.evaluation.features.statistics import is_statistics


def stats(
    source: Annotated[str, typer.Argument(help="A folder of images, or zoo:SET.")],
    features: Annotated[
        str, typer.Option(help="inception, clip or dinov2, alone or with :PATH; zoo:NAME; MODULE:ATTRIBUTE.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    with_features: Annotated[
        bool, typer.Option("--with-features", help="Also every image's features, for kid, precision and recall.")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Compute the statistics of reference images once, for `flowaccel evaluate --reference FILE`.

    Example: flowaccel stats photos --features inception:inception-2015-12-05.pt --out photos.safetensors
    """
    with friendly_errors(), own_modules(features):
        if is_statistics(source):
            raise ValueError(f"{source} is a statistics file already; stats takes a folder of images or zoo:SET")
        network = load_features(features, resolve_device(device))
        reference = load_reference(source, network)
        save_statistics(reference, network, out, with_features=with_features)
        say(f"wrote {out}: {reference.moments.count} images, {len(reference.moments.mean)} features of {network.name}")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder written by evaluate.")],
    row: Annotated[str, typer.Option(help="The row whose samples to write.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")],
) -> None:
    """Write a row's samples as the npz file that the evaluator of guided-diffusion (ADM) reads.

    Example: flowaccel export-npz runs/try --row baseline --out samples.npz
    """
    with friendly_errors():
        count = export_npz(run, row, out)
        say(f"wrote {count} images to {out}")
