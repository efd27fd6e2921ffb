"""Recipes as names, as JSON and as objects, and the verbs that put them on a pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

import families
import tiny
from flowaccel import (
    Accelerator,
    FeatureCache,
    GuidanceSkip,
    Recipe,
    RecipeConflictError,
    Sampler,
    UnsupportedModelError,
    VelocityRefiner,
    WeightsNotFoundError,
    accelerate,
    accelerated,
    is_accelerated,
    restore,
)
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.moe.networks import upcycle_to_moe
from flowaccel.methods.policy.network import AccelerationPolicy
from flowaccel.recipe import FILE_NAME, PRESETS, SCHEMA, Base, preset, resolve
from flowaccel.samplers import FlowAdamsBashforthScheduler, FlowRungeKuttaScheduler, FlowTurboScheduler
from tiers import Process


def image(pipe: Any, steps: int = 5) -> Tensor:
    return pipe(
        3,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(1)],
        output_type="pt",
    ).images


@pytest.mark.parametrize(
    ("name", "kinds", "steps"),
    [
        ("euler", ["sampler"], None),
        ("heun@8", ["sampler"], 8),
        ("midpoint", ["sampler"], None),
        ("rk4@3", ["sampler"], 3),
        ("ab2@10", ["sampler"], 10),
        ("sde@250", ["sampler"], 250),
        ("flowturbo-H2P4R2", ["sampler", "velocity_refiner"], 8),
        ("flowturbo-H1P5R3-consistent", ["sampler", "velocity_refiner"], 9),
        ("flowturbo-H1R1-single", ["sampler", "velocity_refiner"], 2),
        ("flowturbo-H2P4", ["sampler"], 6),
        ("flowturbo-P3R0", ["sampler"], 3),
        ("flowturbo-H2P4R2@8", ["sampler", "velocity_refiner"], 8),
        ("balanced@20", ["level_cache"], 20),
    ],
)
def test_presets(name: str, kinds: list[str], steps: int | None) -> None:
    recipe = preset(name)
    assert recipe.name == name
    assert [accelerator.name for accelerator in recipe.accelerators] == kinds
    assert recipe.num_inference_steps == steps


def test_refiner_mode_of_a_preset() -> None:
    modes = {
        suffix: preset(f"flowturbo-H2P4R2{suffix}").accelerators[0].options["refiner_mode"]
        for suffix in ("", "-released", "-consistent", "-single")
    }
    assert modes == {"": "released", "-released": "released", "-consistent": "consistent", "-single": "single"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huen", "unknown recipe 'huen': did you mean 'heun'"),
        ("Euler@4", "unknown recipe 'Euler@4': did you mean 'euler'"),
        ("flowturbo", "did you mean 'flowturbo-BLOCKS'"),
        ("flowturbo-H2P4R2-consistant", "unknown recipe"),
        (
            "xyzzy",
            "unknown recipe 'xyzzy': presets are none, ab_cache, adacache, adaptive_diffusion, dbcache,",
        ),
        ("@4", "unknown recipe '@4'"),
        ("heun@", "must be a number of steps, at least 1, got 'heun@'"),
        ("heun@x", "must be a number of steps, at least 1, got 'heun@x'"),
        ("heun@-3", "must be a number of steps, at least 1, got 'heun@-3'"),
        ("heun@0", "must be a number of steps, at least 1, got 'heun@0'"),
        ("heun@²", "must be a number of steps, at least 1, got 'heun@²'"),
        ("flowturbo-X2", "blocks must look like 'H2P4R2'"),
        ("flowturbo-R2H2", "blocks must look like 'H2P4R2'"),
        ("flowturbo-R2", "put at least one H or P step first"),
        ("flowturbo-H0", "at least one step"),
        ("flowturbo-H2P4R2@9", r"asks for different numbers of steps: \[8, 9\]"),
    ],
)
def test_bad_preset_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name)


@pytest.mark.filterwarnings("ignore:nothing is calibrated", "ignore:sparse_attention does nothing here")
def test_every_preset_in_the_table_works(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    make_dynamic(pipe.transformer).save_pretrained(tmp_path / "width")
    upcycle_to_moe(pipe.transformer, {"router": "token_choice"}, "shared").save_pretrained(tmp_path / "moe")
    MediatorSiTTransformer2DModel.from_base(pipe.transformer).save_pretrained(tmp_path / "mediators")
    channels, width = pipe.transformer.config.in_channels, pipe.transformer.pos_embed.shape[-1]
    AccelerationPolicy(channels, width, width=8).save_pretrained(tmp_path / "policy")
    pipe.register_to_config(_name_or_path=str(tmp_path))  # variants look for their networks beside the components
    untouched = image(pipe)
    elsewhere = {"agent_attention"}  # not for this network: tests/methods/mediators/test_agent_attention.py
    for name in PRESETS.keys() - elsewhere:
        with accelerated(pipe, name.replace("BLOCKS", "H2P3")):
            assert torch.isfinite(image(pipe)).all()
    assert torch.equal(image(pipe), untouched)


def test_heun_preset_is_heun() -> None:
    pipe = tiny.sit_pipeline()
    untouched = image(pipe)
    with accelerated(pipe, "heun"):
        assert torch.equal(image(pipe), untouched)
    with accelerated(pipe, "euler"):
        assert isinstance(pipe.scheduler, FlowRungeKuttaScheduler)
        assert not torch.equal(image(pipe), untouched)
    with accelerated(pipe, "ab2"):
        assert isinstance(pipe.scheduler, FlowAdamsBashforthScheduler)


def test_resolve_takes_whatever_names_a_recipe(tmp_path: Path) -> None:
    sampler, refiner = Sampler("flowturbo", {"blocks": "H1R1"}), VelocityRefiner()
    recipe = Recipe([sampler, refiner], name="mine")
    recipe.save_pretrained(tmp_path)
    assert resolve(recipe) is recipe
    assert resolve(sampler) == Recipe([sampler], name="sampler")
    assert resolve([sampler, refiner]).accelerators == (sampler, refiner)
    assert resolve((sampler,)).accelerators == (sampler,)
    assert resolve([]).accelerators == ()
    for path in (tmp_path, str(tmp_path), tmp_path / FILE_NAME, str(tmp_path / FILE_NAME)):
        assert resolve(path) == recipe
    assert resolve("heun@4").num_inference_steps == 4
    several = resolve(["heun@4", sampler_free := FeatureCache("interval"), "guidance_skip"])
    assert several.accelerators == (Sampler("heun"), sampler_free, GuidanceSkip())
    assert (several.name, several.num_inference_steps) == ("heun@4+feature_cache+guidance_skip", 4)
    assert resolve("heun@4 + guidance_skip").accelerators == resolve(["heun@4", "guidance_skip"]).accelerators


@pytest.mark.parametrize("wrong", [None, 3, [Sampler("heun"), None], Sampler, {"sampler": "heun"}])
def test_resolve_refuses_the_rest(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match="recipe must be a Recipe, an accelerator, a list of them, a preset name, a path"
    ):
        resolve(wrong)


def test_a_network_is_no_recipe() -> None:
    with pytest.raises(TypeError, match="got the network Linear; put it in its accelerator"):
        resolve(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe([Sampler("rk4", {"shift": 3.0})], name="shifted", num_inference_steps=6),
        Recipe([Sampler("sde", {"last_step_size": 0.1})]),
        preset("flowturbo-H2P4R2-single"),
        preset("safe"),
        Recipe([Sampler("flowturbo", {"blocks": "H1R1"}), VelocityRefiner()], name="based", base=Base("Net", "0123")),
    ],
    ids=lambda recipe: recipe.name,
)
def test_json_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save_pretrained(tmp_path)
    data = json.loads((tmp_path / FILE_NAME).read_text())
    assert data == recipe.to_dict()
    assert data["schema"] == SCHEMA
    assert Recipe.from_pretrained(tmp_path) == recipe
    assert Recipe.from_pretrained(tmp_path / FILE_NAME) == recipe


def test_name_of_a_file_without_one(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({"schema": SCHEMA, "accelerators": []}))
    recipe = Recipe.from_pretrained(tmp_path)
    assert recipe.name == tmp_path.name
    assert recipe.num_inference_steps is None


def test_learned_parts_travel_with_the_recipe(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    refiner = tiny.random_refiner(pipe.transformer)
    recipe = tiny.flowturbo(refiner)
    recipe.save_pretrained(tmp_path / "recipe")
    assert sorted(path.name for path in (tmp_path / "recipe").rglob("*.*")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        FILE_NAME,
    ]
    with accelerated(pipe, recipe):
        expected = image(pipe)
    moved = (tmp_path / "recipe").rename(tmp_path / "moved")  # the path in the file is relative
    with accelerated(pipe, moved):
        assert torch.equal(expected, image(pipe))


FRESH = """
import sys, torch
import flowaccel
from flowaccel.pipelines import load_pipeline
pipe = load_pipeline(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
flowaccel.accelerate(pipe, sys.argv[2])
generator = [torch.Generator().manual_seed(1)]
found = pipe(3, num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="pt").images
torch.save(found, sys.argv[3])
"""


def test_a_fresh_process_makes_the_same_image(tmp_path: Path, process: Process) -> None:
    pipe = tiny.sit_pipeline()
    pipe.save_pretrained(tmp_path / "pipe")
    recipe = tiny.flowturbo(tiny.random_refiner(pipe.transformer))
    recipe.save_pretrained(tmp_path / "recipe")
    with accelerated(pipe, recipe):
        expected = image(pipe)
    arguments = [str(tmp_path / name) for name in ("pipe", "recipe", "image.pt")]
    process("-c", FRESH, *arguments, cwd=tmp_path)
    found = torch.load(arguments[-1], weights_only=True)
    assert torch.allclose(
        expected, found, rtol=0, atol=1e-6
    )  # what other tests set in this process can round otherwise
    assert not torch.allclose(expected, image(pipe), rtol=0, atol=1e-3)


def written(folder: Path, data: Any) -> Path:
    path = folder / FILE_NAME
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def entry(**fields: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "name": "x", "num_inference_steps": None, "accelerators": [fields]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not a recipe: JSONDecodeError"),
        ("", "is not a recipe: JSONDecodeError"),
        ("[" * 100_000, "is not a recipe: RecursionError"),
        ([], r"is not a recipe: it holds '\[\]', not an object"),
        (3, "is not a recipe: it holds '3', not an object"),
        ({}, "not a recipe: schema must be 1, got None"),
        ({"schema": "1", "accelerators": []}, "not a recipe: schema must be 1, got '1'"),
        ({"schema": True, "accelerators": []}, "not a recipe: schema must be 1, got True"),
        (
            {"schema": SCHEMA + 1, "steps": [], "accelerators": {}},
            rf"written by a newer flowaccel \(recipe schema {SCHEMA + 1}; this one reads up to {SCHEMA}\); upgrade",
        ),
        ({"schema": SCHEMA}, "accelerators: must be a list, got None"),
        ({"schema": SCHEMA, "accelerators": {}}, "accelerators: must be a list, got {}"),
        (
            {"schema": SCHEMA, "acelerators": []},
            r"flowaccel\.json: acelerators: unknown; did you mean 'accelerators'\? allowed: schema, name, num_inf",
        ),
        ({"schema": SCHEMA, "accelerators": [], "num_inference_steps": "4"}, "num_inference_steps must be .*, got '4'"),
        ({"schema": SCHEMA, "accelerators": [], "num_inference_steps": 0}, "num_inference_steps must be .*, got 0"),
        ({"schema": SCHEMA, "accelerators": [], "name": 3}, "name must be text, got 3"),
        ({"schema": SCHEMA, "accelerators": [], "base": "SiT"}, "base: must look like .*, got 'SiT'"),
        ({"schema": SCHEMA, "accelerators": [], "base": {"class": "SiT"}}, 'base: must hold "class" and "config"'),
        (
            {"schema": SCHEMA, "accelerators": [], "base": {"clas": "SiT", "config": "0"}},
            r"base\.clas: unknown; did you mean 'class'\? allowed: class, config",
        ),
        ({"schema": SCHEMA, "accelerators": ["heun"]}, r"accelerators\[0\]: must look like .*, got 'heun'"),
        (
            entry(name="velocity_refinr"),
            r"accelerators\[0\]\.name: unknown 'velocity_refinr'; did you mean 'velocity_refiner'\? allowed: ",
        ),
        (entry(sampler="heun"), r"accelerators\[0\]: must look like"),
        (entry(name=["sampler"]), r"accelerators\[0\]: must look like"),
        (entry(name="sampler", sampler="huen"), r"accelerators\[0\]: sampler must be one of .*, got 'huen'"),
        (entry(name="sampler", sampler=["heun"]), r"accelerators\[0\]: sampler must be one of .*, got \['heun'\]"),
        (
            entry(name="sampler", sampler="heun", option={}),
            r"accelerators\[0\]\.option: unknown; did you mean 'options'\? allowed: name, sampler, options, cal\w+$",
        ),
        (entry(name="sampler", options={"bloks": "H1"}), "options of sampler 'flowturbo': .*unexpected.*'bloks'"),
        (entry(name="sampler", options={"blocks": 3}), "options of sampler 'flowturbo'"),
        (entry(name="sampler", options=None), "options of sampler 'flowturbo'"),
        (entry(name="velocity_refiner", refinr="x"), r"accelerators\[0\]\.refinr: unknown; did you mean 'refiner'"),
        (entry(name="velocity_refiner", refiner=3), r"accelerators\[0\]\.refiner: must be the name of a folder beside"),
    ],
)
def test_bad_file_says_what_is_wrong(data: Any, message: str, tmp_path: Path) -> None:
    written(tmp_path, data)
    with pytest.raises(ValueError, match=message):
        Recipe.from_pretrained(tmp_path)


def test_binary_file_is_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is not a recipe: UnicodeDecodeError"):
        Recipe.from_pretrained(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.json"):
        with pytest.raises(FileNotFoundError, match="no recipe at"):
            Recipe.from_pretrained(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe([Sampler("heun"), Sampler("euler")]), "holds 'sampler' twice: one of a kind works at a time"),
        (lambda: Recipe([VelocityRefiner(), VelocityRefiner()]), "holds 'velocity_refiner' twice"),
        (
            lambda: Recipe([Sampler("flowturbo", {"blocks": "H2"})], name="two", num_inference_steps=3),
            r"recipe 'two' asks for different numbers of steps: \[2, 3\] \(the recipe for 3, 'sampler' for 2\)",
        ),
    ],
)
def test_conflicts(make: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(RecipeConflictError, match=message):
        make()


@pytest.mark.parametrize("steps", [0, -1, 2.5, "4", True])
def test_number_of_steps_is_checked(steps: Any) -> None:
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number of at least 1, or None"):
        Recipe([Sampler("heun")], num_inference_steps=steps)


def test_recipes_are_frozen() -> None:
    recipe = Recipe([Sampler("heun")])
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"
    assert isinstance(recipe.accelerators, tuple)


def test_loaded_needs_no_disk(tmp_path: Path) -> None:
    tiny.save_sit_pipeline(tmp_path / "pipe")
    pipe = tiny.sit_pipeline()
    recipe = Recipe(
        [Sampler("flowturbo", {"blocks": "H1P2R2"}), VelocityRefiner(tmp_path / "pipe" / "refiner")], "mine"
    )
    assert recipe.networks == {}
    loaded = recipe.loaded(pipe)
    assert list(loaded.networks) == ["refiner"]
    assert (loaded.name, loaded.num_inference_steps) == ("mine", 5)
    with accelerated(pipe, recipe):
        expected = image(pipe)
    (tmp_path / "pipe").rename(tmp_path / "gone")
    with accelerated(pipe, loaded):
        assert torch.equal(expected, image(pipe))
    with pytest.raises(WeightsNotFoundError, match="no refiner in"):
        recipe.loaded(pipe)


def test_accelerate_twice_is_refused() -> None:
    pipe = tiny.sit_pipeline()
    assert accelerate(pipe, "euler") is pipe
    scheduler = pipe.scheduler
    with pytest.raises(RecipeConflictError, match=r"accelerated already; call flowaccel\.restore\(pipe\) first"):
        accelerate(pipe, "heun")
    assert pipe.scheduler is scheduler
    restore(pipe)
    accelerate(pipe, "heun")


def test_restore_is_idempotent() -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    assert restore(pipe) is pipe
    assert tiny.snapshot(pipe) == state
    accelerate(pipe, tiny.flowturbo(tiny.random_refiner(pipe.transformer)))
    restore(pipe)
    restore(pipe)
    assert tiny.snapshot(pipe) == state


def test_empty_recipe_changes_nothing() -> None:
    pipe = tiny.sit_pipeline()
    untouched, state = image(pipe), tiny.snapshot(pipe)
    with accelerated(pipe, Recipe()):
        assert is_accelerated(pipe)
        assert torch.equal(image(pipe), untouched)
    assert tiny.snapshot(pipe) == state


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_accelerated_restores_after_an_exception(exception: type[BaseException]) -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    with pytest.raises(exception), accelerated(pipe, "flowturbo-H2P2") as inside:
        assert inside is pipe
        raise exception
    assert tiny.snapshot(pipe) == state


def test_accelerated_restores_what_its_body_restored() -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    with accelerated(pipe, "euler"):
        restore(pipe)
    assert tiny.snapshot(pipe) == state


class Refusal(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Refusing(Accelerator):
    """Fails when it is attached, after looking at what the others did."""

    name: ClassVar[str] = "refusing"
    seen: list[Any] = dataclasses.field(default_factory=list)

    def attach(self, pipe: Any) -> Any:
        self.seen.append((type(pipe.scheduler), "forward" in vars(pipe.transformer)))
        raise Refusal


def test_a_failing_accelerator_detaches_those_before_it() -> None:
    pipe = tiny.sit_pipeline()
    untouched, state = image(pipe), tiny.snapshot(pipe)
    refusing = Refusing()
    with pytest.raises(Refusal):
        accelerate(pipe, [*tiny.flowturbo(tiny.random_refiner(pipe.transformer)).accelerators, refusing])
    assert refusing.seen == [(FlowTurboScheduler, True)]
    assert not is_accelerated(pipe)
    assert tiny.snapshot(pipe) == state
    assert torch.equal(image(pipe), untouched)


def test_a_bad_recipe_touches_nothing(tmp_path: Path) -> None:
    pipe = tiny.sit_pipeline()
    state = tiny.snapshot(pipe)
    for wrong in ("huen", tmp_path / "nowhere", 3):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)):
            accelerate(pipe, wrong)
    assert tiny.snapshot(pipe) == state


def test_sampler_keeps_the_time_shift() -> None:
    pipe = tiny.sd3_pipeline()
    accelerate(pipe, "ab2")
    assert pipe.scheduler.config.shift == 3.0
    restore(pipe)
    with accelerated(pipe, Sampler("ab2", {"shift": 5.0})):
        assert pipe.scheduler.config.shift == 5.0
    video = families.wan_pipeline()
    accelerate(video, "ab2")
    assert video.scheduler.config.shift == 3.0  # UniPC calls it flow_shift


def test_sampler_refuses_a_pipeline_with_timesteps_of_its_own() -> None:
    pipe = families.cogview4_pipeline()
    state = tiny.snapshot(pipe)
    with pytest.raises(UnsupportedModelError, match=r"scheduler of a CogView4Pipeline, which shows its network other"):
        accelerate(pipe, "heun")
    assert tiny.snapshot(pipe) == state


def test_sampler_refuses_a_schedule_it_does_not_have() -> None:
    pipe = tiny.sd3_pipeline()
    pipe.scheduler = type(pipe.scheduler)(shift=3.0, use_karras_sigmas=True, invert_sigmas=True)
    state = tiny.snapshot(pipe)
    with pytest.raises(ValueError, match=r"cannot stand in for a FlowMatchEuler.* has invert_sigmas, use_karras_"):
        accelerate(pipe, "heun")
    assert tiny.snapshot(pipe) == state


def test_sampler_refuses_a_scheduler_that_is_no_flow() -> None:
    pipe = tiny.sit_pipeline()
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler(prediction_type="v_prediction")):
        pipe.scheduler = scheduler
        state = tiny.snapshot(pipe)
        with pytest.raises(UnsupportedModelError, match=f"works on flow models, .* a {type(scheduler).__name__} with"):
            accelerate(pipe, "heun")
        assert tiny.snapshot(pipe) == state
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    accelerate(pipe, "heun")


# joined by +


def test_presets_are_joined_in_their_order() -> None:
    found = resolve("ab2@12+ab_cache:interval=3+guidance_skip:threshold=0.99")
    kinds = [type(part).__name__ for part in found.accelerators]
    assert kinds == ["Sampler", "FeatureCache", "GuidanceSkip"]
    assert (found.num_inference_steps, found.name) == (12, "ab2@12+ab_cache:interval=3+guidance_skip:threshold=0.99")
    assert resolve("fbcache:threshold=1e+9").accelerators == resolve("fbcache:threshold=1000000000").accelerators


def test_saved_recipes_are_joined_too(tmp_path: Path) -> None:
    resolve("heun@5").save_pretrained(tmp_path / "mine")
    found = resolve(f"{tmp_path / 'mine'} + guidance_interval")
    assert [part.name for part in found.accelerators] == ["sampler", "guidance_skip"]
    assert found.num_inference_steps == 5


def test_joining_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"different numbers of steps: \[8, 12\]"):
        resolve("heun@8+ab_cache@12")
    with pytest.raises(RecipeConflictError, match="one of a kind works at a time"):
        resolve("ab_cache+fbcache")
    with pytest.raises(ValueError, match="unknown recipe 'guidance_skp'"):
        resolve("ab_cache+guidance_skp")


def test_samplers_take_options() -> None:
    found = resolve("euler:shift=3@6")
    assert found.accelerators == (Sampler("euler", {"shift": 3}),)
    assert found.num_inference_steps == 6
    assert resolve("ab2:grid=[1.0,0.5,0.0]").num_inference_steps == 2
    with pytest.raises(ValueError, match="unexpected keyword argument 'shifts'"):
        resolve("heun:shifts=3")
