"""The promises of the feature caches: every family through its real pipeline, with every published cache."""

from __future__ import annotations

import functools
import inspect
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_layerwise_casting
from safetensors.torch import load_file
from torch import Tensor, nn

import families
import tiny
from families import EVALUATIONS, Case, assert_close, made, split_guidance
from flowaccel import FeatureCache, RecipeConflictError, UnsupportedModelError, accelerate, accelerated, report, restore
from flowaccel.caching.feature_cache import cache_preset
from flowaccel.caching.gates import (
    Codebook,
    Easy,
    FirstBlock,
    Gate,
    Interval,
    Magnitude,
    Mask,
    ModulatedInput,
    ThirdDifference,
)
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import Hold, Newton
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.caching.scopes import Module, Output, Range, Scope, Stack
from flowaccel.hooks import ATTENTION, FAMILIES, FEED_FORWARD, Block, Call, networks, session_of, tensors_of
from neighbours import NEIGHBOURS, load_lora, unload_lora
from tiers import Process

SHORT = 7
"""Evaluations that are enough for the caches which never wait long to save something."""
# Thresholds at which ten steps of these random networks are neither all computed nor, past the warm-up, all reused.
SAVING: dict[str, dict[str, Any]] = {
    "fbcache": {"threshold": 0.3, "max_run": 3},
    "dbcache": {"threshold": 0.3, "max_run": 3, "warmup": 2, "blocks": 2},
    "teacache": {},
    "magcache": {},
    "easycache": {"threshold": 0.2, "warmup": 2},
    "taylorseer": {},
    "adacache": {"codebook": ((0.5, 3), (1.0, 2), (2.0, 1))},
    "ab_cache": {},
    "adaptive_diffusion": {"threshold": 0.1},
    "mask": {},
}
THRESHOLDS = {
    ("fbcache", "sd3"): 0.6,
    ("fbcache", "auraflow"): 0.6,
    ("fbcache", "pixart"): 0.1,
    ("fbcache", "wan21"): 0.1,
    ("fbcache", "wan22"): 0.1,
    ("fbcache", "cogview4"): 0.1,
    ("dbcache", "sd3"): 0.6,
    ("dbcache", "auraflow"): 0.6,
    ("dbcache", "pixart"): 0.1,
    ("dbcache", "wan21"): 0.1,
    ("dbcache", "wan22"): 0.1,
    ("easycache", "sit"): 0.05,
    **{(name, family): 0.7 for name in ("fbcache", "dbcache") for family in ("flux2", "qwen_image")},
    **{(name, "z_image"): 1.5 for name in ("fbcache", "dbcache", "easycache", "teacache")},
}
CODEBOOKS = {"z_image": ((0.75, 3), (1.5, 2), (3.0, 1))}

CASES = {name: case for name, case in families.CASES.items() if case.family != "unet"}
"""All families but UNets, which some caches refuse: see tests/caching/scopes/test_unet_scope.py."""
BATCHED = [case for case in CASES.values() if len(case.branches[0]) == 2]
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EVERY = pytest.mark.parametrize("name", CACHE_PRESETS)
SQUARE = pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for i, case in enumerate(CASES.values())
        for j, name in enumerate(CACHE_PRESETS)
        if (i + j) % 3 == 0
    ],
)
"""Each family with a third of the caches, and each cache with a third of the families."""
FEW = pytest.mark.parametrize("case", [CASES[name] for name in ("sd3", "flux", "wan22")], ids=["sd3", "flux", "wan22"])


def cache(case: Case, name: str, **options: Any) -> FeatureCache:
    """A published cache that saves something in a run of `EVALUATIONS`."""
    own: dict[str, Any] = {}
    if (name, case.name) in THRESHOLDS:
        own = {"threshold": THRESHOLDS[name, case.name]}
    if name == "adacache" and case.name in CODEBOOKS:
        own = {"codebook": CODEBOOKS[case.name]}
    return cache_preset(name, **{**SAVING.get(name, {}), **own, **options})


Decisions = list[tuple[str, tuple[str, ...], tuple[bool, ...]]]


def decisions(pipe: Any) -> Decisions:
    """Of every network call of the last run: per image, whether it was computed."""
    return [(call.network, call.branches, call.computed) for call in report(pipe).calls]


def of_image(taken: Decisions, image: int) -> Decisions:
    return [(network, branches, (computed[image],)) for network, branches, computed in taken]


def saved(taken: Decisions) -> int:
    return sum(not image for _, _, computed in taken for image in computed)


@functools.cache
def untouched(name: str, batch: int = 2, evaluations: int = EVALUATIONS, seed: int = 0) -> Tensor:
    return made(CASES[name], CASES[name].make(seed), batch=batch, evaluations=evaluations)


