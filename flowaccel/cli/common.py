"""What the commands share: options, loading by name, progress, and errors without tracebacks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowaccel import zoo
from flowaccel.data import PROMPT_SETS
from flowaccel.errors import FlowaccelError, UnnamedCodeError
from flowaccel.evaluation.features import module_of
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, resolve, saved_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Progress and remarks go to stderr, so that stdout holds the result alone.
console = Console(stderr=True)

_ZOO_NAME = re.compile(rf"(?<![\w/]){zoo.PREFIX}[\w-]+")

PipeArgument = Annotated[str, typer.Argument(metavar="PIPE", help="A pipeline folder, a Hub id, or zoo:NAME.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes CUDA where there is one.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
ExpectWorldOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Fail unless N processes were launched.")
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|zoo:SET",
        help=f"UTF-8 text, one prompt a line, or {', '.join(zoo.PREFIX + s for s in PROMPT_SETS)}.",
    ),
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
    """Whole numbers between commas.

    Raises:
        ValueError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"{option} must be whole numbers between commas, such as 4,16, got {text!r}")
    return tuple(int(part) for part in parts)


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
    return load_pipeline(_path(name), torch_dtype=resolve_dtype(dtype), device=resolve_device(device))


def _path(name: str) -> str | Path:
    return zoo.folder(name) if name.startswith(zoo.PREFIX) else name


def zoo_entry(name: str) -> zoo.Entry | None:
    """What the zoo says about PIPE, where it comes from there."""
    return zoo.entry(name) if name.startswith(zoo.PREFIX) else None


def open_recipe(name: str) -> Recipe:
    """Load a recipe by preset name, file, folder, Hub id or zoo:NAME, or several of these joined by `+`."""
    placed = _ZOO_NAME.sub(lambda match: str(zoo.recipe_folder(match[0])), name)
    found = resolve(placed)
    # what was joined is called as it was typed, not by the places of its parts
    return replace(found, name=name) if found.name == placed != name else found


def saved_with(name: str) -> Recipe | None:
    """The recipe that lies beside the components of PIPE, or None."""
    recipe = saved_recipe(_path(name))
    if recipe is not None:
        say(f"recipe {recipe.name!r} is saved with {name}; --recipe none leaves the pipeline as it is")
    return recipe


def say(message: str) -> None:
    """A remark for the person at the terminal, made once for all processes."""
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


# What torchrun, accelerate launch and the MPI launchers set.
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def launched(device: str, expect_world: int | None) -> Iterator[str]:
    """Join the processes that torchrun or accelerate launched, if any; yields the device of this one.

    Raises:
        ValueError: there are more or fewer than `expect_world`.
    """
    several = any(os.environ.get(name, "1") not in ("", "1") for name in _WORLD_SIZES)
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available()) if several else None
    size = 1 if state is None else state.num_processes
    try:
        say(f"processes: {size}")
        if expect_world not in (None, size):
            raise ValueError(
                f"--expect-world {expect_world}, but the number of processes is {size}. Start them with `torchrun "
                f"--nproc-per-node {expect_world} -m flowaccel ...`. On GPUs `accelerate launch --num_processes "
                f"{expect_world} -m flowaccel ...` does the same; with --cpu it starts a single process, whatever "
                "--num_processes says"
            )
        if state is not None and state.device.type == "cuda" and device in ("auto", "cuda"):
            device = str(state.device)
        yield device
    finally:
        if state is not None:
            state.destroy_process_group()  # without this the process ends in SIGABRT


def is_first() -> bool:
    """Whether this process speaks for all that were launched together."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar per stage: yields `notify(stage, done, total)`. Of several processes the first one shows it."""
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


@contextmanager
def own_modules(*names: str | None) -> Iterator[None]:
    """Let the modules of feature networks and rewards that the person typed lie in the working directory.

    It is on `sys.path` inside the block, and only if one of them is not to be found without it: no file that is read,
    and no import of a library, picks up what happens to lie where a command is run.
    """
    modules = {module.partition(".")[0] for name in names if name and (module := module_of(name)) is not None}
    here = os.getcwd()
    wanted = any(module.isidentifier() and importlib.util.find_spec(module) is None for module in modules)
    if not wanted or here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def ask_again(context: typer.Context, error: UnnamedCodeError) -> ValueError:
    """The error with the command that names the code: as it was typed, and one option more."""
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
    """The folder to write to."""
    return out if out is not None else Path("outputs") / default
