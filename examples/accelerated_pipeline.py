"""Swap a pipeline for an accelerated one by its `from_pretrained`, generate, save it, and load it again.

python examples/accelerated_pipeline.py                          # the digits model that comes with flowaccel
python examples/accelerated_pipeline.py PIPE RECIPE PROMPT       # any folder or Hub id, preset or saved recipe
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from flowaccel import restore, zoo
from flowaccel.pipelines import AcceleratedPipeline, SiTPipeline
from flowaccel.recipe import resolve


def main(path: str, recipe: str, prompt: str) -> None:
    # Instead of: pipe = StableDiffusion3Pipeline.from_pretrained(path)
    pipe: Any = AcceleratedPipeline.from_pretrained(path, recipe=recipe)
    pipe.set_progress_bar_config(disable=True)
    steps = resolve(recipe).num_inference_steps  # a call decides on its steps, so it is told those of the recipe
    options = {"num_inference_steps": steps} if steps else {}
    images = timed(f"{type(pipe).__name__} with {recipe}", pipe, prompt, **options)
    sheet(images).save("accelerated.png")

    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)  # what diffusers can read, and flowaccel.json beside it
        again: Any = AcceleratedPipeline.from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        same = np.array_equal(sheet(images), sheet(generate(again, prompt, **options)))
        print(f"saved and loaded, it gives {'the same images' if same else 'OTHER IMAGES'}")

    restore(pipe)
    sheet(timed(f"restored, {steps or 'default'} steps", pipe, prompt, **options)).save("restored.png")
    print("wrote accelerated.png and restored.png")


def generate(pipe: Any, prompt: str, **options: Any) -> list[Image.Image]:
    if isinstance(pipe, SiTPipeline):
        generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
        return pipe(list(range(10)), generator=generators, **options).images
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images


def timed(what: str, pipe: Any, prompt: str, **options: Any) -> list[Image.Image]:
    start = time.perf_counter()
    images = generate(pipe, prompt, **options)
    print(f"{what}: {len(images)} images in {time.perf_counter() - start:.2f} s")
    return images


def sheet(images: list[Image.Image]) -> Image.Image:
    """All images in rows of ten; small ones are enlarged so that one can see them."""
    scale = max(1, 64 // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    page = Image.new("RGB", (min(10, len(images)) * width, -(-len(images) // 10) * height))
    for index, image in enumerate(images):
        enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        page.paste(enlarged, (index % 10 * width, index // 10 * height))
    return page


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*given, *(str(zoo.folder("sit-digits")), "flowturbo-H2P4R2", "two red circles")[len(given) :])
