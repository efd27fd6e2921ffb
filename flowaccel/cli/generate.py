"""`flowaccel generate`: images or videos from a pipeline, with or without a recipe."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image

from flowaccel import zoo
from flowaccel.cli.common import (
    ArgumentOption,
    DeviceOption,
    DtypeOption,
    ExpectWorldOption,
    JsonOption,
    PipeArgument,
    SeedOption,
    emit,
    friendly_errors,
    output_folder,
    progress,
    say,
)
from flowaccel.cli.loading import PromptsOption, launched, open_pipeline, saved_with, zoo_entry
from flowaccel.cli.video import save_video, video_suffix
from flowaccel.data import PROMPT_SETS
from flowaccel.evaluation import Classes, Conditions, Prompts, sample_generator, set_attention
from flowaccel.evaluation.samples.call_arguments import check_arguments, parameters, unknown_argument
from flowaccel.evaluation.samples.finite import check_samples
from flowaccel.evaluation.samples.processes import processes
from flowaccel.evaluation.samples.prompt_lengths import too_long
from flowaccel.hooks import Pipeline
from flowaccel.recipe import Recipe, accelerate, resolve
from flowaccel.recipe import report as last_report

FPS = 16  # for videos of pipelines that do not say how fast theirs are


def generate(
    pipe: PipeArgument,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A preset name, a recipe file or a folder; default the one saved with PIPE, `none` for none."
        ),
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Class ids, separated by commas; ranges such as 0-9.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: PromptsOption = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="How many images or videos; default one per class or prompt.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; default the recipe's or the pipeline's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the pipeline's.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default the pipeline's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video; default the pipeline's.")] = None,
    argument: ArgumentOption = None,
    fps: Annotated[
        float | None, typer.Option(help=f"Frames per second of a video; default the pipeline's, else {FPS}.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images or videos per call; default 16 images or 1 video.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="sdpa, xformers or flash.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    out: Annotated[Path | None, typer.Option(help="Folder for the files.")] = None,
    expect_world: ExpectWorldOption = None,
    report: Annotated[
        bool, typer.Option("--report", help="Say what the last call did: steps, network calls, seconds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write images, one PNG each, or videos: mp4 with the extra `video`, else animated WebP. Each depends on its class
    or prompt, the seed and its number, not on the batch. Several processes (torchrun) share the work.

    Example: flowaccel generate zoo:sit-digits --classes 0-9 --recipe flowturbo-H2P4R2 --out digits
    """
    with friendly_errors(), launched(device, expect_world) as own_device:
        pipeline = open_pipeline(pipe, own_device, dtype)
        conditions = parse_conditions(pipeline, classes, prompt, prompts)
        count = num_images or len(conditions)
        chosen = saved_with(pipe) if recipe is None else resolve(recipe)
        arguments = call_arguments(
            pipeline,
            pipe,
            argument,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_frames=num_frames,
            fps=fps,
        )
        if "output_type" in parameters(pipeline):
            arguments["output_type"] = "np"  # numbers, of which it can be seen whether they are finite
        prompted = conditions.texts(range(count))
        if prompted is not None and (problem := too_long(pipeline, prompted, arguments)) is not None:
            say(f"warning: {problem}")
        if attention is not None:
            set_attention(pipeline, attention)
        if chosen is not None:
            steps = steps or chosen.num_inference_steps
        if chosen is not None or report:
            accelerate(pipeline, chosen or Recipe(name="none"))
        if steps is not None:
            arguments["num_inference_steps"] = steps
        kind, suffix = ("videos", video_suffix()) if makes_videos(pipeline) else ("images", ".png")
        batch = batch_size or (1 if kind == "videos" else 16)
        folder = output_folder(out, "generate")
        folder.mkdir(parents=True, exist_ok=True)
        files = [str(folder / f"{sample_id:05d}{suffix}") for sample_id in range(count)]
        if count < len(conditions):
            say(f"only the first {count} of {len(conditions)} prompts or classes are sampled for")
        start = time.perf_counter()
        pipeline.set_progress_bar_config(disable=True)
        with processes() as world, progress() as notify:
            mine = world.share(range(count))
            for first in range(0, len(mine), batch):
                ids = mine[first : first + batch]
                generators = [sample_generator(seed, sample_id) for sample_id in ids]
                output = pipeline(**conditions.arguments(ids), **arguments, generator=generators)
                made = output.frames if kind == "videos" else output.images
                check_samples(pipeline, made, ids)  # before any of them is written
                for sample_id, sample in zip(ids, made, strict=True):
                    if kind == "videos":
                        save_video(as_pil(sample), files[sample_id], fps or frame_rate(pipeline))
                    else:
                        as_pil(sample)[0].save(files[sample_id])
                notify(kind, first + len(ids), len(mine))
            world.wait()
        seconds = time.perf_counter() - start
        if report and mine:
            say(str(last_report(pipeline)))
        if suffix == ".webp":
            say("animated WebP, because mp4 needs: pip install 'flowaccel[video]'")
        emit(
            {"files": files, "seconds": seconds},
            as_json,
            lambda: say(f"wrote {count} {kind} to {folder} in {seconds:.1f} s"),
        )


