"""Small dynamic networks whose gates differ from time to time, their calls, and random LoRAs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, LatteTransformer3DModel
from torch import Tensor, nn

import tiny
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.td_lora import timed_layers

SIZES = {"num_attention_heads": 4, "attention_head_dim": 4, "num_layers": 2}


def sit(seed: int = 0) -> Any:
    return tiny.sit_network(seed, **SIZES)


def sd3(seed: int = 0) -> Any:
    options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return tiny.sd3_pipeline(seed, **SIZES, **options).transformer


def flux(seed: int = 0) -> Any:
    sizes = {**SIZES, "axes_dims_rope": (0, 2, 2), "num_layers": 1, "num_single_layers": 1}
    return tiny.flux_pipeline(seed, **sizes).transformer


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


def sit_call(network: nn.Module, times: Tensor) -> Tensor:
    rows = len(times)
    output: Tensor = network(_noise(rows, 1, 8, 8), times, torch.arange(rows), return_dict=False)[0]
    return output


def sd3_call(network: nn.Module, times: Tensor) -> Tensor:
    rows = len(times)
    arguments = {
        "hidden_states": _noise(rows, 4, 8, 8),
        "encoder_hidden_states": _noise(rows, tiny.TOKENS, tiny.CONTEXT),
        "pooled_projections": _noise(rows, tiny.POOLED),
        "timestep": 1000 * times,
    }
    output: Tensor = network(**arguments, return_dict=False)[0]
    return output


def flux_call(network: nn.Module, times: Tensor) -> Tensor:
    rows = len(times)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    arguments = {
        "hidden_states": _noise(rows, 16, 16),
        "encoder_hidden_states": _noise(rows, tiny.TOKENS, tiny.CONTEXT),
        "pooled_projections": _noise(rows, tiny.POOLED),
        "timestep": times,
        "guidance": torch.full((rows,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(tiny.TOKENS, 3),
    }
    output: Tensor = network(**arguments, return_dict=False)[0]
    return output


def dit(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000}
    network = DiTTransformer2DModel(**SIZES, **sizes).eval()
    tiny.random_weights(network, seed)
    blocks = network.transformer_blocks
    for block in blocks[1:]:  # as in the released checkpoints
        block.norm1.emb.timestep_embedder.load_state_dict(blocks[0].norm1.emb.timestep_embedder.state_dict())
    return network


def dit_call(network: nn.Module, times: Tensor) -> Tensor:
    rows = len(times)
    labels = torch.arange(rows)
    output: Tensor = network(_noise(rows, 4, 8, 8), 1000 * times, class_labels=labels, return_dict=False)[0]
    return output


def latte(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_channels": tiny.CONTEXT}
    options = {"cross_attention_dim": 16, "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate"}
    network = LatteTransformer3DModel(**SIZES, **sizes, **options, video_length=3, attention_bias=True).eval()
    tiny.random_weights(network, seed)
    return network


def latte_call(network: nn.Module, times: Tensor) -> Tensor:
    rows = len(times)
    text = _noise(rows, tiny.TOKENS, tiny.CONTEXT)
    output: Tensor = network(
        _noise(rows, 4, 3, 8, 8), timestep=1000 * times, encoder_hidden_states=text, return_dict=False
    )[0]
    return output


Call = Callable[[nn.Module, Tensor], Tensor]
FAMILIES: dict[str, tuple[Callable[..., Any], Call]] = {
    "sit": (sit, sit_call),
    "sd3": (sd3, sd3_call),
    "flux": (flux, flux_call),
    "dit": (dit, dit_call),
    "latte": (latte, latte_call),
}
"""A stock network, and a call of it at `times` (B,) in (0, 1)."""
WITH_LOADER = ("sit", "sd3", "flux")
"""Those that have diffusers' loader of adapters."""


def random_routers(network: Any, seed: int = 5) -> None:
    """Routers that switch about half of everything, and other units at other times."""
    torch.manual_seed(seed)
    for gated in network.dynamic.gated_layers:
        router = gated.gate.router
        nn.init.normal_(router.weight, std=4.0)
        nn.init.normal_(router.bias, -4.0, 4.0)
    for site in network.dynamic.sites:
        nn.init.zeros_(site.router[2].bias)


def dynamic(base: nn.Module, *, tokens: bool = True, **settings: Any) -> Any:
    """A dynamic network around `base` with `random_routers`."""
    network = make_dynamic(base, DynamicSettings(tokens=tokens, normalise=True, **settings)).eval()
    random_routers(network)
    return network


def random_experts(network: Any, seed: int = 6) -> None:
    """A TD-LoRA that matters, and differs from time to time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in timed_layers(network).values():
            for parameter in layer.experts.parameters():
                parameter.normal_(std=0.3, generator=generator)


def sliced(call: Call, network: Any, times: Tensor) -> Tensor:
    """As it runs when it samples."""
    with torch.no_grad():
        return call(network.eval(), times)


def masked(call: Call, network: Any, times: Tensor) -> Tensor:
    """The same gates as masks on whole layers, as it runs when it is trained."""
    network.train()
    network.dynamic.hard = True
    output = call(network, times).detach()
    network.dynamic.hard = False
    network.dynamic.clear()
    network.eval()
    return output


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())
