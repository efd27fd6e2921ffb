"""`flowaccel compare`: the paired difference of two rows of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowaccel.cli.common import JsonOption, ask_again, emit, friendly_errors
from flowaccel.cli.loading import own_modules
from flowaccel.errors import UnnamedCodeError
from flowaccel.evaluation import compare_rows


def compare(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder written by evaluate.")],
    a: Annotated[str, typer.Option("--a", help="The row in question.")],
    b: Annotated[str, typer.Option("--b", help="The row it is compared with.")],
    features: Annotated[
        str | None,
        typer.Option(help="The run's feature network once more; needed for MODULE:ATTRIBUTE and inception:PATH."),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="The same of its CLIP.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Paired difference A - B of every metric of a run, over the same sample ids, with a 95% interval.

    Example: flowaccel compare runs/try --a flowturbo-H2P4R2 --b baseline@8
    """
    with friendly_errors(), own_modules(features, clip):
        try:
            found = compare_rows(run, a, b, features=features, clip=clip)
        except UnnamedCodeError as error:
            raise ask_again(context, error) from error

        def show() -> None:
            table = Table(title=f"{a} - {b}")
            for title in ("metric", "difference", "95% interval", "not worse (5%)"):
                table.add_column(title)
            for name, entry in found["metrics"].items():
                interval = entry["ci95"]
                known = interval is not None
                table.add_row(
                    name,
                    f"{entry['difference']:+.4g}" if known else "undefined",
                    f"[{interval[0]:+.4g}, {interval[1]:+.4g}]" if known else "",
                    "yes" if entry["not_worse"] else "no",
                )
            Console().print(table)
            if "wall_clock" in found:
                ratio, (low, high) = found["wall_clock"]["ratio"], found["wall_clock"]["ci95"]
                Console().print(
                    f"seconds of {a} / seconds of {b}: {ratio:.3f} [{low:.3f}, {high:.3f}]", highlight=False
                )

        emit(found, as_json, show)
