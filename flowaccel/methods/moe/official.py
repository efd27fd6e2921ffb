"""Checkpoints in the layout of the official DiffMoE repository (arXiv 2503.14487): SiT's, with experts in some blocks.

| ours, below `transformer_blocks.I.ff` | official name, below `blocks.I.mlp` |
|---|---|
| `experts.w_in`, `experts.b_in` | `experts.E.fc1.weight`, `.bias`, one per expert |
| `experts.w_out`, `experts.b_out` | `experts.E.fc2.weight`, `.bias` |
| `experts.w_in` of gated experts, without biases | `experts.E.up_proj.weight`, then `experts.E.gate_proj.weight` |
| `experts.w_out` of gated experts | `experts.E.down_proj.weight` |
| `gate.weight` | `gate_weight` |
| `capacity_predictor.0`, `.2` | the same |
| `thresholds.predictor` | `expert_threshold` |
| `shared.net.0.proj`, `shared.net.2` | `shared_experts.fc1`, `.fc2` |

`ema_decay`, the momentum of the thresholds, is written and not read. Everything else of the thresholds is ours alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel.errors import CheckpointError
from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.experts import ExpertModules
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.routing import GATE, PREDICTOR
from flowaccel.methods.moe.settings import LAYERS, named_blocks
from flowaccel.methods.moe.thresholds import Thresholds
from flowaccel.models.official import (
    every_channel,
    infer_sit_config,
    load_official_state,
    sit_from_official,
    sit_to_official,
)

_NUMBER = r"(0|[1-9]\d{0,8})"
_FIRST_MLP = "blocks.0.mlp.fc1.weight"
_RENAMES = {
    "gate_weight": "gate.weight",
    "capacity_predictor.0.weight": "capacity_predictor.0.weight",
    "capacity_predictor.0.bias": "capacity_predictor.0.bias",
    "capacity_predictor.2.weight": "capacity_predictor.2.weight",
    "capacity_predictor.2.bias": "capacity_predictor.2.bias",
    "expert_threshold": f"thresholds.{PREDICTOR}",
    "shared_experts.fc1.weight": "shared.net.0.proj.weight",
    "shared_experts.fc1.bias": "shared.net.0.proj.bias",
    "shared_experts.fc2.weight": "shared.net.2.weight",
    "shared_experts.fc2.bias": "shared.net.2.bias",
}
_MOMENTUM = "ema_decay"
# ours -> the parts of one expert that it is made of, one below the other
_PLAIN = {
    "experts.w_in": ("fc1.weight",),
    "experts.b_in": ("fc1.bias",),
    "experts.w_out": ("fc2.weight",),
    "experts.b_out": ("fc2.bias",),
}
_GATED = {"experts.w_in": ("up_proj.weight", "gate_proj.weight"), "experts.w_out": ("down_proj.weight",)}
_NOT_STORED = ("thresholds.updates", f"thresholds.{GATE}", f"thresholds.{GATE}_curve", f"thresholds.{PREDICTOR}_curve")


def read_diffmoe(
    source: str | Path | Mapping[str, Any], which: str | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read constructor arguments and weights of a `MoESiTTransformer2DModel`.

    Thresholds that are all 0 count as never fitted. There are none for the gate's scores, and none for other
    capacities.

    Args:
        source, which: as in `load_official_state`.
        overrides: constructor arguments; `moe_config` is added to what the weights tell.

    Raises:
        CheckpointError: unreadable, another layout, without experts, or with experts that differ from block to block.
        ValueError: settings in `overrides` that are not known or out of range.
    """
    state = load_official_state(source, which)
    layers, stock = _split(state, rf"blocks\.{_NUMBER}\.mlp\.", _of_experts)
    if not layers:
        raise CheckpointError(
            "the checkpoint has no experts (blocks.I.mlp.experts.E): it is a dense network; load it with "
            "SiTTransformer2DModel.from_official and give it experts with flowaccel.methods.moe.networks.upcycle_to_moe"
        )
    read = {block: layer_from_official(layer, f"blocks.{block}.mlp.") for block, layer in sorted(layers.items())}
    hidden = _alike(read)
    dense = next((stock[key] for key in stock if re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", key)), None)
    first = torch.empty(hidden, 1, device="meta") if dense is None else dense
    config = every_channel(infer_sit_config({_FIRST_MLP: first, **stock}, overrides), overrides)
    if max(read) >= config["num_layers"]:
        raise CheckpointError(f"block {max(read)} has experts, and there are {config['num_layers']} blocks")
    found = _settings(next(iter(read.values())), hidden, first.shape[0])
    found["layers"] = _named(tuple(read), config["num_layers"])
    config["moe_config"] = found | dict(overrides.get("moe_config") or {})
    weights = {f"transformer_blocks.{block}.ff.{key}": value for block, layer in read.items()
               for key, value in layer.items()}  # fmt: skip
    return config, sit_from_official(stock) | weights


def write_diffmoe(network: Any) -> dict[str, Tensor]:
    """Return the weights of a `MoESiTTransformer2DModel` under the official names; `network` is not changed.

    Raises:
        ValueError: settings that the layout cannot express, experts that are unpacked, or a weight that it has no name
            for, such as an adapter's.
    """
    momenta: dict[str, Tensor] = {}
    for path, layer in moe_layers(network).items():
        _check_expressible(layer, path)
        name = path.replace("transformer_blocks.", "blocks.").removesuffix("ff") + f"mlp.{_MOMENTUM}"
        momenta[name] = torch.tensor([layer.settings.threshold_momentum])
    return diffmoe_to_official(network.state_dict()) | momenta


def diffmoe_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a `MoESiTTransformer2DModel`, or its gradients, to the official layout.

    Entries without a name in that layout are left out.

    Raises:
        ValueError: a weight that the layout has no name for, such as an adapter's.
    """
    mine = rf"transformer_blocks\.{_NUMBER}\.ff\."
    layers, stock = _split(state, mine, lambda name: not name.startswith("net."))
    converted = sit_to_official(stock)
    for block, layer in layers.items():
        converted |= {f"blocks.{block}.mlp.{key}": value for key, value in layer_to_official(layer).items()}
    return converted


def layer_from_official(layer: Mapping[str, Tensor], where: str = "") -> dict[str, Tensor]:
    """Convert the official state dict of one layer of experts to that of `MoEFeedForward`.

    Args:
        layer: `gate_weight`, `experts.0.fc1.weight` and so on.
        where: prefix of its keys, for messages.

    Raises:
        CheckpointError: a key that the layout does not have, or experts that are missing or differ.
    """
    experts: dict[int, dict[str, Tensor]] = defaultdict(dict)
    converted: dict[str, Tensor] = {}
    for key, value in layer.items():
        match = re.fullmatch(rf"experts\.{_NUMBER}\.(.+)", key)
        if match:
            experts[int(match[1])][match[2]] = value
        elif key in _RENAMES:
            converted[_RENAMES[key]] = value
        elif key != _MOMENTUM:
            raise CheckpointError(f"unexpected key '{where}{key}': not in the official DiffMoE layout")
    converted |= _packed(experts, where)
    threshold = converted.get(f"thresholds.{PREDICTOR}")
    if threshold is not None:
        converted |= _fresh(threshold)
    return converted


def layer_to_official(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert `MoEFeedForward.state_dict()`, or its gradients, to the official layout.

    Entries without a name in that layout are left out.

    Raises:
        ValueError: a weight that the layout has no name for, such as an adapter's.
    """
    names = {ours: theirs for theirs, ours in _RENAMES.items()}
    parts = _PLAIN if "experts.b_in" in layer else _GATED
    converted: dict[str, Tensor] = {}
    for key, value in layer.items():
        if key in names:
            converted[names[key]] = value
        elif key in parts:
            for expert, rows in enumerate(value):
                pieces = zip(parts[key], rows.chunk(len(parts[key])), strict=True)
                converted |= {f"experts.{expert}.{part}": piece for part, piece in pieces}
        elif key not in _NOT_STORED:
            raise ValueError(f"{key!r} has no name in the official layout; merge or unload adapters first")
    return converted


def _split(
    state: Mapping[str, Tensor], block: str, taken: Callable[[str], bool]
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Split a state dict into the entries below `block` whose name is `taken`, by block, and the rest."""
    layers: dict[int, dict[str, Tensor]] = defaultdict(dict)
    rest: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.match(block, key)
        if match and taken(key[match.end() :]):
            layers[int(match[1])][key[match.end() :]] = value
        else:
            rest[key] = value
    return dict(layers), rest


def _of_experts(name: str) -> bool:
    return name in (*_RENAMES, _MOMENTUM) or name.startswith("experts.")


def _packed(experts: Mapping[int, Mapping[str, Tensor]], where: str) -> dict[str, Tensor]:
    """Pack the experts' weights into one tensor of each kind."""
    missing = sorted(set(range(len(experts))) - experts.keys())
    if missing or not experts:
        raise CheckpointError(f"{where}experts: expert {missing[0] if missing else 0} is missing; there are "
                              f"{sorted(experts)[:8]}")  # fmt: skip
    parts = _GATED if "gate_proj.weight" in experts[0] else _PLAIN
    wanted = {part for pieces in parts.values() for part in pieces}
    for expert, weights in sorted(experts.items()):
        if weights.keys() != wanted:
            raise CheckpointError(
                f"{where}experts.{expert} must have {sorted(wanted)}, as the layout has one kind of experts; missing "
                f"are {sorted(wanted - weights.keys())}, unexpected {sorted(weights.keys() - wanted)}"
            )
        _check_shapes(parts, weights, experts[0], f"{where}experts.{expert}.")
    rows = [weights for _, weights in sorted(experts.items())]
    return {
        ours: torch.stack([torch.cat([weights[part] for part in pieces]) for weights in rows])
        for ours, pieces in parts.items()
    }


def _check_shapes(
    parts: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor], first: Mapping[str, Tensor], where: str
) -> None:
    """Raise unless an expert's weights have the shapes of the first expert's.

    Parts that are packed into one tensor must have equal shapes.
    """
    for pieces in parts.values():
        wanted = tuple(first[pieces[0]].shape)
        for part in pieces:
            axes, shape = 2 if part.endswith("weight") else 1, tuple(weights[part].shape)
            if len(shape) != axes or 0 in shape or shape != wanted:
                raise CheckpointError(
                    f"{where}{part} must have {axes} axes that are not empty and the shape of expert 0's {pieces[0]}, "
                    f"{wanted}, got {shape}"
                )


def _fresh(threshold: Tensor) -> dict[str, Tensor]:
    """Return the entries of `Thresholds` that the layout does not store.

    The gate's thresholds were never followed, nor any curve.
    """
    fresh = Thresholds(threshold.numel(), (PREDICTOR, GATE), 0.0).state_dict()
    fresh[GATE].fill_(torch.nan)
    fresh["updates"].fill_(bool(threshold.any()))
    return {f"thresholds.{key}": value for key, value in fresh.items() if key != PREDICTOR}


def _alike(layers: Mapping[int, Mapping[str, Tensor]]) -> int:
    """Return the hidden width of the experts, after checking that all layers have as many and of one kind."""
    kinds = {block: (*layer["experts.w_out"].shape[::2], _is_gated(layer), _shared_width(layer))
             for block, layer in layers.items()}  # fmt: skip
    (first, kind), *_ = kinds.items()
    other = next((block for block in kinds if kinds[block] != kind), None)
    if other is not None:
        said = [f"block {block}: {count} experts of width {hidden}{', gated' if gated else ''}, shared width {shared}"
                for block, (count, hidden, gated, shared) in kinds.items() if block in (first, other)]  # fmt: skip
        raise CheckpointError(f"all blocks with experts must have the same, got {'; '.join(said)}")
    if kind[2] and kind[3]:
        raise CheckpointError("gated experts beside a shared feed-forward that is not gated cannot be converted")
    hidden: int = kind[1]
    return hidden


def _is_gated(layer: Mapping[str, Tensor]) -> bool:
    return "experts.b_in" not in layer


def _shared_width(layer: Mapping[str, Tensor]) -> int | None:
    weight = layer.get("shared.net.0.proj.weight")
    return None if weight is None or not weight.dim() else len(weight)


def _settings(layer: Mapping[str, Tensor], hidden: int, dense: int) -> dict[str, Any]:
    """Infer entries of `MoESettings` from the weights; `dense` is the hidden width of a dense feed-forward."""
    gated = {"activation_fn": "swiglu", "bias": False} if _is_gated(layer) else {}
    return {
        "num_experts": len(layer["experts.w_out"]),
        "inner_dim": None if hidden == dense else hidden,
        "shared_inner_dim": _shared_width(layer),
        **gated,
    }


def _named(blocks: tuple[int, ...], depth: int) -> str | tuple[int, ...]:
    """Return the name of a choice of blocks, or their indices."""
    return next((name for name in LAYERS if named_blocks(name, depth) == blocks), blocks)


def _check_expressible(layer: MoEFeedForward, path: str) -> None:
    settings, shape = layer.settings, layer.shape
    if isinstance(layer.experts, ExpertModules):
        raise ValueError(
            f"the experts of {path} are unpacked; call flowaccel.methods.moe.control.pack_experts(network) first"
        )
    said = {
        f"router={settings.router!r}": settings.router != "diffmoe",
        f"inference_selection={layer.selection!r}": layer.selection == "gate_threshold",
        f"score_fn={settings.score_fn!r}": settings.scores != "softmax",
        f"routed_scale={settings.routed_scale}": settings.routed_scale != 1,
        f"activation_fn={shape.activation_fn!r} with bias={shape.bias}": (shape.activation_fn, shape.bias)
        not in (("gelu-approximate", True), ("swiglu", False)),
        f"shared_inner_dim={settings.shared_inner_dim} with activation_fn='swiglu'": layer.shared is not None
        and shape.activation_fn == "swiglu",
    }
    wrong = [name for name, is_it in said.items() if is_it]
    if wrong:
        raise ValueError(
            f"{path} has {', '.join(wrong)}, which has no place in the official layout: there the router is 'diffmoe' "
            "with softmax scores and thresholds of the predictor's, and experts are 'gelu-approximate' with biases or "
            "'swiglu' without, the latter with no shared one"
        )
