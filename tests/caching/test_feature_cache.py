"""The configuration of a feature cache: sugar, routing, wrong use, JSON; and what it holds while it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import tiny
import unwritten
from families import CASES, assert_close
from flowaccel import (
    FeatureCache,
    LevelCache,
    Recipe,
    RecipeConflictError,
    UnsupportedModelError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.caching.feature_cache import cache_preset
from flowaccel.caching.gates import (
    GATES,
    Codebook,
    Easy,
    FirstBlock,
    Interval,
    Magnitude,
    Mask,
    ModulatedInput,
    Step,
    ThirdDifference,
)
from flowaccel.caching.guard import Guard
from flowaccel.caching.predictors import PREDICTORS, Hermite, Hold, Newton, Taylor
from flowaccel.caching.presets import CACHE_PRESETS
from flowaccel.caching.scopes import SCOPES, Module, Output, Range, Stack
from flowaccel.hooks import session_of
from flowaccel.recipe.accelerator import Accelerator

STEPS = 8

# -- names and keywords


def test_names_and_objects_say_the_same() -> None:
    sugar = FeatureCache(
        gate="first_block", scope="range", predictor="newton", threshold=0.1, blocks=2, back=3, order=2, warmup=4
    )
    assert sugar == FeatureCache(FirstBlock(0.1, blocks=2), Range(back=3), Newton(2), Guard(warmup=4))
    assert FeatureCache() == FeatureCache(Easy(), Output(residual=True), Hold(), Guard(), "image")
    assert FeatureCache("interval", interval=3, max_run=2) == FeatureCache(Interval(3), guard=Guard(max_run=2))


def test_every_keyword_goes_to_the_one_part_that_owns_it() -> None:
    """No two parts that can be chosen together have a field of one name, so that no keyword is ambiguous."""
    kinds = {"gate": GATES, "scope": SCOPES, "predictor": PREDICTORS, "guard": {"guard": Guard}}
    owners: dict[str, set[str]] = {}
    for kind, registry in kinds.items():
        for part in registry.values():
            for field in fields(part):
                owners.setdefault(field.name, set()).add(kind)
    assert {name for name, found in owners.items() if len(found) > 1} == set()
    assert not {"gate", "scope", "predictor", "guard", "decide", "parity"} & set(owners)


def test_options_change_an_object_that_is_given() -> None:
    given = FirstBlock(0.1, blocks=3)
    assert FeatureCache(given, threshold=0.2).gate == FirstBlock(0.2, blocks=3)
    assert given == FirstBlock(0.1, blocks=3)


@pytest.mark.parametrize("name", GATES)
def test_the_usual_scope_of_every_gate_works(name: str) -> None:
    usual = {"interval": Output(), "mask": Output(), "third_difference": Output(), "easy": Output(residual=True)}
    assert FeatureCache(name).scope == usual.get(name, Stack())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gate": "first"}, ValueError, "gate must be one of interval, mask, first_block.*got 'first'"),
        ({"scope": "blocks"}, ValueError, "scope must be one of output, stack, range, module, got 'blocks'"),
        ({"predictor": "line"}, ValueError, "predictor must be one of hold, newton"),
        ({"guard": "none"}, ValueError, "guard must be one of guard"),
        ({"gate": Newton()}, TypeError, "gate must be one of interval.* or such an object"),
        ({"gate": None}, TypeError, "gate must be one of interval"),
        ({"predictor": FirstBlock()}, TypeError, "predictor must be one of hold"),
        ({"decide": "pixel"}, ValueError, "decide must be one of image, row, batch, got 'pixel'"),
        ({"threshold": -1}, ValueError, "threshold must be a finite number of at least 0"),
        ({"gate": "interval", "interval": 0}, ValueError, "interval must be a whole number of at least 1"),
        ({"max_run": 0}, ValueError, "max_run must be"),
        ({"gate": "interval", "threshold": 0.1}, TypeError, "no chosen part has the option 'threshold'; .*'interval'"),
        ({"order": 1}, TypeError, "no chosen part has the option 'order'.*predictor 'hold': none"),
        ({"thresold": 0.1}, TypeError, "no chosen part has the option 'thresold'.*gate 'easy': threshold"),
    ],
)
def test_wrong_use_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureCache(**options)


@pytest.mark.parametrize("gate", ["first_block", "modulated_input", "codebook"])
@pytest.mark.parametrize("scope", ["output", "module"])
def test_gates_that_read_blocks_do_not_fit_where_these_do_not_run(gate: str, scope: str) -> None:
    with pytest.raises(ValueError, match=f"gate '{gate}' reads blocks.*'stack' and 'range', got '{scope}'"):
        FeatureCache(gate, scope)


def test_a_gate_that_reads_the_cached_feature_does_not_fit_where_there_are_many() -> None:
    with pytest.raises(ValueError, match=r"gate 'magnitude' reads the one feature.*scope 'module' caches many"):
        FeatureCache("magnitude", "module")
    assert FeatureCache("magnitude", "module", ratios=(1.0, 0.99)).gate.static


def test_scopes_refuse_what_is_out_of_range() -> None:
    for options in ({"front": -1}, {"back": 1.5}, {"front": True}):
        with pytest.raises(ValueError, match="must be a whole number of at least 0"):
            FeatureCache("interval", "range", **options)
    with pytest.raises(ValueError, match="attention or feed_forward, got neither"):
        Module(attention=False, feed_forward=False)


# -- presets and JSON


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"cache must be one of ab_cache, adacache.*got 'fb'"):
        cache_preset("fb")
    with pytest.raises(TypeError, match="no chosen part has the option 'interval'"):
        cache_preset("fbcache", interval=2)
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        cache_preset("teacache", threshold=-0.1)


def test_preset_options_change_one_thing_only() -> None:
    plain, changed = CACHE_PRESETS["dbcache"].cache, cache_preset("dbcache", threshold=0.2, max_run=5)
    assert changed.gate == FirstBlock(0.2, blocks=8)
    assert changed.guard == Guard(warmup=8, last=0, max_run=5)
    assert (changed.scope, changed.predictor, changed.decide) == (plain.scope, plain.predictor, plain.decide)


@pytest.mark.parametrize("name", CACHE_PRESETS)
def test_parity_changes_what_the_published_code_does_otherwise_and_no_number(name: str) -> None:
    ours, published = cache_preset(name), cache_preset(name, parity=True)
    assert ours.decide == "image"
    assert published.decide == ("image" if name == "easycache" else "batch")
    assert (published.predictor == ours.predictor) == (name not in ("taylorseer", "ab_cache"))
    changed = {"teacache": {"bounded": False}, "magcache": {"rounding": "nearest"}}.get(name, {})
    parts = FeatureCache(ours.gate, ours.scope, ours.predictor, ours.guard, **changed)
    assert (parts.gate, parts.guard) == (published.gate, published.guard)


def test_json_of_before_there_were_axes_loads_as_it_was(tmp_path: Any) -> None:
    """Recipes that name none of the fields that came later."""
    cache = FeatureCache(ModulatedInput(0.2, (1.5, 0.5, 0.0)), Stack(), Newton(2), Guard(0.2, 2))
    Recipe([cache]).save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.json")
    written = json.loads(file.read_text())
    (part,) = written["accelerators"]
    for owner, added in (("predictor", "axis"), ("guard", "rounding"), ("gate", "bounded")):
        del part[owner][added]
    file.write_text(json.dumps(written))
    (back,) = Recipe.from_pretrained(tmp_path).accelerators
    assert back == cache
    assert (back.predictor.axis, back.guard.rounding, back.gate.bounded) == ("time", "up", True)


MORE: list[Accelerator] = [
    FeatureCache(ModulatedInput(0.2, (1.5, 0.5, 0.0), (0.0, 0.5)), Range(2, 0), Hermite(3, 0.4, True), decide="row"),
    FeatureCache(Magnitude(0.1, (1.0, 0.99, 0.98)), Module(attention=False), Taylor(2), Guard(0.3, 2, 4, 1.5)),
    FeatureCache(Mask((1, 0, 1, 0)), predictor=Newton(2, reach=1.5, axis="step")),
    FeatureCache(ModulatedInput(0.2, "wan2.1-t2v-14b-ret", bounded=False), guard=Guard(0.3, rounding="nearest")),
    FeatureCache(Codebook(((0.1, 3), (1.0, 1)))),
    FeatureCache(ThirdDifference(0.02, "vector", True), Output(), Newton(1), Guard(4, 0, 3), "row"),
]
ALL: dict[str, Accelerator] = {
    **{name: preset.cache for name, preset in CACHE_PRESETS.items()},
    **{f"{name}, parity": preset.as_published for name, preset in CACHE_PRESETS.items()},
    **{f"more {place}": cache for place, cache in enumerate(MORE)},
}


@pytest.mark.parametrize("cache", ALL.values(), ids=ALL)
def test_json_brings_back_the_same(cache: Accelerator, tmp_path: Any) -> None:
    assert json.loads(json.dumps(cache.to_dict())) == cache.to_dict()
    Recipe([cache]).save_pretrained(tmp_path)
    (back,) = Recipe.from_pretrained(tmp_path).accelerators
    assert back == cache and hash(back) == hash(cache) and repr(back) == repr(cache)


def test_json_names_every_part() -> None:
    written = FeatureCache("first_block", threshold=0.08).to_dict()
    assert written["gate"] == {"name": "first_block", "threshold": 0.08, "blocks": 1}
    assert {part: written[part]["name"] for part in ("scope", "predictor", "guard")} == {
        "scope": "stack",
        "predictor": "hold",
        "guard": "guard",
    }


def test_two_caches_on_one_pipeline_are_refused() -> None:
    with pytest.raises(RecipeConflictError, match="two caches would forecast from each other's forecasts"):
        accelerate(CASES["sd3"].make(), [FeatureCache(), LevelCache()])


# -- in a run


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("scope", [Output(), Output(True), Stack(), Range(1, 1)], ids=lambda scope: str(scope))
@pytest.mark.parametrize("name", ["sd3", "wan21"])
def test_it_holds_one_tensor_more_than_the_order_per_branch_and_nothing_after(
    name: str, scope: Any, order: int
) -> None:
    case = CASES[name]
    pipe, held = case.make(), []
    accelerate(pipe, FeatureCache(Interval(2), scope, Newton(order), Guard(warmup=order + 1, last=0)))

    def watch(call_next: Any, call: Any) -> Any:
        output = call_next()
        held.append(output[0][call.rows_of("cond")] if "cond" in call.branches else output[0])
        return output

    def blocks(call_next: Any, call: Any, block: Any) -> Any:
        if block.index == 0:
            text = block.encoder.numel() if name == "sd3" and isinstance(scope, Range) else 0  # the last block drops it
            tokens[call.branches] = 4 * (block.hidden.numel() + text)
        return call_next()

    tokens: dict[Any, int] = {}
    session_of(pipe).on_call(watch)
    session_of(pipe).on_block(blocks)
    case(pipe, batch=2, steps=STEPS)
    one = held[0].numel() * 4 * 2 if isinstance(scope, Output) else sum(tokens.values())
    assert max(call.cache_bytes for call in report(pipe).calls) == (order + 1) * one
    run = session_of(pipe).run
    assert run is not None and run.state == {}


@pytest.mark.parametrize("how", ["ends", "raises"])
def test_features_are_freed_when_the_run_ends(how: str) -> None:
    import gc
    import weakref

    case = CASES["flux"]
    pipe = case.make()
    accelerate(pipe, FeatureCache(Interval(2), Stack(), Newton(1)))
    seen: list[Any] = []

    def watch(call_next: Any, call: Any) -> Any:
        output = call_next()
        for memory in call.run.state.values():
            for history in memory.histories.values():
                seen.extend(weakref.ref(tensor) for tensor in history.newest)
        if how == "raises" and call.step == 3:
            raise RuntimeError("on purpose")
        return output

    session_of(pipe).on_call(watch)
    try:
        case(pipe, steps=STEPS)
    except RuntimeError:
        assert how == "raises"
    gc.collect()
    assert len(seen) >= 8
    assert [tensor for tensor in seen if tensor() is not None] == []


def test_the_report_says_what_was_not_run() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    expected = {
        Output(): {""},
        Stack(): {f"transformer_blocks.{i}" for i in range(3)},
        Range(1, 1): {"transformer_blocks.1"},
        Module(feed_forward=False): {f"transformer_blocks.{i}.attn" for i in range(3)},
    }
    for scope, paths in expected.items():
        with accelerated(pipe, FeatureCache(Interval(2), scope, guard=Guard(last=0))):
            case(pipe, batch=2, steps=4)
            reused = [call for call in report(pipe).calls if call.what == "reused"]
            assert len(reused) == 2
            assert all(call.not_run == dict.fromkeys(paths, 4) for call in reused)
            others = [call for call in report(pipe).calls if call.what != "reused"]
            assert all(call.what == "computed" and call.not_run == {} for call in others)


def test_a_mask_of_the_wrong_length_raises_and_leaves_the_pipeline_usable() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    plain = case(pipe, steps=STEPS)
    accelerate(pipe, FeatureCache(Mask((1, 0, 1))))
    with pytest.raises(ValueError, match="the mask has 3 entries and the run 8 steps"):
        case(pipe, steps=STEPS)
    assert session_of(pipe).run.state == {}
    case(pipe, steps=3)
    assert [call.what for call in report(pipe).calls] == ["computed", "reused", "computed"]
    restore(pipe)
    assert torch.equal(case(pipe, steps=STEPS), plain)


def test_what_can_save_nothing_says_so() -> None:
    case = CASES["sd3"]
    pipe = case.make()
    accelerate(pipe, cache_preset("dbcache"))
    case(pipe, steps=STEPS)
    assert "'feature_cache' had every call computed" in str(report(pipe))


@pytest.mark.parametrize("name", ["sit", "sd3"])
def test_a_network_of_one_block_has_nothing_left_after_the_probe(name: str) -> None:
    from flowaccel import UnsupportedModelError

    case = CASES[name]
    pipe = case.make()
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[-1:]
    accelerate(pipe, FeatureCache("first_block"))
    with pytest.raises(UnsupportedModelError, match=r"single block.*'first_block'.*'easy'"):
        case(pipe)
    restore(pipe)
    accelerate(pipe, FeatureCache("interval", "stack", last=0))
    case(pipe)
    assert report(pipe).count("reused") == 2


@pytest.mark.parametrize("unit", ["row", "batch"])
def test_units_other_than_the_image_decide_for_themselves(unit: Any) -> None:
    case = CASES["flux"]  # one call per branch
    pipe = case.make()
    accelerate(pipe, FeatureCache(Easy(0.3), decide=unit, warmup=2))
    case(pipe, batch=2, steps=10)
    calls = report(pipe).calls
    taken = {branch: [call.computed for call in calls if call.branches == (branch,)] for branch in ("cond", "uncond")}
    assert taken["cond"] != taken["uncond"]
    if unit == "batch":
        assert all(len(set(computed)) == 1 for computed in taken["cond"] + taken["uncond"])
        assert any(not computed[0] for computed in taken["cond"])


# -- rows


@pytest.mark.parametrize(
    "recipe",
    [
        "magcache",
        "adacache",
        FeatureCache(gate="first_block", threshold=0.2, scope="range"),
        FeatureCache(gate="easy", threshold=0.2, scope="module"),
    ],
    ids=["magcache", "adacache", "range", "module"],
)
def test_one_row_of_text_for_all_images_is_that_of_each(recipe: Any) -> None:
    """FLUX with given embeddings and several images per prompt, which decide differently."""
    arguments = tiny.flux_arguments(1, STEPS) | {"output_type": "latent"}
    texts = {name: arguments[name].expand(3, *arguments[name].shape[1:]) for name in arguments if "embeds" in name}
    found = []
    for given in (texts, {"num_images_per_prompt": 3}):
        pipe = tiny.flux_pipeline()
        with accelerated(pipe, recipe):
            arguments["generator"] = [torch.Generator().manual_seed(i) for i in range(3)]
            found.append(pipe(**arguments | given).images)
            assert any(len(set(record.computed)) > 1 for record in session_of(pipe).run.records)
    assert_close(*found)


def test_what_a_controlnet_adds_between_reused_blocks_is_not_added_twice() -> None:
    pipe = unwritten.Loop(tiny.sd3_pipeline().transformer, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "hidden_states": unwritten.noise(4, 8, 8),
        "encoder_hidden_states": unwritten.text(tiny.TOKENS, tiny.CONTEXT),
        "pooled_projections": unwritten.noise(tiny.POOLED, seed=2),
        "block_controlnet_hidden_states": [unwritten.noise(16, 16, seed=seed) for seed in (3, 4, 5)],
    }
    expected = pipe(arguments, still=True)
    with accelerated(pipe, "fbcache:threshold=1e6"):
        assert_close(pipe(arguments, still=True), expected)
        assert session_of(pipe).run.records[-1].what == "reused"


def test_modules_whose_rows_are_not_those_of_the_call_are_not_taken_apart() -> None:
    """Latte's blocks see every frame, or every place, as a row."""
    pipe, arguments = unwritten.looped("LatteTransformer3DModel")
    bounds = {"scope": "module", "warmup": 1, "last": 0}
    easy = bounds | {"gate": "easy", "threshold": 10.0}
    with accelerated(pipe, FeatureCache(**easy)), pytest.raises(UnsupportedModelError, match="6 rows in a call of 2"):
        pipe(arguments)
    for fits in (FeatureCache(**easy, decide="batch"), FeatureCache(gate="interval", **bounds)):
        with accelerated(pipe, fits):
            assert pipe(arguments).isfinite().all()
            assert any(record.what == "reused" for record in session_of(pipe).run.records)


@dataclass(frozen=True)
class Watching(Interval):
    """Writes down where it decides."""

    needs_grid: ClassVar[bool] = True
    seen: ClassVar[list[Step]] = []

    def update(self, state: Any, signal: Any, feedback: Any, computed: Any, step: Step) -> Any:
        self.seen.append(step)
        return super().update(state, signal, feedback, computed, step)


@pytest.mark.parametrize(("name", "grid"), [("sit", (8, 8)), ("flux", (4, 4)), ("wan21", (2, 2, 2))])
def test_gates_see_the_noise_level_and_the_grid_of_the_latents(name: str, grid: tuple[int, ...]) -> None:
    pipe = CASES[name].make()
    Watching.seen.clear()
    accelerate(pipe, FeatureCache(Watching(interval=2)))
    CASES[name](pipe, batch=1, steps=4)
    steps = Watching.seen
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.sigma for step in steps] == list(report(pipe).steps[i].sigma for i in range(4))
    assert {step.grid for step in steps} == {grid}
