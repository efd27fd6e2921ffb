"""`flowaccel generate`: images from a pipeline, with or without a recipe."""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flowaccel.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    emit,
    friendly_errors,
    open_pipeline,
    open_recipe,
    output_folder,
    progress,
    say,
)
from flowaccel.evaluation import Classes, Conditions, Prompts, sample_generator, set_attention
from flowaccel.recipe import accelerate


def generate(
    pipe: PipeArgument,
    recipe: Annotated[str | None, typer.Option(help="A preset name, a recipe file or a folder.")] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids, separated by commas; ranges such as 0-9.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A UTF-8 text file with one prompt a line.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="How many; default one per class or prompt.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default the recipe's or the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    attention: Annotated[str | None, typer.Option(help="sdpa, xformers or flash.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for the PNG files.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write images, one PNG each. An image depends on its class or prompt, the seed and its number, not on the batch.

    Example: flowaccel generate zoo:sit-digits --classes 0-9 --recipe flowturbo-H2P4R2 --out digits
    """
    with friendly_errors():
        pipeline = open_pipeline(pipe, device, dtype)
        conditions = parse_conditions(pipeline, classes, prompt, prompts)
        count = num_images or len(conditions)
        chosen = None if recipe is None else open_recipe(recipe)
        if attention is not None:
            set_attention(pipeline, attention)
        if chosen is not None:
            accelerate(pipeline, chosen)
            steps = steps or chosen.num_inference_steps
        arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        folder = output_folder(out, "generate")
        folder.mkdir(parents=True, exist_ok=True)
        files, start = [], time.perf_counter()
        pipeline.set_progress_bar_config(disable=True)
        with progress() as notify:
            for first in range(0, count, batch_size):
                ids = list(range(first, min(first + batch_size, count)))
                generators = [sample_generator(seed, sample_id) for sample_id in ids]
                images = pipeline(**conditions.arguments(ids), **arguments, generator=generators).images
                for sample_id, image in zip(ids, images, strict=True):
                    files.append(str(folder / f"{sample_id:05d}.png"))
                    image.save(files[-1])
                notify("images", ids[-1] + 1, count)
        seconds = time.perf_counter() - start
        emit(
            {"files": files, "seconds": seconds},
            as_json,
            lambda: say(f"wrote {count} images to {folder} in {seconds:.1f} s"),
        )


def parse_conditions(pipeline: Any, classes: str | None, prompt: list[str] | None, prompts: Path | None) -> Conditions:
    """What to sample for, from the options; without any, every class of a class-conditional pipeline.

    Raises:
        ValueError: none given where needed, or of the wrong kind for the pipeline.
    """
    class_conditional = "class_labels" in inspect.signature(type(pipeline).__call__).parameters
    if class_conditional:
        if prompt or prompts:
            raise ValueError(f"{type(pipeline).__name__} takes classes, not prompts; use --classes")
        return Classes(
            parse_classes(classes) if classes else tuple(range(min(1000, pipeline.transformer.config.num_classes)))
        )
    if classes:
        raise ValueError(f"{type(pipeline).__name__} takes prompts, not classes; use --prompt or --prompts")
    if prompts is not None:
        return Prompts.from_file(prompts)
    if not prompt:
        raise ValueError(f"{type(pipeline).__name__} needs --prompt TEXT or --prompts FILE")
    return Prompts(tuple(prompt))


def parse_classes(text: str) -> tuple[int, ...]:
    """`"0,3,5-7"` -> (0, 3, 5, 6, 7).

    Raises:
        ValueError: not of that form.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdigit() or (dash and not (high.isdigit() and int(low) <= int(high))):
            raise ValueError(f"--classes must look like 0,3,5-7, got {text!r}")
        found += range(int(low), int(high or low) + 1)
    return tuple(found)
