"""Checkpoints in the layout of the official Attention-Mediators repository (arXiv 2408.05710): SiT's, with the biases
`an_bias`, `ah_bias`, `aw_bias`, `na_bias`, `ha_bias`, `wa_bias` and the convolution `dwc` in every attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowaccel.errors import CheckpointError
from flowaccel.models.official import infer_sit_config, load_official_state, sit_from_official, sit_to_official

_THEIRS = re.compile(r"blocks\.(\d+)\.attn\.(dwc\.weight|dwc\.bias|[anhw]{2}_bias)")
_OURS = re.compile(
    r"transformer_blocks\.(\d+)\.attn\.(?:mediator_biases\.\d+\.)?(dwc\.weight|dwc\.bias|[anhw]{2}_bias)"
)


def read_mediators(
    source: str | Path | Mapping[str, Any], which: str | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Constructor arguments of `MediatorSiTTransformer2DModel`, and its weights.

    Raises:
        CheckpointError: unreadable, another layout, or without mediators.
    """
    state = load_official_state(source, which)
    extra = {key: match for key in state if (match := _THEIRS.fullmatch(key))}
    tables = {key: match for key, match in extra.items() if match[2] == "an_bias"}
    if not tables:
        raise CheckpointError(
            "the checkpoint has no mediators (blocks.I.attn.an_bias): it is a softmax network; load it with "
            "SiTTransformer2DModel.from_official"
        )
    config = infer_sit_config({key: value for key, value in state.items() if key not in extra}, overrides)
    counts = {state[key].shape[1] for key in tables}
    if len(counts) > 1:
        raise CheckpointError(f"blocks have different numbers of mediators, {sorted(counts)}: not the official layout")
    count = counts.pop()
    blocks = tuple(sorted(int(match[1]) for match in tables.values()))
    layers = None if blocks == tuple(range(config["num_layers"])) else blocks
    converted = sit_from_official({key: value for key, value in state.items() if key not in extra})
    for key, match in extra.items():
        place = match[2] if match[2].startswith("dwc") else f"mediator_biases.{count}.{match[2]}"
        converted[f"transformer_blocks.{match[1]}.attn.{place}"] = state[key]
    return {**config, "mediator_config": {"counts": (count,), "layers": layers}}, converted


def write_mediators(network: Any) -> dict[str, Tensor]:
    """The weights of a `MediatorSiTTransformer2DModel` under the official names.

    Raises:
        ValueError: what the layout cannot express.
    """
    settings = network.config.mediator_config
    if settings is None or len(settings["counts"]) != 1 or not (settings["use_bias"] and settings["use_dwc"]):
        raise ValueError(
            f"the official layout holds one number of mediators, biases and the convolution, got {settings}"
        )
    stock: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        if match := _OURS.fullmatch(key):
            extra[f"blocks.{match[1]}.attn.{match[2]}"] = value
        else:
            stock[key] = value
    return sit_to_official(stock) | extra
