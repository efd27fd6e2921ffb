"""The commands, joined."""

from __future__ import annotations

import typer

from flowaccel.cli import (
    calibrate,
    compare,
    convert,
    demo,
    evaluate,
    generate,
    plan,
    recipes,
    stats,
    train,
    train_mediators,
    train_policy,
    zoo,
)

app = typer.Typer(
    name="flowaccel",
    help="Makes diffusers flow and diffusion pipelines faster, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("calibrate")(calibrate.calibrate)
app.command("plan")(plan.plan)
app.command("stats")(stats.stats)
app.command("export-npz")(stats.export)
app.command("convert")(convert.convert)
app.command("recipes")(recipes.recipes)
train.app.command("mediators")(train_mediators.mediators)
train.app.command("policy")(train_policy.policy)
app.add_typer(train.app, name="train")
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    """Entry point of the console script."""
    app()
