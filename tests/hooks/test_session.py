"""Run, step, sigma, branch and images of every network call, and when a run begins and ends."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

import families
import tiny
from families import CASES, STEPS, Case
from flowaccel import RecipeConflictError
from flowaccel.hooks import Call, Session, close_session, open_session, session_of

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def sd3() -> Iterator[Any]:
    pipe = tiny.sd3_pipeline()
    yield pipe
    close_session(pipe)


def watched(pipe: Any) -> tuple[Session, list[Call]]:
    """A session and the calls that it sees."""
    session, calls = open_session(pipe), []
    session.on_call(lambda call_next, call: (calls.append(call), call_next())[1])
    return session, calls


def arguments(**options: Any) -> dict[str, Any]:
    return families.sd3_arguments(**options)


@ALL
def test_every_call_is_placed(case: Case) -> None:
    pipe = case.make()
    session, calls = watched(pipe)
    case(pipe, batch=2)
    run = session.run
    assert run is not None
    assert (run.begin, run.num_steps, run.images, run.steps_done) == (case.begins_at, STEPS, 2, STEPS)
    per_step = [[call for call in calls if call.step == step] for step in range(STEPS)]
    assert [tuple(call.branches for call in step) for step in per_step] == [case.branches] * STEPS
    assert {call.network for call in calls} == set(case.networks)
    assert all(call.images == 2 and call.rows == 2 * len(call.branches) for call in calls)
    grid = pipe.scheduler.timesteps.tolist()
    assert [step[0].timestep for step in per_step] == grid[case.begins_at :]
    assert all(early[0].sigma > late[0].sigma >= 0 for early, late in itertools.pairwise(per_step))


@ALL
def test_without_guidance_all_rows_are_conditional(case: Case) -> None:
    pipe = case.make()
    _, calls = watched(pipe)
    case(pipe, batch=3, guided=False)
    assert [(call.branches, call.images) for call in calls] == [(("cond",), 3)] * STEPS


@ALL
def test_the_rows_of_a_branch_hold_its_conditioning(case: Case) -> None:
    """The unconditional rows of all images are conditioned alike, the conditional rows are not."""
    pipe = case.make()
    _, calls = watched(pipe)
    case(pipe, batch=2)
    known = ("class_labels", "cap_feats", "encoder_hidden_states")
    name = next(name for name in known if name in calls[0].arguments)
    seen = {}
    for call in calls[: len(case.branches)]:
        for branch in call.branches:
            seen[branch] = call.arguments[name][call.rows_of(branch)]
    assert torch.equal(seen["uncond"][0], seen["uncond"][1])
    assert not torch.equal(seen["cond"][0], seen["cond"][1])


def test_what_is_decided_for_an_image_reaches_all_of_its_rows() -> None:
    pipe = tiny.sd3_pipeline()
    _, calls = watched(pipe)
    pipe(**arguments(batch=2))
    with pytest.raises(ValueError):
        calls[0].rows_of("extra")


def test_skip_layer_guidance_is_a_call_beyond_guidance(sd3: Any) -> None:
    _, calls = watched(sd3)
    sd3(**arguments(batch=2), skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    assert [call.branches for call in calls[1:5]] == [("uncond", "cond"), ("extra",)] * 2  # none at the first step
    assert [call.step for call in calls[1:5]] == [1, 1, 2, 2]


def test_two_images_from_the_same_noise_are_not_taken_for_guidance(sd3: Any) -> None:
    session, calls = watched(sd3)
    same = arguments(batch=2, guided=False) | {"generator": [torch.Generator().manual_seed(1) for _ in range(2)]}
    sd3(**same)
    assert torch.equal(calls[0].arguments["hidden_states"][0], calls[0].arguments["hidden_states"][1])
    assert (session.run.images, calls[0].branches) == (2, ("cond",))


def test_several_evaluations_of_one_step_count_apart() -> None:
    pipe = tiny.sd3_pipeline()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    session, calls = watched(pipe)
    pipe(**arguments(steps=4))
    assert [call.step for call in calls] == list(range(7))
    assert [call.timestep for call in calls] == pipe.scheduler.timesteps.tolist()
    assert session.run.ended


def test_sigmas_of_a_noise_predicting_model_follow_from_its_alphas() -> None:
    pipe = families.dit_pipeline()
    _, calls = watched(pipe)
    pipe(**families.dit_arguments(steps=3))
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    assert [call.sigma for call in calls] == pytest.approx(((1 - kept) / kept).sqrt().tolist(), rel=1e-5)
    pipe.scheduler = DPMSolverMultistepScheduler()
    pipe(**families.dit_arguments(steps=3))
    assert [call.sigma for call in calls[3:]] == pytest.approx(pipe.scheduler.sigmas[:3].tolist())


def test_a_unet_pipeline_is_placed_too() -> None:
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
    pipe = tiny.silent(
        StableDiffusionPipeline(
            vae=tiny.autoencoder(),
            text_encoder=None,
            tokenizer=None,
            unet=unet.eval(),
            scheduler=PNDMScheduler(skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    options = {
        "prompt_embeds": tiny.words(2, 3)["prompt_embeds"],
        "negative_prompt_embeds": tiny.words(2, 40)["prompt_embeds"],
        "num_inference_steps": 4,
        "generator": tiny.generators(3, 4),
        "output_type": "np",
    }
    expected = pipe(**options).images
    session, calls = watched(pipe)
    options["generator"] = tiny.generators(3, 4)
    assert (pipe(**options).images == expected).all()
    assert [(call.step, call.branches, call.images) for call in calls] == [(i, ("uncond", "cond"), 2) for i in range(5)]
    assert [call.timestep for call in calls] == pipe.scheduler.timesteps.tolist()  # PNDM repeats one of them
    assert session.run.ended and not session.run.failed
    assert session.families == ("unet",)


def test_state_is_gone_when_the_run_is_over(sd3: Any) -> None:
    session = open_session(sd3)
    lengths = []

    def interceptor(call_next: Any, call: Call) -> Any:
        call.run.state.setdefault("seen", []).append(call.step)
        lengths.append(len(call.run.state["seen"]))
        return call_next()

    session.on_call(interceptor)
    sd3(**arguments())
    assert session.run.state == {}
    sd3(**arguments(steps=2))
    assert lengths == [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, where) for name in ("sd3", "wan22") for where in ("network", "callback", "scheduler")]
    + [("dit", "network"), ("dit", "scheduler")],
)
def test_an_exception_ends_the_run(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = CASES[name], CASES[name].make()
    session = open_session(pipe)
    session.on_call(lambda call_next, call: (call.run.state.setdefault("cache", torch.ones(1)), call_next())[1])

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    options = case.arguments()
    if where == "callback":
        options["callback_on_step_end"] = fail
    elif where == "scheduler":
        monkeypatch.setattr(type(pipe.scheduler), "step", fail)
        close_session(pipe)
        session = open_session(pipe)
    else:
        session.on_call(lambda call_next, call: fail() if call.step == 2 else call_next())
    with pytest.raises(KeyboardInterrupt):
        pipe(**options)
    assert session.run.ended and session.run.failed
    assert session.run.state == {}


def test_interrupting_ends_the_run(sd3: Any) -> None:
    session = open_session(sd3)

    def stop(pipe: Any, step: int, *_: Any) -> dict:
        pipe._interrupt = step == 1
        return {}

    sd3(**arguments(), callback_on_step_end=stop)
    assert session.run.ended and session.run.failed
    assert session.run.steps_done == 2


def test_a_late_progress_bar_ends_only_its_own_run(sd3: Any) -> None:
    session = open_session(sd3)
    sd3.scheduler.set_timesteps(3)
    bar = sd3.progress_bar(total=3)
    first = session.run
    sd3.scheduler.set_timesteps(3)
    bar.close()
    assert first.ended
    assert not session.run.ended


def test_calls_outside_of_a_run_pass_through(sd3: Any) -> None:
    session, calls = watched(sd3)
    sd3(**arguments())
    seen = len(calls)
    sd3.transformer(**{**calls[0].arguments, "return_dict": False})
    assert len(calls) == seen
    assert len(session.run.records) == seen


def test_a_scheduler_that_is_exchanged_later_is_followed(sd3: Any) -> None:
    session, calls = watched(sd3)
    stock = sd3.scheduler
    sd3.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sd3(**arguments(steps=3))
    sd3(**arguments(steps=2))
    assert [call.step for call in calls] == [0, 1, 2, 0, 1]
    assert session.run.ended
    assert "set_timesteps" not in vars(stock)
    close_session(sd3)
    assert {"set_timesteps", "step"}.isdisjoint(vars(sd3.scheduler))


def test_a_network_that_is_exchanged_later_is_followed(sd3: Any) -> None:
    _, calls = watched(sd3)
    old, sd3.transformer = sd3.transformer, tiny.sd3_pipeline(4).transformer
    sd3(**arguments())
    assert len(calls) == STEPS
    assert "forward" not in vars(old)


def test_a_wrapper_that_a_neighbour_dropped_is_put_back(sd3: Any) -> None:
    _, calls = watched(sd3)
    del sd3.transformer.forward  # what removing somebody's older hook amounts to
    sd3(**arguments())
    assert len(calls) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("regional", [True, False])
def test_stays_outside_of_compiled_graphs(sd3: Any, regional: bool, compiled_first: bool) -> None:
    """Regional and whole-network compilation with fullgraph, before and after the session opened."""
    expected = sd3(**arguments()).images

    def compile_all() -> None:
        for block in sd3.transformer.transformer_blocks if regional else [sd3.transformer]:
            block.compile(fullgraph=True, backend="eager")

    if compiled_first:
        compile_all()
    session, calls = watched(sd3)
    if regional:
        session.on_block(lambda call_next, call, block: call_next())
    if not compiled_first:
        compile_all()
    sd3(**arguments())
    assert len(calls) == STEPS
    close_session(sd3)
    assert torch.allclose(sd3(**arguments()).images, expected, atol=1e-5)
    assert "forward" not in vars(sd3.transformer)


@pytest.mark.parametrize("how", ["compile()", "torch.compile"])
def test_blocks_of_a_network_compiled_as_a_whole_are_refused(sd3: Any, how: str) -> None:
    session = open_session(sd3)
    if how == "compile()":
        sd3.transformer.compile(backend="eager")
    else:
        sd3.transformer = torch.compile(sd3.transformer, backend="eager")
    with pytest.raises(RecipeConflictError, match=r"compiled as a whole.*compile_repeated_blocks"):
        session.on_block(lambda call_next, call, block: call_next())
        sd3(**arguments())  # under torch.compile the session sees the network that was put in only now


def test_the_network_under_torch_compile_is_found(sd3: Any) -> None:
    sd3.transformer = torch.compile(sd3.transformer, backend="eager")
    _, calls = watched(sd3)
    sd3(**arguments())
    assert len(calls) == STEPS
    assert calls[0].family.name == "sd3"


def test_a_pipeline_that_shares_the_components_is_not_seen(sd3: Any) -> None:
    other = tiny.silent(StableDiffusion3Img2ImgPipeline(**sd3.components))

    def made() -> Tensor:
        options = arguments(batch=2, steps=4) | {"image": torch.full((2, 3, 16, 16), 0.5), "strength": 0.5}
        del options["height"], options["width"]
        return other(**options).images

    expected = made()
    session, calls = watched(sd3)
    session.on_call(lambda call_next, call: (torch.zeros_like(call_next()[0]),))
    assert torch.equal(made(), expected)
    assert (session.run, calls) == (None, [])


def test_a_second_session_on_a_shared_network_is_refused(sd3: Any) -> None:
    open_session(sd3)
    other = StableDiffusion3Img2ImgPipeline(**sd3.components)
    with pytest.raises(RecipeConflictError, match=r"transformer is shared with a StableDiffusion3Pipeline.*restore"):
        open_session(other)
    assert "progress_bar" not in vars(other)
    close_session(sd3)
    open_session(other)
    close_session(other)


def test_a_copy_of_what_is_wrapped_runs_its_own_weights(sd3: Any) -> None:
    _, calls = watched(sd3)
    sd3(**arguments())
    inputs = calls[0].arguments | {"return_dict": False}
    twin, scheduler = copy.deepcopy(sd3.transformer), copy.deepcopy(sd3.scheduler)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**inputs)[0].any()
    scheduler.set_timesteps(9)
    assert len(scheduler.timesteps) == 9
    assert len(sd3.scheduler.timesteps) == STEPS


def test_a_dropped_pipeline_is_freed_and_its_network_goes_on() -> None:
    pipe = tiny.sd3_pipeline()
    _, calls = watched(pipe)
    pipe(**arguments())
    kept, gone = pipe.components, weakref.ref(pipe)
    inputs = calls[0].arguments
    del pipe
    gc.collect()
    assert gone() is None
    kept["transformer"](**inputs)
    kept["scheduler"].set_timesteps(3)
    again = StableDiffusion3Img2ImgPipeline(**kept)
    open_session(again)
    close_session(again)
    assert "forward" not in vars(kept["transformer"])


def test_session_of_says_what_to_call(sd3: Any) -> None:
    with pytest.raises(ValueError, match=r"is not accelerated; call flowaccel\.accelerate"):
        session_of(sd3)


def test_closing_leaves_nothing(sd3: Any) -> None:
    before = tiny.snapshot(sd3)
    session, _ = watched(sd3)
    session.on_block(lambda call_next, call, block: call_next())
    sd3(**arguments())
    close_session(sd3)
    sd3.scheduler.set_timesteps(1)  # what a run leaves in a scheduler is its own
    after = tiny.snapshot(sd3)
    assert after["modules"] == before["modules"]
    assert after["pipe"] == sorted({*before["pipe"]} | {key for key in after["pipe"] if key.startswith("_")})
    assert {"set_timesteps", "step"}.isdisjoint(after["scheduler vars"])
    close_session(sd3)


def test_modules_obey_those_who_surround_them_now(sd3: Any) -> None:
    session = open_session(sd3)
    seen: list[tuple[str, str]] = []

    def interceptor(name: str) -> Any:
        return lambda call_next, call, path: (seen.append((name, path)), call_next())[1]

    first = session.on_module(interceptor("first"), ("attn",))
    second = session.on_module(interceptor("second"), ("attn", "ff"))
    sd3(**arguments(steps=1))
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    assert {path for name, path in seen if name == "first"} == {f"{block}.attn" for block in blocks}
    assert {path for name, path in seen if name == "second"} > {f"{block}.ff" for block in blocks}
    assert [name for name, path in seen if path == "transformer_blocks.0.attn"] == ["second", "first"], "last outermost"
    first()
    seen.clear()
    sd3(**arguments(steps=1))
    assert {name for name, _ in seen} == {"second"}
    second()
    seen.clear()
    sd3(**arguments(steps=1))
    assert seen == []
    assert not [module for module in sd3.transformer.transformer_blocks.modules() if "forward" in vars(module)]


def test_a_narrowed_call_is_seen_further_inside_with_its_own_rows(sd3: Any) -> None:
    session, calls = watched(sd3)
    seen: list[tuple[Any, ...]] = []

    def narrow(call_next: Any, call: Call) -> Any:
        kept = torch.tensor([0, 2, 3])  # of [uncond 0, uncond 1, cond 0, cond 1]
        found = call_next(call.narrowed(kept))[0]
        whole = call_next()[0]
        seen.append((call.rows, len(found), float((found - whole[kept]).abs().max()), float(whole.abs().max())))
        return (whole,)

    session.on_call(narrow)
    sd3(**arguments(batch=2, steps=2))
    assert all((rows, part) == (4, 3) and error < 1e-5 * size for rows, part, error, size in seen) and len(seen) == 2
    narrowed, whole = calls[0], calls[1]
    assert (narrowed.rows, narrowed.row_images, list(narrowed.places)) == (3, [0, 0, 1], [0, 2, 3])
    assert (narrowed.rows_of("uncond"), narrowed.rows_of("cond")) == (slice(0, 1), slice(1, 3))
    assert narrowed.sample.shape[0] == 3
    assert (whole.rows, whole.row_images, whole.rows_of("cond")) == (4, [0, 1, 0, 1], slice(2, 4))
    assert list(narrowed.narrowed(torch.tensor([1, 2])).places) == [2, 3]


@pytest.mark.parametrize("case", ["sit", "sd3", "wan21"])
def test_a_step_observer_sees_images_and_changes_nothing(case: str) -> None:
    chosen = families.CASES[case]
    pipe = chosen.make()
    plain = chosen(pipe, batch=2)
    seen: list[tuple[int, ...]] = []
    session = open_session(pipe)
    undo = session.on_step(lambda *tensors: seen.append(tuple(len(tensor) for tensor in tensors)))
    assert torch.equal(chosen(pipe, batch=2), plain)
    assert seen == [(2, 2, 2)] * families.STEPS
    undo()
    assert torch.equal(chosen(pipe, batch=2), plain)
    assert len(seen) == families.STEPS


@pytest.mark.parametrize("case", ["sit", "sd3", "wan21"])
def test_a_step_observer_can_put_another_state_in_place(case: str) -> None:
    """The network's next call, and the next step, are at that state; it is for all branches of an image."""
    chosen = families.CASES[case]
    pipe = chosen.make()
    samples: list[Tensor] = []
    session = open_session(pipe)

    def replace(velocity: Tensor, sample: Tensor, result: Tensor) -> Tensor:
        samples.append(sample)
        return torch.full_like(result, 0.5 + len(samples))

    session.on_step(replace)
    chosen(pipe, batch=2)
    assert [float(sample.mean()) for sample in samples[1:]] == [0.5 + n for n in range(1, families.STEPS)]