@functools.cache
def fresh(name: str, preset: str, batch: int = 2, evaluations: int = EVALUATIONS) -> tuple[Tensor, Decisions]:
    """What a cache makes on a pipeline that never ran before."""
    case = CASES[name]
    pipe = case.make()
    accelerate(pipe, cache(case, preset))
    return made(case, pipe, batch=batch, evaluations=evaluations), decisions(pipe)


@pytest.mark.slow
@ALL
@EVERY
def test_the_caches_of_this_file_save_something_and_change_something(case: Case, name: str) -> None:
    images, taken = fresh(case.name, name)
    assert saved(taken) > 0
    assert not torch.equal(images, untouched(case.name))
    assert torch.isfinite(images).all()


# -- 1: what never skips changes no bit

NEVER: dict[str, Gate] = {
    "interval": Interval(1),
    "interval with phase": Interval(1, phase=1),
    "mask": Mask((1,) * 5),
    "first_block": FirstBlock(0),
    "two blocks": FirstBlock(0, blocks=2),
    "modulated_input": ModulatedInput(0),
    "magnitude": Magnitude(0),
    "magnitude with ratios": Magnitude(0, (1.0, 0.9)),
    "easy": Easy(0),
    "codebook": Codebook(((1.0, 1),)),
    "third_difference": ThirdDifference(0),
    "third_difference vector": ThirdDifference(0, "vector"),
}
ANYWHERE: dict[str, Scope] = {
    "output": Output(),
    "residual": Output(residual=True),
    "stack": Stack(),
    "range": Range(1, 1),
    "module": Module(),
}


def fitting() -> Iterator[Any]:
    """Every gate with every scope that it goes with."""
    for (label, gate), (place, scope) in itertools.product(NEVER.items(), ANYWHERE.items()):
        try:
            yield pytest.param(FeatureCache(gate, scope, Newton(2), Guard(warmup=1, last=0)), id=f"{label}-{place}")
        except ValueError as error:
            assert "scope" in str(error)


@ALL
@pytest.mark.parametrize("never", fitting())
def test_never_skipping_is_bit_exact(case: Case, never: FeatureCache) -> None:
    pipe = case.make()
    accelerate(pipe, never)
    assert torch.equal(made(case, pipe, 5, batch=2), untouched(case.name, evaluations=5))
    assert saved(decisions(pipe)) == 0
    assert {call.what for call in report(pipe).calls} == {"computed"}


@ALL
def test_never_skipping_is_bit_exact_for_rows_and_batches_too(case: Case) -> None:
    pipe = case.make()
    for unit in ("row", "batch"):
        for gate in (FirstBlock(0), Easy(0), Interval(1)):
            with accelerated(pipe, FeatureCache(gate, decide=unit)):
                assert torch.equal(made(case, pipe, 5, batch=2), untouched(case.name, evaluations=5))


# -- 2: the branches of guidance do not see each other


