"""Fingerprints that identify networks."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(module: nn.Module) -> str:
    """Return the fingerprint of a network: a hash of its class and weights, 16 hex digits."""
    total = hashlib.sha256(type(module).__name__.encode())
    for key, value in sorted(module.state_dict().items()):
        total.update(key.encode())
        total.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def check_fingerprint(name: str, found: str, expected: str | None) -> None:
    """Raise a ValueError unless a feature network has the fingerprint that a run says; None accepts any."""
    if expected is not None and found != expected:
        raise ValueError(f"the run used {name} with fingerprint {expected}, here it has {found}; evaluate again")
