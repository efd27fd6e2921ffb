"""What the commands share: options, loading by name, progress, and errors without tracebacks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowaccel import zoo
from flowaccel.errors import FlowaccelError
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Progress and remarks go to stderr, so that stdout holds the result alone.
console = Console(stderr=True)

PipeArgument = Annotated[str, typer.Argument(metavar="PIPE", help="A pipeline folder, a Hub id, or zoo:NAME.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def resolve_device(name: str) -> str:
    """A device name that this machine has.

    Raises:
        ValueError: unknown or absent.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def resolve_dtype(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def open_pipeline(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load PIPE: `zoo:NAME`, a folder or a Hub id."""
    path = zoo.folder(name) if name.startswith(zoo.PREFIX) else name
    return load_pipeline(path, torch_dtype=resolve_dtype(dtype), device=resolve_device(device))


def open_recipe(name: str) -> Recipe:
    """Load a recipe by preset name, file or folder."""
    return resolve(name)


def say(message: str) -> None:
    """A remark for the person at the terminal."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def emit(data: Any, as_json: bool, otherwise: Callable[[], None]) -> None:
    """Print the result: JSON on stdout for machines, or whatever `otherwise` prints."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        otherwise()


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage: yields `notify(stage, done, total)`."""
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


def _exit(message: str, code: int) -> typer.Exit:
    console.print("[red]error:[/red] ", end="")
    console.print(message, markup=False, highlight=False, soft_wrap=True)  # paths stay whole, to be copied
    return typer.Exit(code)


def output_folder(out: Path | None, default: str) -> Path:
    """The folder to write to."""
    return out if out is not None else Path("outputs") / default
