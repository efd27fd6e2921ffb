"""`flowaccel recipes`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowaccel.cli.common import JsonOption, emit, friendly_errors, open_recipe
from flowaccel.recipe import PRESETS


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe as JSON: a preset name, a file or a folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the preset recipes, or show one.

    Example: flowaccel recipes flowturbo-H2P4R2
    """
    with friendly_errors():
        if name is not None:
            found = open_recipe(name).to_dict()
            emit(found, as_json, lambda: Console().print_json(data=found))
            return

        def show() -> None:
            table = Table("name", "what it is")
            for preset, description in PRESETS.items():
                table.add_row(preset, description)
            Console().print(table)
            Console().print("Append @N for N steps, for example heun@8.")

        emit(dict(PRESETS), as_json, show)
