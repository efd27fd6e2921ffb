"""String arguments of accelerators: names of their parts, and the options of the parts as keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any


def chosen_part(kind: str, value: Any, registry: Mapping[str, type], base: type | None = None) -> Any:
    """Return a part: the object itself, or for a name the part with default options.

    Args:
        kind: name of the part in errors.
        value: the object or its name.
        registry: name -> class.
        base: base class of objects, if custom classes are allowed; None for the classes in the registry.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor such an object.
    """
    if isinstance(value, str):
        if value not in registry:
            raise ValueError(f"{kind} must be one of {', '.join(registry)}, got {value!r}")
        return registry[value]()
    if not isinstance(value, tuple(registry.values()) if base is None else base):
        raise TypeError(f"{kind} must be one of {', '.join(registry)} or such an object, got {value!r}")
    return value


def with_options(chosen: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts by kind, with every option set on the part that has it.

    Raises:
        ValueError: a part refuses a value.
        TypeError: an option that no part has.
    """
    owned: dict[str, dict[str, Any]] = {part: {} for part in chosen}
    for key, value in options.items():
        owner = next((part for part, object_ in chosen.items() if key in {f.name for f in fields(object_)}), None)
        if owner is None:
            listed = "; ".join(
                f"{part} {object_.name!r}: {', '.join(f.name for f in fields(object_)) or 'none'}"
                for part, object_ in chosen.items()
            )
            raise TypeError(f"no chosen part has the option {key!r}; they have {listed}")
        owned[owner][key] = value
    return {part: replace(object_, **owned[part]) if owned[part] else object_ for part, object_ in chosen.items()}
