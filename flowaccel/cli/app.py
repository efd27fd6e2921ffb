"""Command-line application that joins all commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from flowaccel import __version__
from flowaccel.cli.lazy import lazy_group
from flowaccel.recipe import registry

COMMANDS = {
    "demo": "flowaccel.cli.demo:demo",
    "generate": "flowaccel.cli.generate:generate",
    "evaluate": "flowaccel.cli.evaluate:evaluate",
    "compare": "flowaccel.cli.compare:compare",
    "calibrate": "flowaccel.cli.calibrate:calibrate",
    "stats": "flowaccel.cli.stats:stats",
    "export-npz": "flowaccel.cli.stats:export",
    "convert": "flowaccel.cli.convert:convert",
    "recipes": "flowaccel.cli.recipes:recipes",
}
ZOO = {
    "list": "flowaccel.cli.zoo:list_entries",
    "show": "flowaccel.cli.zoo:show_entry",
    "build": "flowaccel.cli.zoo:build",
}


def _group(references: Callable[[], Mapping[str, str]], text: str) -> typer.Typer:
    return typer.Typer(cls=lazy_group(references), help=text, no_args_is_help=True, callback=_nothing)


def _nothing() -> None: ...


app: typer.Typer = typer.Typer(
    name="flowaccel",
    cls=lazy_group(lambda: {**COMMANDS, **registry.entries("commands")}),
    help="Makes diffusers flow and diffusion pipelines faster, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(_group(lambda: registry.entries("train"), "Train a learned accelerator."), name="train")
app.add_typer(_group(lambda: ZOO, "The reference checkpoints that this repository trained."), name="zoo")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowaccel {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Makes diffusers flow and diffusion pipelines faster, and proves it."""


def main() -> None:
    """Run the console script."""
    app()
