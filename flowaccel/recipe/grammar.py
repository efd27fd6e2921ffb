"""Text form of recipes: `NAME:option=value,flag@STEPS`, joined by `+`. Everything that reads names uses it.

```
recipe  = part { "+" part }
part    = name [ ":" options ] [ "@" steps ]    a preset; or a file, a folder, zoo:NAME, or a Hub id (OWNER/NAME)
options = option { "," option }
option  = key "=" value | key                   a value is JSON, or else text; a key alone is true
```
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

# not the + of an exponent, as in threshold=1e+9
_JOIN = re.compile(r"\s*\+\s*(?=[A-Za-z_./~])")
_STEPS = re.compile(r"0*[1-9][0-9]*")


@dataclass(frozen=True)
class Term:
    """One preset in the text of a recipe, with its options and steps."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None


def split_joined(text: str) -> list[str]:
    """Return the parts of a recipe that are joined by `+`."""
    return _JOIN.split(text)


def parse_term(text: str) -> Term:
    """Return name, options and steps of one part.

    Raises:
        ValueError: the steps are no number, or the options are no options.
    """
    stem, at, steps = text.rpartition("@") if "@" in text else (text, "", "")
    if at and not _STEPS.fullmatch(steps):
        raise ValueError(f"the part after @ must be a number of steps, at least 1, got {text!r}")
    name, _, options = stem.partition(":")
    return Term(name, parse_options(name, options), int(steps) if at else None)


def parse_options(name: str, text: str) -> dict[str, Any]:
    """Return the options after a name: `threshold=0.1,parity` is `{"threshold": 0.1, "parity": True}`.

    Raises:
        ValueError: something else, or an option that is given twice.
    """
    options: dict[str, Any] = {}
    for part in separate(text) if text else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key.isidentifier():
            raise ValueError(f"options of {name!r} look like threshold=0.1,max_run=3,parity, got {text!r}")
        if key in options:
            raise ValueError(f"the option {key!r} of {name!r} is given twice")
        options[key] = parse_value(value) if equals else True
    return options


def separate(text: str) -> list[str]:
    """Split the text at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_value(text: str) -> Any:
    """Return the value of a text: JSON or a number, or else the text itself."""
    for read in (json.loads, float):  # JSON does not allow .3
        try:
            return read(text)
        except ValueError:
            continue
    return text
