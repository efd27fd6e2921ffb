"""Settings of dynamic networks and their routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from flowaccel.models.routers import TAU, TOKEN_BIAS, WIDTH_BIAS
from flowaccel.models.settings import settings_from


@dataclass(frozen=True, kw_only=True)
class DynamicSettings:
    """Settings of the dynamic parts and their routers. The defaults are the published ones."""

    tokens: bool = True
    """Whether feed-forwards leave out tokens."""
    groups: int | None = None
    """Groups that the hidden channels of a feed-forward form; None takes as many as there are heads, as published."""
    normalise: bool = False
    """Give routers the timestep embedding less its mean over all times, in units of its spread, and let their weights
    start at 0. Embeddings of different times are often nearly parallel, and then routers that read them as they are
    hardly tell times apart; how fast they learn depends on the embedding's size."""
    bias: float = WIDTH_BIAS
    """Initial logits of heads and channels."""
    token_bias: float = TOKEN_BIAS
    """Initial logits of tokens."""
    tau: float = TAU
    """Temperature of the relaxation."""

    def __post_init__(self) -> None:
        if self.groups is not None and (not isinstance(self.groups, int) or self.groups < 1):
            raise ValueError(f"groups must be at least 1, or None for as many as there are heads, got {self.groups!r}")
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    @property
    def gain(self) -> float:
        """Gain of the routers' initial weights."""
        return 0.0 if self.normalise else 1.0

    @classmethod
    def of(cls, given: Self | dict[str, Any] | None) -> Self:
        """Create the settings from a configuration.

        Raises:
            ValueError: an entry that is not known.
        """
        return settings_from(cls, given, "dynamic_config")
