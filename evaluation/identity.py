"""What identifies a network."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module) -> str:
    """What identifies a network: a hash of its class and weights, 16 hex digits."""
    total = hashlib.sha256(type(module).__name__.encode())
    for key, value in sorted(module.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()[:16]
