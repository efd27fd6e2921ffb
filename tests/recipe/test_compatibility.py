"""Which accelerators go together."""

from __future__ import annotations

from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from flowaccel import (
    Accelerator,
    DynamicWidth,
    LearnedPolicy,
    Mediators,
    MediatorSchedule,
    Recipe,
    RecipeConflictError,
    Sampler,
    VelocityRefiner,
)
from flowaccel.methods.policy.network import AccelerationPolicy
from flowaccel.recipe.compatibility import RULES, Rule, check


@dataclass(frozen=True)
class Blank(Accelerator):
    name: ClassVar[str] = "blank"

    def attach(self, pipe: Any) -> Any:
        return lambda: None


def blank(name: str, kind: str = "hook") -> Accelerator:
    made: Any = make_dataclass(name, [], bases=(Blank,), frozen=True, namespace={"name": name, "kind": kind})
    return made()


A, B, C = blank("a"), blank("b"), blank("c")


@pytest.mark.parametrize(
    ("rule", "allowed", "refused", "message"),
    [
        (Rule("excludes", "a", "b", "why"), [[A], [B, C], [A, C]], [[A, B], [B, C, A]], "'a' excludes 'b': why"),
        (
            Rule("before", "a", "b", "why"),
            [[A], [B], [A, B], [A, C, B]],
            [[B, A], [C, B, A]],
            "'a' must come before 'b': why",
        ),
        (
            Rule("requires_before", "a", "b", "why"),
            [[], [B], [B, A], [B, C, A]],
            [[A], [A, B], [C, A]],
            "'a' needs 'b' before it: why",
        ),
        (Rule("at_most_one", "hook", reason="why"), [[], [A]], [[A, B]], "it holds 'a' and 'b': why"),
        (Rule("excludes", "hook", "c", "why"), [[A, B], []], [[A, C]], r"'a' \(hook\) excludes 'c': why"),
    ],
    ids=lambda value: value.kind if isinstance(value, Rule) else "",
)
def test_kinds(rule: Rule, allowed: list[Any], refused: list[Any], message: str) -> None:
    for accelerators in allowed:
        check(accelerators, "mine", [rule])
    for accelerators in refused:
        with pytest.raises(RecipeConflictError, match=f"recipe 'mine': {message}"):
            check(accelerators, "mine", [rule])


def test_variants_come_before_hooks() -> None:
    wide = blank("wide", "variant")
    Recipe([wide, A])
    Recipe([Sampler("heun"), wide, A])
    with pytest.raises(RecipeConflictError, match=r"'wide' \(variant\) must come before 'a' \(hook\): a variant is"):
        Recipe([A, wide])


def test_one_scheduler() -> None:
    with pytest.raises(RecipeConflictError, match="it holds 'sampler' and 'grid': a pipeline has one scheduler"):
        Recipe([Sampler("heun"), blank("grid", "scheduler")])


def test_refiner_needs_steps_to_refine() -> None:
    for sampler in (Sampler("heun"), Sampler("flowturbo", {"blocks": "H2P2"})):
        with pytest.raises(RecipeConflictError, match=r"'sampler' \(sampler without R steps\) excludes 'velocity_ref"):
            Recipe([sampler, VelocityRefiner()])
    Recipe([VelocityRefiner()])  # the pipeline's own scheduler may have them


def test_networks_that_follow_the_time_do_not_go_with_times_per_image() -> None:
    heads = AccelerationPolicy(4, 8, levels=("cache",), width=4)
    for variant in (DynamicWidth("width"), Mediators("mediators", schedule=MediatorSchedule(fixed=((0.0, 4),)))):
        for timed in (LearnedPolicy(), LearnedPolicy(levels=("step", "cache"))):
            with pytest.raises(RecipeConflictError, match=r"'learned_policy' \(times per image\) excludes"):
                Recipe([variant, timed])
        Recipe([variant, LearnedPolicy(levels=("cache",))])
        Recipe([variant, LearnedPolicy(heads)])
    Recipe([Mediators("mediators"), LearnedPolicy()])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_is_documented_with_its_reason(rule: Rule) -> None:
    docs = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert f"| {rule} | {rule.reason} |" in docs.read_text()
