"""Commands that are imported when they are run."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flowaccel.recipe.registry import load


def lazy_group(references: Callable[[], Mapping[str, str]]) -> type[TyperGroup]:
    """Return the class of a group of commands.

    Args:
        references: returns `"module:function"` of every command by name; asked for once.
    """

    class LazyGroup(TyperGroup):
        """Group of commands that are imported when they are run; until then, names and summaries are known."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.references = dict(references())
            for name, reference in self.references.items():
                self.add_command(TyperCommand(name, help=summary_of(reference)))

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            """Return the command itself."""
            name, command, rest = super().resolve_command(ctx, args)
            return name, _loaded(name, self.references[name]) if name in self.references else command, rest

    return LazyGroup


@functools.cache
def _loaded(name: str, reference: str) -> Any:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.command(name)(load(reference))
    return typer.main.get_command(app)


def summary_of(reference: str) -> str:
    """Return the first line of a function's docstring, read from its source."""
    module, _, name = reference.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ""
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").split("\n\n")[0]
    return ""
