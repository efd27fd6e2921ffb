"""Checkpoints in the layout of the official DyDiT repository (arXiv 2410.03456): DiT with three routers per block.

| router | official name | outputs |
|---|---|---|
| heads | `blocks.I.attn_rate.router` | heads - 1: head 0 is always on |
| hidden channels | `blocks.I.mlp_rate.router` | heads - 1: group 0 is always on |
| tokens | `blocks.I.token_selection.mlp_head.0`, `.2` | 1 |

Groups are contiguous there: gate g switches the g-th of `heads` equal parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowaccel.errors import CheckpointError
from flowaccel.methods.dynamic_width.importance import reordered
from flowaccel.models.official import (
    every_channel,
    infer_sit_config,
    load_official_state,
    sit_from_official,
    sit_to_official,
)

_ROUTERS = {
    "attn_rate.router": "attn_gate.router",
    "mlp_rate.router": "ff_gate.router",
    "token_selection.mlp_head.0": "tokens.0",
    "token_selection.mlp_head.2": "tokens.2",
}
_NOT_STORED = ("group_of", "correction", "time_mean", "time_std")
"""Entries without a name in the layout: the arrangement of units, which is fixed there, and a term of our training."""


def read_dydit(
    source: str | Path | Mapping[str, Any], which: str | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read constructor arguments and weights of a `DynamicSiTTransformer2DModel`, without the assignment of units.

    Args:
        source, which: as in `load_official_state`.
        overrides: constructor arguments; `dynamic_config` is added to what the weights tell.

    Raises:
        CheckpointError: unreadable, another layout, without routers, or with those of the first release.
    """
    state = load_official_state(source, which)
    stock = {key: value for key, value in state.items() if _router_of(key) is None}
    routers = {key: value for key, value in state.items() if key not in stock}
    config = every_channel(infer_sit_config(stock, overrides), overrides)
    _check_routers(routers, config["num_attention_heads"])
    found = {"tokens": any("token_selection." in key for key in routers)}
    config["dynamic_config"] = found | dict(overrides.get("dynamic_config") or {})
    return config, dydit_from_official(state)


def _check_routers(routers: Mapping[str, Tensor], heads: int) -> None:
    sizes = {len(value) for key, value in routers.items() if "attn_rate." in key and value.dim()}
    if not sizes:
        raise CheckpointError(
            "the checkpoint has no routers (blocks.I.attn_rate.router): it is a static network; load it with "
            "SiTTransformer2DModel.from_official and convert it with make_dynamic "
            "(flowaccel.methods.dynamic_width.networks)"
        )
    if heads in sizes:
        raise CheckpointError(
            f"the checkpoint has DyDiT's router layout of December 2024: {heads} outputs for {heads} heads. There "
            "every head and every group of channels may be off; since March 2025, and here, the first one is always "
            f"on and routers have {heads - 1} outputs. A gate that may be off for all cannot be converted into one "
            "that never is; use a checkpoint of the 2025 layout"
        )


def _router_of(key: str) -> tuple[str, str, str] | None:
    """Split a key into block, official router name and `weight` or `bias`; None if it is not a router's."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key)
    return (match[1], match[2], match[3]) if match and match[2] in _ROUTERS else None


def dydit_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert official DyDiT keys to `DynamicSiTTransformer2DModel` keys.

    Raises:
        CheckpointError: a key that the layout does not have.
    """
    stock: dict[str, Tensor] = {}
    routers: dict[str, Tensor] = {}
    for key, value in state.items():
        parts = _router_of(key)
        if parts is None:
            stock[key] = value
        else:
            routers[f"dynamic.blocks.{parts[0]}.{_ROUTERS[parts[1]]}.{parts[2]}"] = value
    return sit_from_official(stock) | routers


def dydit_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the keys of a `DynamicSiTTransformer2DModel` with contiguous groups to official keys.

    Raises:
        ValueError: a weight that the layout has no name for, such as an adapter's.
    """
    names = {ours: theirs for theirs, ours in _ROUTERS.items()}
    stock: dict[str, Tensor] = {}
    routers: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"dynamic\.blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if match and match[2] in names:
            routers[f"blocks.{match[1]}.{names[match[2]]}.{match[3]}"] = value
        elif not (key.startswith("dynamic.") and key.rpartition(".")[2] in _NOT_STORED):
            stock[key] = value
    return sit_to_official(stock) | routers


def write_dydit(network: Any) -> dict[str, Tensor]:
    """Return the weights of a `DynamicSiTTransformer2DModel` under the official names, units contiguous by gate.

    `network` is not changed.

    Raises:
        ValueError: routers that the layout cannot express, or a weight that it has no name for.
    """
    settings = network.dynamic.settings
    if settings.normalise:
        raise ValueError("normalise=True has no place in the official layout: its routers read the plain embedding")
    heads = network.config.num_attention_heads
    if settings.groups not in (None, heads):
        raise ValueError(f"groups={settings.groups}: the official layout has as many groups as heads, {heads}")
    return dydit_to_official(network.state_dict() | reordered(network))


def arrangement(network: Any) -> dict[str, Tensor]:
    """Return the entries that the layout does not store, as a fresh network has them."""
    return {key: value for key, value in network.state_dict().items() if key.rpartition(".")[2] in _NOT_STORED}
