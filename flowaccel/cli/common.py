"""Shared parts of the commands: options, progress, results, and errors without tracebacks."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowaccel.errors import FlowaccelError, UnnamedCodeError

console: Console = Console(stderr=True)


PipeArgument = Annotated[str, typer.Argument(metavar="PIPE", help="A pipeline folder, a Hub id, or zoo:NAME.")]


SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]


DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one.")]


DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


ExpectWorldOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Fail unless N processes were launched.")
]


ArgumentOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Further argument of every pipeline call, such as height=512; JSON or text; may be given several times.",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Parse whole numbers between commas.

    Raises:
        ValueError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"{option} must be whole numbers between commas, such as 4,16, got {text!r}")
    return tuple(int(part) for part in parts)


def say(message: str) -> None:
    """Print a remark for the person at the terminal, once for all processes."""
    if is_first():
        console.print(message, markup=False, highlight=False, soft_wrap=True)


def emit(data: Any, as_json: bool, otherwise: Callable[[], None]) -> None:
    """Print the result, once for all processes: JSON on stdout for machines, or whatever `otherwise` prints."""
    if not is_first():
        return
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        otherwise()


def is_first() -> bool:
    """Whether this process speaks for all that were launched together."""
    torch = sys.modules.get("torch")  # a command without it was not launched together with others
    dist = None if torch is None else torch.distributed
    return dist is None or not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar per stage; yields `notify(stage, done, total)`.

    Of several processes the first one shows it.
    """
    if not is_first():
        yield lambda stage, done, total: None
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def notify(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield notify


@contextmanager
def friendly_errors(resume_hint: str = "") -> Iterator[None]:
    """Turn the errors a user can cause into one line and an exit code: 2 for wrong usage, 1 for failures."""
    try:
        yield
    except KeyboardInterrupt:
        raise _exit(f"interrupted.{resume_hint}", 1) from None
    except (FlowaccelError, FileNotFoundError, ValueError, TypeError) as error:
        raise _exit(str(error), 2) from error
    except (OSError, FloatingPointError) as error:
        raise _exit(f"{error}.{resume_hint}", 1) from error


def ask_again(context: typer.Context, error: UnnamedCodeError) -> ValueError:
    """Return the error with the command that names the code: as it was typed, and one option more."""
    typed: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if not str(context.get_parameter_source(parameter.name or "")).endswith("COMMANDLINE"):
            continue
        option = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            typed += option if one is True else [*option, str(one)]
    again = shlex.join([*context.command_path.split(), *typed, f"--{error.option}", error.name])
    return ValueError(f"{error.reason}. If you trust it, name it yourself: {again}")


def _exit(message: str, code: int) -> typer.Exit:
    console.print("[red]error:[/red] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)  # paths stay whole, to be copied
    return typer.Exit(code)


def output_folder(out: Path | None, default: str) -> Path:
    """Return the folder to write to."""
    return out if out is not None else Path("outputs") / default


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def append_entry(path: Path, entry: dict[str, Any]) -> None:
    """Append one line of JSON to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
