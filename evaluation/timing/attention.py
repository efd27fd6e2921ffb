"""Selection of an attention backend, after its kernel has really run once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch import nn

from flowaccel.errors import MissingExtraError
from flowaccel.extras import require
from flowaccel.hooks import Pipeline

# our names -> diffusers' backend names
BACKENDS = {"sdpa": "native", "xformers": "xformers", "flash": "_native_flash"}
# diffusers' older processors, which call torch's function whatever the backend -> those that call xformers'
XFORMERS = {AttnProcessor2_0: XFormersAttnProcessor, JointAttnProcessor2_0: XFormersJointAttnProcessor}
SDPA = {theirs: torchs for torchs, theirs in XFORMERS.items()}

_CHOSEN: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def set_attention(pipe: Pipeline, name: str) -> None:
    """Set the attention of the pipeline's networks to `sdpa`, `xformers` or `flash`, all of it or none.

    A backend that is installed need not work (xformers imports without its kernels), so one small attention is
    computed first. Networks that do not go through diffusers' backends (DiT, SD3, PixArt, UNets) get processors that
    call xformers; others of them are refused. What diffusers sets here is also its default for networks that were not
    told.

    Args:
        pipe: a diffusers pipeline with a `transformer`, and perhaps a `transformer_2`, or else a `unet`.
        name: see above.

    Raises:
        ValueError: unknown name, the backend does not work on this device, or some attention of a network cannot be
            switched to it; the message says why.
        MissingExtraError: the package is missing.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {sorted(BACKENDS)}, got {name!r}")
    networks = _networks(pipe)
    _try_kernel(name, pipe.device, next(networks[0].parameters()).dtype)
    swapped = [(layer, wanted) for network in networks for layer, wanted in _swaps(network, name)]
    for network in networks:
        _set_backend(network, name)
    for layer, wanted in swapped:
        layer.set_processor(wanted())
    _CHOSEN.update(dict.fromkeys(networks, name))


def chosen_attention(pipe: Pipeline) -> str | None:
    """Return the backend that `set_attention` last set for this pipeline's networks, or None."""
    return _CHOSEN.get(_networks(pipe)[0])


def _networks(pipe: Pipeline) -> list[Any]:
    names = ("transformer", "transformer_2") if hasattr(pipe, "transformer") else ("unet",)
    return [network for name in names if (network := getattr(pipe, name, None)) is not None]


def _processors(network: nn.Module) -> dict[str, Any]:
    """Return the attention layers by name whose processor diffusers lets one choose."""
    return {path: layer for path, layer in network.named_modules() if getattr(layer, "processor", None) is not None}


def _chooses(layer: Any) -> bool:
    return hasattr(layer.processor, "_attention_backend")


def _set_backend(network: Any, name: str) -> None:
    if not any(_chooses(layer) for layer in _processors(network).values()):
        return
    try:
        network.set_attention_backend(BACKENDS[name])
    except (RuntimeError, ImportError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"diffusers refuses attention {name!r} for {type(network).__name__} ({reason})") from error


def _swaps(network: nn.Module, name: str) -> list[tuple[Any, type]]:
    """Return the layers that need another kind of processor, and which.

    These are those that do not choose a backend by name.

    Raises:
        ValueError: there is none for a layer, or the network has no layers.
    """
    layers, found, kind = _processors(network), [], type(network).__name__
    if not layers:
        raise ValueError(f"attention {name!r} cannot be set: {kind} has no attention that diffusers can switch")
    for path, layer in layers.items():
        if _chooses(layer):
            continue
        wanted = _kind_of_processor(layer, name)
        if wanted is None:
            raise ValueError(
                f"attention {name!r} cannot be set: {path} of {kind} has a {type(layer.processor).__name__}, which "
                "does not go through diffusers' attention backends; leave it out, torch chooses its own kernel then"
            )
        if wanted is not type(layer.processor):
            found.append((layer, wanted))
    return found


def _kind_of_processor(layer: Any, name: str) -> type | None:
    """Return the processor class that computes a layer by `name`, of those that do not choose by name."""
    kind = type(layer.processor)
    if name == "sdpa":
        calls = getattr(getattr(kind.__call__, "__code__", None), "co_names", ())
        return SDPA.get(kind, kind if "scaled_dot_product_attention" in calls else None)
    normed = kind is AttnProcessor2_0 and (layer.norm_q is not None or layer.norm_k is not None)
    if name == "flash" or normed:  # XFormersAttnProcessor leaves these norms out
        return None
    return kind if kind in SDPA else XFORMERS.get(kind)


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