def as_pil(sample: Any) -> list[Image]:
    """Convert one sample to PIL images.

    An array (..., H, W, C) in [0, 1] gives its frames, rounded as diffusers does.
    """
    if isinstance(sample, Image):
        return [sample]
    if not isinstance(sample, np.ndarray):
        return list(sample)
    made: list[Image] = VaeImageProcessor.numpy_to_pil(sample)
    return made


def makes_videos(pipeline: Pipeline) -> bool:
    """Whether a number of frames can be passed to the pipeline."""
    return "num_frames" in parameters(pipeline)


def call_arguments(
    pipeline: Pipeline, pipe: str, argument: list[str] | None, *, fps: float | None = None, **given: Any
) -> dict[str, Any]:
    """Return the arguments of a call.

    Options that are not None override those of --argument, which override the zoo's for PIPE.

    Raises:
        ValueError: the pipeline does not take one of them, flowaccel sets it itself, or it is given twice.
    """
    options = {name: value for name, value in given.items() if value is not None}
    for name in [*options, *(["num_frames"] if fps is not None else [])]:
        if name not in parameters(pipeline):
            spelled = "--fps" if name not in options else f"--{name.replace('_', '-')}"
            raise unknown_argument(pipeline, name, spelled)
    free = free_arguments(pipeline, pipe, argument)
    twice = sorted(options.keys() & parse_arguments(argument).keys())
    if twice:
        raise ValueError(f"{twice[0]} is given both by --{twice[0].replace('_', '-')} and by --argument; give one")
    known = zoo_entry(pipe)
    guidance = {} if known is None or known.guidance_scale is None else {"guidance_scale": known.guidance_scale}
    arguments = {**free, **guidance, **options}
    if fps is not None and (rate := _rate_argument(pipeline)) is not None:
        arguments[rate] = fps
    return arguments


def free_arguments(pipeline: Pipeline, pipe: str, argument: list[str] | None) -> dict[str, Any]:
    """Return the arguments of --argument over those that the zoo has for PIPE.

    Raises:
        ValueError: as `parse_arguments` and `check_arguments`.
    """
    given = parse_arguments(argument)
    check_arguments(pipeline, given)
    known = zoo_entry(pipe)
    return {**({} if known is None else known.arguments), **given}


def parse_arguments(texts: list[str] | None, option: str = "--argument", example: str = "height=512") -> dict[str, Any]:
    """Parse `["height=512", "negative_prompt=blurry"]` into `{"height": 512, "negative_prompt": "blurry"}`.

    Args:
        texts: values of an option that may be given several times.
        option: its name, for messages,
        example: and one of its values.

    Raises:
        ValueError: not of that form, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"{option} must look like NAME=VALUE, such as {example}, got {text!r}")
        if name in found:
            raise ValueError(f"{option} {name} is given twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def frame_rate(pipeline: Pipeline) -> float:
    """Return the default frame rate of the pipeline's videos, in frames per second."""
    rate = _rate_argument(pipeline)
    default = FPS if rate is None else parameters(pipeline)[rate].default
    return default if isinstance(default, (int, float)) else FPS


def _rate_argument(pipeline: Pipeline) -> str | None:
    return next((name for name in ("frame_rate", "fps") if name in parameters(pipeline)), None)


def parse_conditions(
    pipeline: Pipeline, classes: str | None, prompt: list[str] | None, prompts: str | None
) -> Conditions:
    """Return the conditions that the options give; without any, every class of a class-conditional pipeline.

    Raises:
        ValueError: none given where needed, or of the wrong kind for the pipeline.
    """
    class_conditional = "class_labels" in parameters(pipeline)
    if class_conditional:
        if prompt or prompts:
            raise ValueError(f"{type(pipeline).__name__} takes classes, not prompts; use --classes")
        return Classes(
            parse_classes(classes) if classes else tuple(range(min(1000, pipeline.transformer.config.num_classes)))
        )
    if classes:
        raise ValueError(f"{type(pipeline).__name__} takes prompts, not classes; use --prompt or --prompts")
    if prompt and prompts:
        raise ValueError("give --prompt or --prompts, not both")
    if prompts is not None:
        return Prompts.from_zoo(prompts) if prompts.startswith(zoo.PREFIX) else Prompts.from_file(prompts)
    if not prompt:
        known = ", ".join(zoo.PREFIX + name for name in PROMPT_SETS)
        raise ValueError(
            f"{type(pipeline).__name__} needs --prompt TEXT or --prompts FILE|zoo:SET; the sets are {known} (evaluate "
            "takes --prompts only)"
        )
    return Prompts(tuple(prompt))


def parse_classes(text: str) -> tuple[int, ...]:
    """Parse `"0,3,5-7"` into (0, 3, 5, 6, 7).

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
