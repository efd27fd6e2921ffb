"""The preset names, as a table; `flowaccel.recipe.resolve` makes recipes of them."""

from __future__ import annotations

import re

from flowaccel.errors import did_you_mean
from flowaccel.recipe import registry

NONE = "none"
PRESETS: dict[str, str] = {
    NONE: "Nothing: the pipeline as it is.",
    **{name: preset.summary for name, preset in registry.entries("presets").items()},
}
"""Preset names and what they are. `@N` after a name asks for N steps; samplers, caches and guidance take options, as in
`fbcache:threshold=0.1`."""


def find_preset(name: str, text: str) -> tuple[registry.Preset, dict[str, str]]:
    """Return a preset, and what its name says where that is one of many (`flowturbo-H2P4R2`).

    Args:
        name: the name.
        text: where it stands, for the message.

    Raises:
        ValueError: unknown name; the message names the nearest ones.
    """
    known: dict[str, registry.Preset] = registry.entries("presets")
    if name in known and known[name].pattern is None:
        return known[name], {}
    for preset in known.values():
        match = None if preset.pattern is None else re.fullmatch(preset.pattern, name)
        if match:
            return preset, {key: value for key, value in match.groupdict().items() if value is not None}
    raise ValueError(
        f"unknown recipe {text!r}: {did_you_mean(name, PRESETS, most=2, cutoff=0.4)}presets are {', '.join(PRESETS)}; "
        "or give a recipe file or folder, zoo:NAME, or a Hub id (OWNER/NAME)"
    )
