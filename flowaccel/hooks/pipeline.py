"""Type of the pipelines that are accelerated."""

from __future__ import annotations

from typing import Any, Protocol

import torch


class Pipeline(Protocol):
    """Any diffusers pipeline. Which attributes it has besides these depends on its class, as in `DiffusionPipeline`."""

    @property
    def components(self) -> dict[str, Any]:
        """Networks, scheduler, tokenizers and so on, by name."""

    @property
    def device(self) -> torch.device:
        """Device of the networks."""

    def __getattr__(self, name: str) -> Any:
        """Return a component, or another attribute of its class."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a component."""
