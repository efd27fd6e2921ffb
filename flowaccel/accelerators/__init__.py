"""What a user switches on: one file each."""

from flowaccel.accelerators.base import Accelerator as Accelerator
from flowaccel.accelerators.sampler import Sampler as Sampler
from flowaccel.accelerators.velocity_refiner import VelocityRefiner as VelocityRefiner

ACCELERATORS: dict[str, type[Accelerator]] = {kind.name: kind for kind in (Sampler, VelocityRefiner)}

__all__ = ["ACCELERATORS", "Accelerator", "Sampler", "VelocityRefiner"]
