"""Sample digits with FlowTurbo, check that `restore` undoes it, and save a contact sheet.

python examples/generate_digits.py
"""

from __future__ import annotations

import torch

import flowaccel
from flowaccel import zoo
from flowaccel.pipelines import SiTPipeline

pipe = SiTPipeline.from_pretrained(zoo.folder("sit-digits"), dtype=torch.float32)
generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
before = pipe(list(range(10)), num_inference_steps=8, generator=generators, output_type="np").images

with flowaccel.accelerated(pipe, "flowturbo-H2P4R2"):
    generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
    images = pipe(list(range(10)), generator=generators).images
for digit, image in enumerate(images):
    image.resize((64, 64), resample=0).save(f"digit-{digit}.png")

generators = [torch.Generator().manual_seed(seed) for seed in range(10)]
after = pipe(list(range(10)), num_inference_steps=8, generator=generators, output_type="np").images
assert (before == after).all()
print("wrote digit-0.png to digit-9.png; the restored pipeline gives the images of before, bit for bit")
