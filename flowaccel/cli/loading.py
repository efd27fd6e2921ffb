"""Loading of pipelines, recipes and devices by the names that the commands take."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState

from flowaccel import zoo
from flowaccel.cli.common import say
from flowaccel.data import PROMPT_SETS
from flowaccel.evaluation.features.extractors import module_of
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, saved_recipe

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|zoo:SET",
        help=f"UTF-8 text, one prompt a line, or {', '.join(zoo.PREFIX + s for s in PROMPT_SETS)}.",
    ),
]


def resolve_device(name: str) -> str:
    """Return the name of a device that this machine has.

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
    """Return a dtype by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def open_pipeline(name: str, device: str = "cpu", dtype: str = "float32") -> Any:
    """Load PIPE: `zoo:NAME`, a folder or a Hub id."""
    return load_pipeline(name, torch_dtype=resolve_dtype(dtype), device=resolve_device(device))


def zoo_entry(name: str) -> zoo.Entry | None:
    """Return the zoo's entry of PIPE, or None if it is not from the zoo."""
    return zoo.entry(name) if name.startswith(zoo.PREFIX) else None


def saved_with(name: str) -> Recipe | None:
    """Return the recipe that is saved beside the components of PIPE, or None."""
    recipe = saved_recipe(name)
    if recipe is not None:
        say(f"recipe {recipe.name!r} is saved with {name}; --recipe none leaves the pipeline as it is")
    return recipe


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


@contextmanager
def own_modules(*names: str | None) -> Iterator[None]:
    """Allow feature networks and rewards named by the user to be imported from the working directory.

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