class Added:
    """What was added to the image tokens between the first block and the last, per branch and step: looked at from
    outside of the cache."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int], Tensor] = {}
        self._entry: Tensor | None = None

    def watch(self, pipe: Any) -> None:
        session_of(pipe).on_block(self._intercept)

    def _intercept(self, call_next: Callable[..., Any], call: Call, block: Block) -> Any:
        if block.index == 0:
            self._entry = block.hidden
        output = call_next()
        if block.index == block.count - 1:
            assert self._entry is not None
            tokens = self._entry.shape[1]
            added = block.unpack(output)[0][:, -tokens:] - self._entry
            for branch in call.branches:
                self.found[call.network, branch, call.step] = added[call.rows_of(branch)]
        return output


class Outputs(Added):
    """The outputs of the network instead."""

    def watch(self, pipe: Any) -> None:
        session_of(pipe).on_call(self._intercept_call)

    def _intercept_call(self, call_next: Callable[..., Any], call: Call) -> Any:
        output = call_next()
        for branch in call.branches:
            self.found[call.network, branch, call.step] = tensors_of(output)[0][call.rows_of(branch)]
        return output


class Modules(Added):
    """The first tensor of every module instead, one after the other."""

    def watch(self, pipe: Any) -> None:
        session_of(pipe).on_module(self._intercept_module, ATTENTION + FEED_FORWARD)

    def _intercept_module(self, call_next: Callable[..., Any], call: Call, path: str) -> Any:
        output = call_next()
        tensor = output[0] if isinstance(output, tuple) else output
        for branch in call.branches:
            key = (call.network, branch, call.step)
            value = tensor[call.rows_of(branch)].flatten(1)
            self.found[key] = torch.cat([self.found[key], value], dim=1) if key in self.found else value
        return output


@ALL
@pytest.mark.parametrize(
    ("scope", "witness"),
    [(Output(), Outputs), (Stack(), Added), (Module(), Modules)],
    ids=["output", "stack", "module"],
)
def test_each_branch_gets_its_own_features_again(case: Case, scope: Scope, witness: type[Added]) -> None:
    pipe, seen = case.make(), witness()
    accelerate(pipe, FeatureCache(Interval(3), scope, Hold(), Guard(warmup=1, last=0)))
    seen.watch(pipe)
    made(case, pipe, batch=2)
    assert saved(decisions(pipe)) > 0
    assert {branch for _, branch, _ in seen.found} == {"cond", "uncond"}
    last: dict[tuple[str, str], Tensor] = {}
    computed = {(call.network, call.step): all(call.computed) for call in report(pipe).calls}
    reused = 0
    for (network, branch, step), found in seen.found.items():
        if computed[network, step]:
            last[network, branch] = found
            continue
        other = last[network, "uncond" if branch == "cond" else "cond"]
        own = last[network, branch]
        assert not torch.equal(own, other)
        tell = float((own - other).abs().max())
        assert float((found - own).abs().max()) < 1e-3 * tell, "the branch's own features come again"
        assert float((found[0] - found[1]).abs().max()) > 1e-3 * tell, "and each image's own"
        reused += 1
    assert reused >= 2 * (EVALUATIONS // 3)


# -- 3, 4: nothing of a run is left to the next


def failing_at(step: int) -> Callable[..., Any]:
    def interceptor(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == step and "uncond" in call.branches:
            raise RuntimeError("on purpose")
        return call_next()

    return interceptor


@ALL
@EVERY
def test_a_run_after_an_aborted_one_is_as_fresh(case: Case, name: str) -> None:
    pipe = case.make()
    accelerate(pipe, cache(case, name))
    stop = session_of(pipe).on_call(failing_at(6))
    with pytest.raises(RuntimeError, match="on purpose"):
        made(case, pipe, batch=2)
    assert report(pipe).failed and session_of(pipe).run.state == {}
    stop()
    images, taken = fresh(case.name, name)
    assert torch.equal(made(case, pipe, batch=2), images)
    assert decisions(pipe) == taken
    assert session_of(pipe).run.state == {}


@FEW
def test_an_exception_in_a_callback_leaves_nothing_behind(case: Case) -> None:
    def callback(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return values

    pipe = case.make()
    accelerate(pipe, cache(case, "fbcache"))
    with pytest.raises(KeyboardInterrupt):
        pipe(**case.arguments(steps=EVALUATIONS, batch=2), callback_on_step_end=callback)
    assert session_of(pipe).run.state == {}
    images, taken = fresh(case.name, "fbcache")
    assert torch.equal(made(case, pipe, batch=2), images)
    assert decisions(pipe) == taken


@pytest.mark.slow
@SQUARE
def test_another_number_of_steps_or_images_starts_afresh(case: Case, name: str) -> None:
    pipe = case.make()
    accelerate(pipe, cache(case, name))
    for batch, evaluations in ((2, EVALUATIONS), (1, 7), (2, EVALUATIONS)):
        images, taken = fresh(case.name, name, batch, evaluations)
        assert torch.equal(made(case, pipe, evaluations, batch=batch), images)
        assert decisions(pipe) == taken


# -- 5: two pipelines of one class


@ALL
@pytest.mark.parametrize("first_off", [0, 1])
def test_pipelines_are_switched_on_and_off_in_any_order(case: Case, first_off: int) -> None:
    pipes = [case.make(0), case.make(1)]
    plain = [untouched(case.name, evaluations=6, seed=seed) for seed in (0, 1)]
    caches = [cache(case, "taylorseer"), cache(case, "teacache")]
    with accelerated(pipes[1], caches[1]):
        alone = made(case, pipes[1], 6, batch=2)
    accelerate(pipes[0], caches[0])
    assert torch.equal(made(case, pipes[1], 6, batch=2), plain[1])
    accelerate(pipes[1], caches[1])
    both = [fresh(case.name, "taylorseer", 2, 6)[0], alone]
    for pipe, images in zip(pipes, both, strict=True):
        assert torch.equal(made(case, pipe, 6, batch=2), images)
    restore(pipes[first_off])
    assert torch.equal(made(case, pipes[first_off], 6, batch=2), plain[first_off])
    assert torch.equal(made(case, pipes[1 - first_off], 6, batch=2), both[1 - first_off])
    restore(pipes[1 - first_off])
    assert torch.equal(made(case, pipes[1 - first_off], 6, batch=2), plain[1 - first_off])


def test_runs_of_two_pipelines_that_take_turns_do_not_mix() -> None:
    case = CASES["flux"]
    pipes = [case.make(), case.make()]
    for pipe, name in zip(pipes, ("fbcache", "magcache"), strict=True):
        accelerate(pipe, cache(case, name))
    inner = []

    def nested(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 4 and call.branches == ("uncond",):
            inner.append(made(case, pipes[1], batch=2))
        return call_next()

    session_of(pipes[0]).on_call(nested)
    assert torch.equal(made(case, pipes[0], batch=2), fresh("flux", "fbcache")[0])
    assert torch.equal(inner[0], fresh("flux", "magcache")[0])


# -- 6: an image does not depend on what it is batched with


@pytest.mark.slow
@ALL
@EVERY
def test_a_batch_of_two_is_two_runs(case: Case, name: str) -> None:
    together, taken = fresh(case.name, name)
    pipe = case.make()
    accelerate(pipe, cache(case, name))
    alone = []
    for image in (0, 1):
        alone.append(made(case, pipe, seed=3 + image))
        assert decisions(pipe) == of_image(taken, image)
    assert_close(together, torch.cat(alone))


SCOPES: dict[str, Scope] = {
    "output": Output(),
    "residual": Output(True),
    "stack": Stack(),
    "range": Range(1, 1),
    "module": Module(),
}


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("options", [{"guided": False}, {"decide": "row"}], ids=["unguided", "rows decide"])
def test_a_batch_of_two_is_two_runs_without_guidance_and_where_rows_decide(case: Case, options: dict[str, Any]) -> None:
    unit, guided = options.get("decide", "image"), options.get("guided", True)
    pipe, other = case.make(), 0
    for name in ("magcache", "easycache"):
        with accelerated(pipe, cache(case, name, decide=unit)):
            together, taken = made(case, pipe, batch=2, guided=guided), decisions(pipe)
            alone = []
            for image in (0, 1):
                alone.append(made(case, pipe, seed=3 + image, guided=guided))
                assert decisions(pipe) == of_image(taken, image), name
                other += saved(decisions(pipe))
        assert_close(together, torch.cat(alone))
    assert other > 0


WRITTEN = ("sd3", "wan21", "pixart", "flux", "auraflow")
DERIVABLE = ("sd3", "wan21", "pixart")  # the others have two kinds of blocks, or arguments that rows share


@pytest.mark.parametrize(
    ("name", "derived"),
    [*((name, False) for name in WRITTEN), *((name, True) for name in DERIVABLE)],
    ids=[*(f"{name}-written" for name in WRITTEN), *(f"{name}-derived" for name in DERIVABLE)],
)
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_rows_that_compute_beside_rows_that_reuse(
    name: str, scope: Scope, derived: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image 0 reuses other steps than image 1; with a derived row the whole batch is computed and nothing gathered."""
    if derived:
        monkeypatch.delitem(FAMILIES, CASES[name].family)
    case, pipe = CASES[name], CASES[name].make()
    accelerate(pipe, FeatureCache(Staggered(), scope, Newton(2), Guard(warmup=3, last=0)))
    alone = []
    for image, seed in enumerate((3, 4)):
        monkeypatch.setattr(Staggered, "first", image)
        alone.append(made(case, pipe, seed=seed))
        assert saved(decisions(pipe)) > 0
    monkeypatch.setattr(Staggered, "first", 0)
    together = made(case, pipe, batch=2)
    kinds = {call.what for call in report(pipe).calls}
    assert kinds == {"computed", "mixed"}
    assert_close(together, torch.cat(alone))
    gathered = [call for call in report(pipe).calls if call.what == "mixed" and call.not_run]
    assert bool(gathered) == (not derived and not isinstance(scope, Module)) or isinstance(scope, Output)


