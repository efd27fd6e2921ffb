"""Identity of a network or scheduler without its weights: its class and its configuration."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Identity:
    """The class of a network or scheduler, and a short hash of its configuration.

    The hash covers the values that differ from the class's defaults, so that it does not change when diffusers adds an
    argument.
    """

    kind: str
    config: str

    @classmethod
    def of(cls, configured: Any) -> Self:
        """Return the identity of an object with a `config`: a network, compiled or not, or a scheduler."""
        configured = getattr(configured, "_orig_mod", configured)  # what torch.compile wraps
        parameters = inspect.signature(type(configured).__init__).parameters
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        chosen = {
            name: value
            for name, value in _json(dict(configured.config)).items()
            if not name.startswith("_") and (name not in defaults or value != _json(defaults[name]))
        }
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()
        return cls(type(configured).__name__, digest[:12])

    def __str__(self) -> str:
        """Return the class name and the hash, for messages."""
        return f"{self.kind} (configuration {self.config})"


def _json(value: Any) -> Any:
    """Return the value after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(value, default=str))
