"""Compatibility of accelerators: a table of rules with their reasons, and the function that applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from flowaccel.errors import RecipeConflictError

if TYPE_CHECKING:
    from flowaccel.recipe.accelerator import Accelerator


class Tag(StrEnum):
    """What the rules know accelerators by."""

    ANY = "any accelerator"
    SCHEDULER = "scheduler"
    VARIANT = "variant"
    HOOK = "hook"
    SAMPLER = "sampler"
    REFINER = "refiner"
    GUIDANCE = "guidance"
    CACHE = "cache"
    DECIDES_FOR_MANY = "cache not deciding per image"
    TIMES_PER_IMAGE = "times per image"
    LOOP_TIME = "follows the loop's time"
    R_STEPS = "sampler with R steps"
    NO_R_STEPS = "sampler without R steps"


_ROLES = (Tag.SAMPLER, Tag.REFINER, Tag.GUIDANCE)
"""Tags that say no more than the name of the accelerator does."""


@dataclass(frozen=True)
class Rule:
    """One rule about accelerators, which it knows by their tags: a `Tag`, or the name of one of them.

    Args:
        kind: `excludes`: never both. `before`: where both are, `first` comes first. `requires_before`: an accelerator
            with the tag `first` comes after one with the tag `second`. `at_most_one`: one accelerator with the tag
            `first`; `ANY`: one of each name.
        first: a tag.
        second: a tag; not for `at_most_one`.
        reason: why, and what to do; ends the error message.
    """

    kind: Literal["excludes", "before", "requires_before", "at_most_one"]
    first: str
    second: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """Return the rule in words, without its reason."""
        if self.kind == "at_most_one":
            return f"at most one {'of each accelerator' if self.first == Tag.ANY else self.first}"
        words = {"excludes": "excludes", "before": "comes before", "requires_before": "needs before it"}
        return f"{self.first} {words[self.kind]} {self.second}"


RULES = (
    Rule("at_most_one", Tag.ANY, reason="one of a kind works at a time"),
    Rule("at_most_one", Tag.SCHEDULER, reason="a pipeline has one scheduler"),
    Rule("at_most_one", Tag.VARIANT, reason="a pipeline has one network"),
    Rule("before", Tag.VARIANT, Tag.HOOK, "a variant is another network; a hook put on before it stays on the old one"),
    Rule("before", Tag.SAMPLER, Tag.REFINER, "the refiner works on the R steps that the sampler makes"),
    Rule("at_most_one", Tag.CACHE, reason="two caches would forecast from each other's forecasts; choose one"),
    Rule(
        "excludes",
        Tag.CACHE,
        Tag.REFINER,
        "a cache would reuse what the refiner corrects, and the refiner's steps are cheap already",
    ),
    Rule(
        "before",
        Tag.CACHE,
        Tag.GUIDANCE,
        "guidance_skip hands the cache the rows that are still needed, so it stands around it",
    ),
    Rule("before", Tag.REFINER, Tag.GUIDANCE, "a refiner after it would go on guiding its offsets"),
    Rule(
        "excludes",
        Tag.DECIDES_FOR_MANY,
        Tag.GUIDANCE,
        "guidance ends image by image, and then the rows of a batch change; let the cache decide per image",
    ),
    Rule(
        "excludes",
        Tag.TIMES_PER_IMAGE,
        Tag.LOOP_TIME,
        "the loop's time is not that of the images; use the policy without its step and count heads, "
        "LearnedPolicy(levels=('cache',)), or guidance_skip with mode='hold' and space='v'",
    ),
    Rule(
        "excludes",
        Tag.NO_R_STEPS,
        Tag.REFINER,
        "the refiner works on the R steps of FlowTurbo; put Sampler('flowturbo', {'blocks': 'H2P4R2'}) before it",
    ),
)


def check(accelerators: Sequence[Accelerator], name: str, rules: Sequence[Rule] = RULES) -> None:
    """Apply the rules to accelerators in the order in which they are attached.

    Args:
        accelerators: the accelerators.
        name: name of the recipe in errors.
        rules: the rules.

    Raises:
        RecipeConflictError: a rule is broken; the message names both accelerators and the reason.
    """
    for rule in rules:
        conflict = _conflict(rule, accelerators)
        if conflict:
            raise RecipeConflictError(f"recipe {name!r}: {conflict}: {rule.reason}")


def _conflict(rule: Rule, accelerators: Sequence[Accelerator]) -> str | None:
    """Return the violation of the rule in words, or None."""
    if rule.kind == "at_most_one":
        return _repeated(rule.first, accelerators)
    first, second = _places(rule.first, accelerators), _places(rule.second, accelerators)
    if rule.kind == "requires_before":
        lonely = next((place for place in first if not any(other < place for other in second)), None)
        return None if lonely is None else f"{_who(accelerators[lonely], rule.first)} needs {rule.second!r} before it"
    if not first or not second:
        return None
    if rule.kind == "excludes":
        return f"{_who(accelerators[first[0]], rule.first)} excludes {_who(accelerators[second[0]], rule.second)}"
    last, earliest = accelerators[max(first)], accelerators[min(second)]
    if max(first) > min(second):
        return f"{_who(last, rule.first)} must come before {_who(earliest, rule.second)}"
    return None


def _who(accelerator: Accelerator, tag: str) -> str:
    return repr(accelerator.name) + ("" if tag in (*_ROLES, accelerator.name) else f" ({tag})")


def _places(tag: str, accelerators: Sequence[Accelerator]) -> list[int]:
    return [place for place, accelerator in enumerate(accelerators) if tag in accelerator.tags]


def _repeated(tag: str, accelerators: Sequence[Accelerator]) -> str | None:
    names = [accelerator.name for accelerator in accelerators if tag == Tag.ANY or tag in accelerator.tags]
    if tag != Tag.ANY:
        return f"it holds {' and '.join(map(repr, names))}" if len(names) > 1 else None
    twice = next((name for name in names if names.count(name) > 1), None)
    return f"it holds {twice!r} twice" if twice else None
