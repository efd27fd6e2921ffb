"""The only place, with `flowaccel.compat`, that touches the insides of diffusers."""

from flowaccel.hooks.wrap import Wrapped as Wrapped
from flowaccel.hooks.wrap import denoiser as denoiser
from flowaccel.hooks.wrap import wrap as wrap

__all__ = ["Wrapped", "denoiser", "wrap"]
