"""Checkpoints in the layout of the official Attention-Mediators repository (arXiv 2408.05710).

The layout is SiT's, with a convolution and six tables in every attention.

| ours, below `mediator_biases.N` | official name | official shape (heads M, mediators n, grid H x W) |
|---|---|---|
| `reading.table`, `asking.table` | `an_bias`, `na_bias` | (M, n, 7, 7) |
| `reading.rows`, `reading.columns` | `ah_bias`, `aw_bias` | (1, M, n, H, 1), (1, M, n, 1, W) |
| `asking.rows`, `asking.columns` | `ha_bias`, `wa_bias` | (1, M, H, 1, n), (1, M, 1, W, n) |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowaccel.errors import CheckpointError
from flowaccel.models.official import infer_sit_config, load_official_state, sit_from_official, sit_to_official

_TABLES = {
    "an_bias": "reading.table",
    "ah_bias": "reading.rows",
    "aw_bias": "reading.columns",
    "na_bias": "asking.table",
    "ha_bias": "asking.rows",
    "wa_bias": "asking.columns",
}
_THEIRS = re.compile(rf"blocks\.(\d+)\.attn\.(dwc\.weight|dwc\.bias|{'|'.join(_TABLES)})")
_OURS = re.compile(r"transformer_blocks\.(\d+)\.attn\.(?:mediator_biases\.\d+\.)?(dwc\.weight|dwc\.bias|\w+\.\w+)")


def _from_official(name: str, table: Tensor) -> Tensor:
    """Reshape an official table, which has five axes, to (M, n, size)."""
    if name in ("ah_bias", "aw_bias"):
        return table.flatten(3).squeeze(0)
    return table.flatten(2, 3).squeeze(0).transpose(1, 2) if name in ("ha_bias", "wa_bias") else table


def _to_official(name: str, table: Tensor) -> Tensor:
    if name.endswith("table"):
        return table
    spread = table.unsqueeze(0) if name.startswith("reading") else table.transpose(1, 2).unsqueeze(0)
    places = {"reading.rows": 4, "reading.columns": 3, "asking.rows": 3, "asking.columns": 2}
    return spread.unsqueeze(places[name])


def read_mediators(
    source: str | Path | Mapping[str, Any], which: str | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read constructor arguments and weights of a `MediatorSiTTransformer2DModel`.

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
        stem = f"transformer_blocks.{match[1]}.attn."
        if match[2] in _TABLES:
            name = f"{stem}mediator_biases.{count}.{_TABLES[match[2]]}"
            converted[name] = _from_official(match[2], state[key])
        else:
            converted[stem + match[2]] = state[key]
    return {**config, "mediator_config": {"counts": (count,), "layers": layers}}, converted


def write_mediators(network: Any) -> dict[str, Tensor]:
    """Return the weights of a `MediatorSiTTransformer2DModel` under the official names.

    Raises:
        ValueError: what the layout cannot express.
    """
    settings = network.config.mediator_config
    if (
        settings is None
        or len(set(settings["counts"] or ())) != 1
        or not (settings["use_bias"] and settings["use_dwc"])
    ):
        raise ValueError(
            f"the official layout holds one number of mediators, biases and the convolution, got {settings}"
        )
    theirs = {ours: name for name, ours in _TABLES.items()}
    stock: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    for key, value in network.state_dict().items():
        match = _OURS.fullmatch(key)
        if match and match[2] in theirs:
            extra[f"blocks.{match[1]}.attn.{theirs[match[2]]}"] = _to_official(match[2], value)
        elif match and match[2].startswith("dwc."):
            extra[f"blocks.{match[1]}.attn.{match[2]}"] = value
        else:
            stock[key] = value
    return sit_to_official(stock) | extra