@dataclass(frozen=True)
class Staggered(Easy):
    """Image i reuses the steps 3 k + i."""

    first = 0

    def score(self, state: Any, signal: Any, step: Any) -> Any:
        images = torch.arange(len(signal)) + self.first
        return 2.0 * (images != step.index % 3), state

    def update(self, state: Any, signal: Any, feedback: Any, computed: Any, step: Any) -> Any:
        return {"seen": torch.ones(len(signal))}


@pytest.mark.parametrize("case", BATCHED, ids=[case.name for case in BATCHED])
@EVERY
def test_split_guidance_decides_and_makes_what_batched_guidance_does(case: Case, name: str) -> None:
    batched, taken = fresh(case.name, name)
    pipe = case.make()
    accelerate(pipe, cache(case, name))
    split_guidance(pipe)
    found = made(case, pipe, batch=2)
    split = decisions(pipe)
    assert [branches for _, branches, _ in split] == [("cond",), ("uncond",)] * EVALUATIONS
    assert [computed for _, _, computed in split] == [computed for _, _, computed in taken for _ in range(2)]
    assert_close(found, batched)


# -- 8: switching off brings everything back


def anatomy(pipe: Any) -> dict[str, Any]:
    return {
        name: (
            list(network.state_dict()),
            [(path, id(module)) for path, module in network.named_modules()],
            inspect.signature(network.forward),
            inspect.signature(type(network).forward),
        )
        for name, network in networks(pipe).items()
    }


