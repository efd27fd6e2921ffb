"""Grouping of the rows of a call that are computed with different settings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Setting = TypeVar("Setting", bound=Hashable)


def grouped(settings: Sequence[Setting], device: torch.device | None = None) -> dict[Setting, Tensor]:
    """Return the indices of the rows of each setting, in the order in which settings first occur."""
    found: dict[Setting, list[int]] = {}
    for row, setting in enumerate(settings):
        found.setdefault(setting, []).append(row)
    return {setting: torch.tensor(rows, device=device) for setting, rows in found.items()}


def joined(parts: Sequence[Tensor], groups: Mapping[Setting, Tensor]) -> Tensor:
    """Merge the results of the groups, (rows of the group, ...) each, in the order of all rows."""
    order = torch.cat(list(groups.values())).to(parts[0].device)
    together = torch.cat(list(parts))
    return torch.empty_like(together).index_copy(0, order, together)
