"""Checkpoints in the layout of the official DiffMoE repository (arXiv 2503.14487): SiT's, with experts in some blocks.

| ours, below `transformer_blocks.I.ff` | official name, below `blocks.I.mlp` |
|---|---|
| `experts.w_in`, `experts.b_in` | `experts.E.fc1.weight`, `.bias`, one per expert |
| `experts.w_out`, `experts.b_out` | `experts.E.fc2.weight`, `.bias` |
| `gate.weight` | `gate_weight` |
| `capacity_predictor.0`, `.2` | the same |
| `thresholds.predictor` | `expert_threshold` |
| `shared.net.0.proj`, `shared.net.2` | `shared_experts.fc1`, `.fc2` |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def read_diffmoe(
    source: str | Path | Mapping[str, Any], which: str | None, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read."""
    raise NotImplementedError


def write_diffmoe(network: Any) -> dict[str, Tensor]:
    """Write."""
    raise NotImplementedError
