"""Choosing an attention backend, after its kernel has really run once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from flowaccel.errors import MissingExtraError
from flowaccel.extras import require

# our names -> diffusers' backend names
BACKENDS = {"sdpa": "native", "xformers": "xformers", "flash": "_native_flash"}

_CHOSEN: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()


def set_attention(pipe: Any, name: str) -> None:
    """Let the pipeline's network compute attention by `sdpa`, `xformers` or `flash`.

    A backend that is installed need not work (xformers imports without its kernels), so one small attention is
    computed first.

    Raises:
        ValueError: unknown name, or the backend does not work on this device; the message says why.
        MissingExtraError: the package is missing.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {sorted(BACKENDS)}, got {name!r}")
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    _try_kernel(name, pipe.device, next(network.parameters()).dtype)
    try:
        network.set_attention_backend(BACKENDS[name])
    except (RuntimeError, ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"diffusers refuses attention {name!r} for {type(network).__name__} ({reason})") from error
    _CHOSEN[network] = name


def chosen_attention(pipe: Any) -> str | None:
    """What `set_attention` was last told for this pipeline's network, or None."""
    return _CHOSEN.get(pipe.transformer if hasattr(pipe, "transformer") else pipe.unet)


def _try_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    query = torch.zeros(1, 8, 2, 16, device=device, dtype=dtype)
    try:
        if name == "xformers":
            require("xformers.ops").memory_efficient_attention(query, query, query)
        elif name == "flash":
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                heads_first = query.transpose(1, 2)
                torch.nn.functional.scaled_dot_product_attention(heads_first, heads_first, heads_first)
    except MissingExtraError:
        raise
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"attention {name!r} does not work on {device} with {dtype} ({reason}); use sdpa") from error
