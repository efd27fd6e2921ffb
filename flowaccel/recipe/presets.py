"""Table of the preset names; `flowaccel.recipe.resolve` makes recipes of them."""

from __future__ import annotations

import re

from flowaccel.errors import did_you_mean
from flowaccel.recipe import registry

NONE = "none"
PRESETS: dict[str, str] = {
    NONE: "Nothing: the pipeline as it is.",
    **{name: preset.summary for name, preset in registry.entries("presets").items()},
}
"""Descriptions of the presets, by name.

`@N` after a name requests N steps; samplers, caches and guidance take options, as in `fbcache:threshold=0.1`.
"""


def find_preset(name: str, text: str) -> tuple[registry.Preset, dict[str, str]]:
    """Return a preset, and the arguments that its name states if the name is a pattern (`flowturbo-H2P4R2`).

    Args:
        name: the name.
        text: the text that contains it, for the message.

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
