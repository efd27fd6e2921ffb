"""`flowaccel zoo`: the reference checkpoints, and the commands that rebuild them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowaccel import zoo
from flowaccel.cli.common import JsonOption, emit, friendly_errors, progress, say


def list_entries(as_json: JsonOption = False) -> None:
    """List what there is.

    Example: flowaccel zoo list
    """

    def size(folder: Path) -> float:
        return sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6

    found = [
        {
            "name": zoo.PREFIX + e.name,
            "kind": e.kind,
            "mb": round(size(e.folder), 2),
            "description": e.description,
            "rebuild": e.command,
        }
        for e in zoo.ENTRIES.values()
    ]

    def show() -> None:
        table = Table("name", "kind", "MB", "what it is", "rebuilt by")
        for entry in found:
            table.add_row(*(str(value) for value in entry.values()))
        Console().print(table)

    emit(found, as_json, show)


def show_entry(name: Annotated[str, typer.Argument(help="An entry, with or without zoo:.")]) -> None:
    """Print an entry's model card.

    Example: flowaccel zoo show sit-digits
    """
    with friendly_errors():
        Console().print((zoo.folder(name) / "README.md").read_text(), markup=False)


def build(
    name: Annotated[str, typer.Argument(help="An entry, with or without zoo:.")],
    out: Annotated[Path, typer.Option(help="Where to write it; a started training is resumed.")],
) -> None:
    """Train an entry again from the embedded data.

    Example: flowaccel zoo build digits-features --out build/digits-features
    """
    with friendly_errors(" The last checkpoint is kept; the same command goes on from there."):
        from flowaccel.zoo_build.builders import BUILDERS  # the lists need no torch

        builder = BUILDERS[zoo.entry(name).name]
        with progress() as notify:
            for stage, state, total in builder(out):
                notify(stage, state.step, total)
        say(f"wrote {out}")
