"""What moves between diffusers' versions (0.42 to 0.43) and is not a public interface, in one place."""

from __future__ import annotations

from typing import Any

# A model_index.json that names ["flowaccel", CLASS] makes diffusers look for these base classes in flowaccel.
from diffusers import DiffusionPipeline as DiffusionPipeline
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.pipelines import pipeline_loading_utils

AROUND_FORWARD = ("forward", "_hf_hook", "_old_forward", "_diffusers_hook")
"""What accelerate, diffusers and others put on a module around its forward; it leads back to that module."""


def register_components(library: str = "flowaccel") -> None:
    """Let `model_index.json` name components as `["flowaccel", "ClassName"]`, as diffusers does for its own.

    diffusers keeps the loadable base classes of every library in a module-level dictionary. Without an entry a
    component of another library is recorded by its full module path, which a fresh process can only load after
    importing exactly that module. Every module that defines components calls this.
    """
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
        library,
        {
            "ModelMixin": ["save_pretrained", "from_pretrained"],
            "SchedulerMixin": ["save_pretrained", "from_pretrained"],
            "DiffusionPipeline": ["save_pretrained", "from_pretrained"],
        },
    )


def block_output_order(block_class: type) -> tuple[str, ...]:
    """What diffusers' own caches know of a block class: the order of its outputs, `()` where they do not know it."""
    try:
        known = TransformerBlockRegistry.get(block_class)
    except ValueError:
        return ()
    places = {
        known.return_hidden_states_index: "hidden",
        known.return_encoder_hidden_states_index: "encoder",
    }
    places.pop(None, None)
    return tuple(places[index] for index in sorted(places))


def register_block(block_class: type) -> None:
    """Tell diffusers' own caches of a block class that takes `hidden_states` first and returns them alone."""
    TransformerBlockRegistry.register(block_class, TransformerBlockMetadata(return_hidden_states_index=0))


def foreign_cache(network: Any) -> str | None:
    """Which other framework caches in `network` and how to switch it off, or None."""
    if getattr(network, "_cache_config", None) is not None:
        kind = type(network._cache_config).__name__
        return f"diffusers' own {kind}; call disable_cache() on it first"
    if getattr(network, "_is_cached", False):
        return "cache-dit or para-attn; call cache_dit.disable_cache(pipe), or load the pipeline anew, first"
    for module in network.modules():
        for name, hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).items():
            if hook._is_stateful:
                return f"the diffusers hook {name!r}; remove it first"
    return None