@ALL
@EVERY
def test_switching_off_restores_everything(case: Case, name: str) -> None:
    pipe = case.make()
    made(case, pipe, 2)  # what a run itself leaves behind
    before, keys = anatomy(pipe), tiny.snapshot(pipe)
    accelerate(pipe, cache(case, name))
    made(case, pipe, SHORT, batch=2)
    assert anatomy(pipe) == before, "while it is on, too"
    restore(pipe)
    assert anatomy(pipe) == before
    assert tiny.snapshot(pipe) == keys
    for network in networks(pipe).values():
        for module in network.modules():
            assert "forward" not in vars(module)
            assert module.forward.__func__ is type(module).forward
    assert torch.equal(made(case, pipe, SHORT, batch=2), untouched(case.name, evaluations=SHORT))


def test_parity_forms_restore_everything_too() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    made(case, pipe, 2)
    keys = tiny.snapshot(pipe)
    for name in CACHE_PRESETS:
        accelerate(pipe, cache(case, name, parity=True))
        assert not torch.equal(made(case, pipe, batch=2), untouched(case.name)), name
        restore(pipe)
        assert tiny.snapshot(pipe) == keys
    assert torch.equal(made(case, pipe, batch=2), untouched(case.name))


# -- 9: save, load in a fresh process

LOADED = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from safetensors.torch import save_file
from flowaccel.pipelines import AcceleratedPipeline
from test_conformance_caches import CASES, decisions, made

folder, found, taken = Path({folder!r}), {{}}, {{}}
for name, case in CASES.items():
    absent = {{part: None for part, value in case.make(seed=5).components.items() if value is None}}
    pipe = AcceleratedPipeline.from_pretrained(folder / name, **absent)
    pipe.set_progress_bar_config(disable=True)
    found[name], taken[name] = made(case, pipe, batch=2).contiguous(), repr(decisions(pipe))
