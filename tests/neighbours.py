"""What users put on a pipeline besides an accelerator: offloading, weights in another precision, LoRA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig
from torch import nn

from flowaccel.hooks import networks

Undo = Callable[[], None]


def modules(pipe: Any) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]


def model_offload(pipe: Any) -> Undo:
    """With the CPU in the part of the GPU. After every call the pipeline takes its hooks off and puts them on again."""
    pipe.enable_model_cpu_offload(device="cpu")

    def undo() -> None:
        pipe.remove_all_hooks()
        pipe._all_hooks.clear()

    return undo


def sequential_offload(pipe: Any) -> Undo:
    """What `enable_sequential_cpu_offload` puts on, with the CPU in the part of the GPU."""
    for module in modules(pipe):
        cpu_offload(module, execution_device=torch.device("cpu"))
    return lambda: [remove_hook_from_module(module, recurse=True) for module in modules(pipe)].clear()


def group_offload(kind: str) -> Callable[[Any], Undo]:
    def put_on(pipe: Any) -> Undo:
        cpu = torch.device("cpu")
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        for network in networks(pipe).values():
            apply_group_offloading(network, onload_device=cpu, offload_device=cpu, offload_type=kind, **more)
        return lambda: _remove_diffusers_hooks(pipe)

    return put_on


def layerwise_casting(pipe: Any) -> Undo:
    for network in networks(pipe).values():
        apply_layerwise_casting(network, storage_dtype=torch.float32, compute_dtype=torch.float32)
    return lambda: None  # it cannot be taken off


def _remove_diffusers_hooks(pipe: Any) -> None:
    for network in networks(pipe).values():
        for module in network.modules():
            registry = module.__dict__.get("_diffusers_hook")
            for name in list(registry.hooks) if registry else ():
                registry.remove_hook(name, recurse=False)


NEIGHBOURS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "group leaf": group_offload("leaf_level"),
    "group block": group_offload("block_level"),
    "casting": layerwise_casting,
}


def load_lora(pipe: Any) -> None:
    """An adapter of random weights on attention and MLPs of every network, the same every time."""
    torch.manual_seed(0)
    for network in networks(pipe).values():
        targets = ["to_q", "to_v", "net.2", "proj_mlp"]
        config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        network.add_adapter(config, adapter_name="style")


def unload_lora(pipe: Any) -> None:
    for network in networks(pipe).values():
        network.unload_lora()
