"""`flowaccel recipes`: the available recipes and rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowaccel import recipe
from flowaccel.cli.common import JsonOption, emit, friendly_errors
from flowaccel.recipe import PRESETS
from flowaccel.recipe.compatibility import RULES


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Show this recipe as JSON: a preset name, a file, a folder or a Hub id.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Show which accelerators exclude or need each other.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the preset recipes, show one, or show the rules.

    Example: flowaccel recipes flowturbo-H2P4R2
    """
    with friendly_errors():
        if rules and name is not None:
            raise ValueError(f"give a recipe or --rules, not both; got {name!r}")
        if name is not None:
            found = recipe.resolve(name).to_dict()
            emit(found, as_json, lambda: Console().print_json(data=found))
        elif rules:
            rows = {str(rule): rule.reason for rule in RULES}
            emit(rows, as_json, lambda: _show(("rule", "reason"), rows.items()))
        else:
            emit(dict(PRESETS), as_json, _show_presets)


def _show_presets() -> None:
    _show(("name", "what it is"), PRESETS.items())
    Console().print(
        "Append @N for N steps, for example heun@8; samplers, caches and guidance take options, such as "
        "fbcache:threshold=0.1,max_run=3@28 or guidance_skip:threshold=0.99. Join several with +: ab2@12+guidance_skip."
    )


def _show(header: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