save_file(found, folder / "found.safetensors", taken)
(folder / "taken.json").write_text(json.dumps(taken))
"""


def test_a_fresh_process_decides_and_makes_the_same(tmp_path: Path, process: Process) -> None:
    """A preset for each family, in turn."""
    expected, taken = {}, {}
    for (name, case), preset in zip(CASES.items(), itertools.cycle(CACHE_PRESETS)):
        pipe = case.make()
        accelerate(pipe, cache(case, preset))
        pipe.save_pretrained(tmp_path / name)
        expected[name], found = fresh(name, preset)
        assert saved(found) > 0
        taken[name] = repr(found)
    here = Path(__file__).parent
    script = LOADED.format(tests=str(here.parent), here=str(here), folder=str(tmp_path))
    process("-c", script)
    made_there = load_file(tmp_path / "found.safetensors")
    assert {name for name in expected if not torch.equal(made_there[name], expected[name])} == set()
    assert json.loads((tmp_path / "taken.json").read_text()) == taken


# -- 10: beside others


KINDS = ["fbcache", "teacache", "module"]


def kind_of(case: Case, kind: str) -> FeatureCache:
    if kind == "module":
        return FeatureCache(Interval(3), Module(), Newton(1), Guard(warmup=2))
    return cache(case, kind)


@pytest.mark.slow
@FEW
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("order", ["cache first", "neighbour first"])
def test_beside_offloading_in_both_orders(case: Case, neighbour: Callable[[Any], Any], order: str) -> None:
    for kind in KINDS:
        reference, pipe = case.make(), case.make()
        accelerate(reference, kind_of(case, kind))
        expected, taken = made(case, reference, SHORT), decisions(reference)
        assert saved(taken) > 0
        restore(reference)
        plain = made(case, reference, SHORT)
        undo = None
        if order == "neighbour first":
            undo = neighbour(pipe)
        accelerate(pipe, kind_of(case, kind))
        if undo is None:
            undo = neighbour(pipe)
        assert torch.equal(made(case, pipe, SHORT), expected), kind
        assert decisions(pipe) == taken, kind
        restore(pipe)
        assert torch.equal(made(case, pipe, SHORT), plain), kind
        undo()
        assert torch.equal(made(case, pipe, SHORT), plain), kind


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_weights_stored_in_lower_precision_are_as_they_were_after_the_cache(name: str) -> None:
    case = CASES[name]
    pipes = [case.make(), case.make()]
    for pipe in pipes:
        for network in networks(pipe).values():
            apply_layerwise_casting(network, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = made(case, pipes[0], batch=2)
    assert not torch.equal(plain, untouched(case.name))
    with accelerated(pipes[1], cache(case, "mask")):
        cached = made(case, pipes[1], batch=2)
        assert saved(decisions(pipes[1])) > 0
    assert not torch.equal(cached, plain)
    assert torch.equal(made(case, pipes[1], batch=2), plain)


@FEW
@pytest.mark.parametrize("kind", ["teacache", "module"])
@pytest.mark.parametrize("order", ["LoRA first", "cache first"])
def test_lora_can_come_and_go(case: Case, kind: str, order: str) -> None:
    reference, pipe = case.make(), case.make()
    load_lora(reference)
    accelerate(reference, kind_of(case, kind))
    expected = made(case, reference, SHORT)
    steps = [load_lora, lambda which: accelerate(which, kind_of(case, kind))]
    for step in steps if order == "LoRA first" else reversed(steps):
        step(pipe)
    assert torch.equal(made(case, pipe, SHORT), expected)
    unload_lora(pipe)
    without = case.make()
    accelerate(without, kind_of(case, kind))
    cached = made(case, without, SHORT)
    assert not torch.equal(cached, expected)
    assert torch.equal(made(case, pipe, SHORT), cached)
    load_lora(pipe)
    assert torch.equal(made(case, pipe, SHORT), expected)
    unload_lora(pipe)
    restore(pipe)
    assert torch.equal(made(case, pipe, SHORT), untouched(case.name, 1, SHORT))


@EVERY
@pytest.mark.parametrize("steps", [4, 20])
def test_image_to_image_at_low_strength(name: str, steps: int) -> None:
    """Guards count the steps that are made, not those that the strength leaves out."""
    case = CASES["flux_img2img"]
    pipe = case.make()
    arguments = case.arguments(steps=steps, batch=2) | {"strength": 0.3, "output_type": "latent"}
    plain = pipe(**arguments, return_dict=False)[0]
    evaluations = steps - int(steps - 0.3 * steps)
    options = cache(case, name)
    accelerate(pipe, FeatureCache(options.gate, options.scope, options.predictor, Guard(warmup=1, last=1)))
    first = pipe(**arguments | {"generator": case.arguments(batch=2)["generator"]}, return_dict=False)[0]
    found = report(pipe)
    assert found.num_steps == len(found.steps) == evaluations
    assert all(all(call.computed) for step in (found.steps[0], found.steps[-1]) for call in step.calls)
    if evaluations <= 2:
        assert torch.equal(first, plain)
        assert found.unsaved is not None
    again = pipe(**arguments | {"generator": case.arguments(batch=2)["generator"]}, return_dict=False)[0]
    assert torch.equal(first, again)


@EVERY
def test_each_of_two_transformers_has_a_memory_of_its_own(name: str) -> None:
    """Wan 2.2 changes over on the way: the second one starts by computing, and never gets what the first computed."""
    _, taken = fresh("wan22", name)
    for network in ("transformer", "transformer_2"):
        calls = [computed for which, _, computed in taken if which == network]
        assert len(calls) > 2
        assert all(calls[0]) and all(calls[1]), "the first step of both branches"


# -- 10: torch.compile of the repeated blocks


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


COMPILED = [CASES[name] for name in ("sit", "sd3", "flux", "wan21")]
STATIC_AND_DYNAMIC = {
    "stack, static": FeatureCache(Interval(3), Stack(), Newton(1), Guard(warmup=2)),
    "stack, static mask": FeatureCache(Mask("fast"), Stack()),
    "stack, first block": FeatureCache(FirstBlock(0.5), Stack(), Newton(1), Guard(max_run=2)),
    "stack, modulated input": FeatureCache(ModulatedInput(0.25), Stack()),
    "stack, middle block": FeatureCache(Codebook(((0.5, 3), (1.0, 2), (2.0, 1))), Stack()),
    "stack, magnitude": FeatureCache(Magnitude(0.1), Stack(), Hold(), Guard(max_run=2)),
    "range, easy": FeatureCache(Easy(0.3), Range(1, 0)),
    "output, static": FeatureCache(Interval(2), Output()),
    "output, easy": FeatureCache(Easy(0.3), Output(True)),
    "output, third difference": FeatureCache(ThirdDifference(0.3), Output()),
}


def compile_blocks(pipe: Any) -> Counting:
    torch._dynamo.reset()
    backend = Counting()
    for network in networks(pipe).values():
        if network._repeated_blocks:
            network.compile_repeated_blocks(fullgraph=True, backend=backend)
            continue
        for block in network.transformer_blocks:  # diffusers names none for SD3
            block.compile(fullgraph=True, backend=backend)
    return backend


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED, ids=[case.name for case in COMPILED])
def test_compiled_blocks_keep_their_graphs(case: Case) -> None:
    """No graph breaks (`fullgraph` raises), and not a graph more than without a cache; the decisions and images are
    those of the cache on blocks that are not compiled."""
    pipe, eager = case.make(), case.make()
    backend = compile_blocks(pipe)
    plain = made(case, pipe)
    graphs = backend.graphs
    assert graphs > 0
    for label, chosen in STATIC_AND_DYNAMIC.items():
        with accelerated(eager, chosen):
            expected, taken = made(case, eager), decisions(eager)
        assert saved(taken) > 0, label
        with accelerated(pipe, chosen):
            assert_close(made(case, pipe), expected)
            assert decisions(pipe) == taken, label
        assert backend.graphs == graphs, label
    assert torch.equal(made(case, pipe), plain)
    assert backend.graphs == graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["stack, first block", "stack, modulated input", "output, easy"])
def test_blocks_compiled_under_a_cache_have_the_same_graphs(chosen: str) -> None:
    case = CASES["sd3"]
    pipe = case.make()
    backend = compile_blocks(pipe)
    made(case, pipe)
    graphs, pipe = backend.graphs, case.make()
    accelerate(pipe, STATIC_AND_DYNAMIC[chosen])
    expected, taken = made(case, pipe), decisions(pipe)
    backend = compile_blocks(pipe)
    assert_close(made(case, pipe), expected)
    assert decisions(pipe) == taken
    assert backend.graphs == graphs
    restore(pipe)
    made(case, pipe)
    assert backend.graphs == graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_batch_that_is_gathered_costs_compiled_blocks_one_graph_each_at_most() -> None:
    """The blocks then see a second batch size, which `torch.compile` meets with one graph for all sizes."""
    case, name = CASES["sd3"], "fbcache"
    pipe = case.make()
    backend = compile_blocks(pipe)
    made(case, pipe, batch=2)
    graphs = backend.graphs
    accelerate(pipe, cache(case, name))
    images, taken = fresh(case.name, name)
    assert any(len(set(computed)) == 2 for _, _, computed in taken), "some steps are mixed"
    for _ in range(2):
        assert_close(made(case, pipe, batch=2), images)
        assert decisions(pipe) == taken
    assert graphs < backend.graphs <= 2 * graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled first", "cache first"])
def test_modules_of_compiled_blocks_are_refused(order: str) -> None:
    case = CASES["sd3"]
    pipe = case.make()
    chosen = FeatureCache(Interval(2), Module())
    if order == "compiled first":
        compile_blocks(pipe)
        with pytest.raises(RecipeConflictError, match=r"blocks of the SD3Transformer2DModel are compiled.*'stack'"):
            accelerate(pipe, chosen)
    else:
        accelerate(pipe, chosen)
        compile_blocks(pipe)
        with pytest.raises(RecipeConflictError, match=r"blocks of the SD3Transformer2DModel are compiled.*'stack'"):
            made(case, pipe)
        restore(pipe)
    assert_close(made(case, pipe, batch=2), untouched("sd3"))
    torch._dynamo.reset()


# -- what is not a number, and what does not fit


POISONED: dict[str, tuple[Scope, Gate]] = {
    "output, static": (Output(), Interval(2)),
    "output, dynamic": (Output(True), Easy(1e6)),
    "stack, static": (Stack(), Interval(2)),
    "stack, dynamic": (Stack(), FirstBlock(1e6)),
    "module, static": (Module(), Interval(2)),
    "module, dynamic": (Module(), Easy(1e6)),
}
"""Gates that compute the steps 0 to 3, 5, 7 and 9."""


def poison(pipe: Any, case: Case, step: int, image: int) -> Callable[[], None]:
    """One image's features become NaN within a block at a step, deep inside of whatever is cached."""
    module = pipe.transformer.transformer_blocks[1].attn.to_out[0]

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        run = session_of(pipe).run
        assert run is not None and run.images is not None
        if run.ended or run.steps_done != step:
            return None
        output = output.clone()
        output[image :: run.images] = torch.nan
        return output

    return module.register_forward_hook(hook).remove


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize(("scope", "gate"), POISONED.values(), ids=POISONED)
def test_what_is_not_finite_is_computed_in_full_for_that_image_and_said_once(
    name: str, scope: Scope, gate: Gate
) -> None:
    case = CASES[name]
    pipe = case.make()
    accelerate(pipe, FeatureCache(gate, scope, Newton(1), Guard(warmup=4, last=0, max_run=1)))
    expected, taken = made(case, pipe, batch=2), decisions(pipe)
    assert [computed for _, _, computed in taken][:: len(case.branches)] == [
        (step < 4 or step % 2 == 1,) * 2 for step in range(EVALUATIONS)
    ]
    stop = poison(pipe, case, 5, image=1)
    with pytest.warns(RuntimeWarning, match="not finite.*cannot be reused") as warned:
        found = made(case, pipe, batch=2)
    assert len(warned) == 1
    assert torch.isnan(found[1]).all()
    assert_close(found[:1], expected[:1])
    assert of_image(decisions(pipe), 0) == of_image(taken, 0), "the image beside it does as it always does"
    steps = [computed[1] for _, _, computed in decisions(pipe)][:: len(case.branches)]
    assert steps == [step not in (4,) for step in range(EVALUATIONS)]
    stop()
    assert torch.equal(made(case, pipe, batch=2), expected), "without a warning"


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize(
    ("name", "decide"), [("sd3", "image"), ("flux", "image"), ("sd3", "row"), ("flux", "row"), ("flux", "batch")]
)
@pytest.mark.parametrize(("scope", "gate"), POISONED.values(), ids=POISONED)
def test_nothing_is_predicted_from_what_was_not_finite(
    name: str, decide: Any, scope: Scope, gate: Gate, step: int
) -> None:
    """The latents are mended by hand, in the warm-up or after it; what the history holds must not come back."""

    def mend(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        return {"latents": values["latents"].nan_to_num()}

    case = CASES[name]
    pipe = case.make()
    accelerate(pipe, FeatureCache(gate, scope, Newton(2), Guard(warmup=4, last=0, max_run=1), decide))
    poison(pipe, case, step, image=1)
    outputs: list[Tensor] = []

    def watch(call_next: Callable[..., Any], call: Call) -> Any:
        output = call_next()
        outputs.append(output[0])
        return output

    session_of(pipe).on_call(watch)
    with pytest.warns(RuntimeWarning, match="not finite") as warned:
        pipe(**case.arguments(steps=EVALUATIONS, batch=2), callback_on_step_end=mend)
    assert len(warned) == 1
    finite = [bool(torch.isfinite(output).all()) for output in outputs]
    assert finite == [place // len(case.branches) != step for place in range(len(outputs))]
    assert report(pipe).count("reused") + report(pipe).count("mixed") > 0


# -- what else calls a network


def test_calls_beyond_guidance_are_computed_and_not_remembered() -> None:
    """SD3's skip-layer guidance calls the network a third time, without some of its blocks."""
    case, pipe = CASES["sd3"], CASES["sd3"].make()

    def call(steps: int = EVALUATIONS) -> Tensor:
        arguments = case.arguments(steps=steps, batch=2) | {"output_type": "latent"}
        skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
        return pipe(**arguments, **skipping).images

    plain = call()
    for scope in (Output(), Stack(), Module()):
        with accelerated(pipe, FeatureCache(Interval(1), scope)):
            assert torch.equal(call(), plain)
        with accelerated(pipe, FeatureCache(Interval(2), scope)):
            assert not torch.equal(call(), plain)
            extra = [record for record in report(pipe).calls if record.branches == ("extra",)]
            assert len(extra) == EVALUATIONS - 1
            assert all(record.what == "computed" and record.not_run == {} for record in extra)
            assert report(pipe).count("reused") > 0


@EVERY
def test_samplers_that_ask_twice_in_a_step(name: str) -> None:
    """Heun's method asks again at the time of the step before: there is no slope between two values of one time."""
    case, pipe = CASES["sit"], tiny.sit_pipeline()
    plain = made(case, pipe, 7, batch=2)
    with accelerated(pipe, FeatureCache(Interval(1), cache(case, name).scope, Newton(2))):
        assert torch.equal(made(case, pipe, 7, batch=2), plain)
    with accelerated(pipe, cache(case, name)):
        found, taken = made(case, pipe, 7, batch=2), decisions(pipe)
    assert torch.isfinite(found).all()
    bends = name == "adaptive_diffusion"  # at every evaluation: the sampler goes to and fro
    assert (saved(taken) == 0) == torch.equal(found, plain) == bends


def unet_pipeline() -> Any:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=families.WIDTH,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    return tiny.silent(
        StableDiffusionPipeline(
            vae=tiny.autoencoder(),
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["easycache", "ab_cache", "adaptive_diffusion"])
def test_caches_of_the_output_work_on_a_unet(name: str) -> None:
    case = CASES["sd3"]  # for its thresholds

    def call(batch: int, seed: int) -> Tensor:
        return pipe(
            **tiny.words(batch, seed),
            height=16,
            width=16,
            guidance_scale=3.0,
            num_inference_steps=EVALUATIONS,
            generator=tiny.generators(*range(seed, seed + batch)),
            output_type="latent",
        ).images

    pipe = unet_pipeline()
    plain = call(2, 3)
    accelerate(pipe, cache(case, name))
    together, taken = call(2, 3), decisions(pipe)
    assert saved(taken) > 0
    for image in (0, 1):
        assert_close(call(1, 3 + image), together[image : image + 1])
        assert decisions(pipe) == of_image(taken, image)
    restore(pipe)
    assert torch.equal(call(2, 3), plain)


class Listing(nn.Module):
    """A network that takes and returns images in parts, as Z-Image's Omni mode does."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: list[list[Tensor]], t: Tensor) -> tuple[list[list[Tensor]]]:
        return ([[self.transformer_blocks[0](part) for part in image] for image in x],)


class ListingPipeline(DiffusionPipeline):
    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self) -> None:
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            self.transformer([[torch.zeros(2, 4)]], t)


@pytest.mark.parametrize("gate", ["interval", "easy"])
def test_networks_that_take_images_in_parts_are_refused_by_name(gate: str) -> None:
    pipe = ListingPipeline(Listing(), FlowMatchEulerDiscreteScheduler())
    accelerate(pipe, FeatureCache(gate))
    with pytest.raises(UnsupportedModelError, match="Listing is called with images in parts"):
        pipe()
    restore(pipe)
    pipe()
