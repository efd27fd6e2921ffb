"""The promises of learned policies and of sparse attention, on the stock loops of SiT, SD3 and FLUX."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, attention_backend
from safetensors.torch import load_file
from torch import Tensor

import tiny
from families import CASES, Case, assert_close
from flowaccel import (
    AgentAttention,
    FeatureCache,
    GuidanceSkip,
    LearnedPolicy,
    Mediators,
    RecipeConflictError,
    SparseAttention,
    UnsupportedModelError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.evaluation.timing.cost import CallCounter
from flowaccel.hooks import Call, CallRecord, networks, session_of
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel
from flowaccel.methods.policy import runtime
from flowaccel.methods.policy.network import CACHE, STEP
from flowaccel.methods.policy.policy_decisions import ScriptSource
from flowaccel.methods.sparse_attention.accelerator import attentions
from neighbours import NEIGHBOURS, load_lora, unload_lora
from policies import FAMILIES, SMALL_BLOCKS, decided_by, image_paths, lively, pipeline, policy_for, sparsity
from tiers import Process

STEPS, BATCH = 12, 3
SMALL: dict[str, Any] = {"dense_blocks": 0, "min_tokens": 8, "query_block": 8, "key_block": 4}
CASE = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
KINDS: dict[str, Callable[[Case], Any]] = {
    "policy": lambda case: LearnedPolicy(lively(case)),
    "sparse": lambda case: SparseAttention(keep=0.5, **SMALL),
}
KIND = pytest.mark.parametrize("kind", KINDS)
MOST = pytest.mark.parametrize(
    ("case", "kind"),
    [*((case, "policy") for case in FAMILIES), (CASES["flux"], "sparse")],
    ids=lambda value: getattr(value, "name", value),
)
"""A policy's sparse head works as `SparseAttention` does."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SparseAttention", SMALL_BLOCKS)


def switch_on(case: Case, pipe: Any, kind: str) -> None:
    accelerate(pipe, KINDS[kind](case))


def images(case: Case, pipe: Any, **options: Any) -> Tensor:
    return case(pipe, **{"batch": BATCH, "steps": STEPS, **options})


def called(case: Case, pipe: Any, callback: Any = None, **options: Any) -> Tensor:
    arguments = case.arguments(**{"batch": BATCH, "steps": STEPS, **options})
    return torch.as_tensor(pipe(**arguments, callback_on_step_end=callback).images)


def decisions(pipe: Any) -> tuple[Any, Any]:
    """Of the last run: where every image went, and how sparse attention was at every call."""
    found = report(pipe)
    return image_paths(found), [(levels(call), *sparsity(call)) for call in found.calls]


def levels(call: CallRecord) -> tuple[int, ...]:
    stats = call.stats.get("learned_policy")
    return () if stats is None else stats.sparsity


@functools.cache
def untouched(name: str, seed: int = 0) -> Tensor:
    return images(CASES[name], pipeline(CASES[name], seed))


@functools.cache
def fresh(name: str, kind: str, seed: int = 0) -> tuple[Tensor, Any]:
    """What is made on a pipeline that never ran before."""
    case = CASES[name]
    pipe = pipeline(case, seed)
    switch_on(case, pipe, kind)
    return images(case, pipe), decisions(pipe)


def assert_fresh(case: Case, pipe: Any, kind: str, seed: int = 0) -> None:
    expected, taken = fresh(case.name, kind, seed)
    assert torch.equal(images(case, pipe), expected)
    assert decisions(pipe) == taken


@CASE
def test_what_this_file_switches_on_does_something(case: Case) -> None:
    """Images take paths of their own, some steps are reused, some attention is sparse; one is done sooner."""
    pipe = pipeline(case)
    switch_on(case, pipe, "policy")
    assert_fresh(case, pipe, "policy")
    made, (paths, calls), runs = *fresh(case.name, "policy"), report(pipe).calls
    assert len(set(map(len, paths))) > 1
    assert {ran for path in paths for _, ran, _ in path} == {True, False}
    assert {level for per_image, *_ in calls for level in per_image} == {0, 1, 2}
    assert any(done < full for *_, done, full in calls)
    assert all(ran or not level for run in runs for ran, level in zip(run.computed, levels(run), strict=True))
    assert not torch.allclose(made, untouched(case.name), atol=1e-4)
    made, (_, calls) = fresh(case.name, "sparse")
    assert all(done < full for *_, done, full in calls)
    assert not torch.allclose(made, untouched(case.name), atol=1e-4)


@CASE
@KIND
def test_switching_off_restores_everything(case: Case, kind: str) -> None:
    pipe = pipeline(case)
    images(case, pipe)  # what a run itself leaves behind
    before = tiny.snapshot(pipe)
    switch_on(case, pipe, kind)
    assert_fresh(case, pipe, kind)
    restore(pipe)
    assert tiny.snapshot(pipe) == before
    assert torch.equal(images(case, pipe), untouched(case.name))


# -- 1, 2: beside offloading and adapters


@pytest.mark.slow
@MOST
@pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("order", ["accelerated first", "neighbour first"])
def test_beside_offloading_in_both_orders(case: Case, kind: str, neighbour: Any, order: str) -> None:
    pipe, undo = pipeline(case), None
    if order == "neighbour first":
        undo = neighbour(pipe)
    switch_on(case, pipe, kind)
    if undo is None:
        undo = neighbour(pipe)
    assert_fresh(case, pipe, kind)
    assert_fresh(case, pipe, kind)  # offloading of whole models is put on anew after a call
    restore(pipe)
    assert torch.equal(images(case, pipe), untouched(case.name))
    undo()
    assert torch.equal(images(case, pipe), untouched(case.name))


@MOST
@pytest.mark.parametrize("order", ["LoRA first", "accelerated first"])
def test_lora_can_come_and_go(case: Case, kind: str, order: str) -> None:
    plain, reference, pipe = (pipeline(case) for _ in range(3))
    load_lora(plain)
    load_lora(reference)
    switch_on(case, reference, kind)
    expected = images(case, reference)
    assert not torch.allclose(expected, fresh(case.name, kind)[0], atol=1e-4)
    steps = [load_lora, lambda which: switch_on(case, which, kind)]
    for step in steps if order == "LoRA first" else reversed(steps):
        step(pipe)
    assert torch.equal(images(case, pipe), expected)
    unload_lora(pipe)
    assert_fresh(case, pipe, kind)
    load_lora(pipe)
    assert torch.equal(images(case, pipe), expected)
    restore(pipe)
    assert torch.equal(images(case, pipe), images(case, plain))
    unload_lora(pipe)
    assert torch.equal(images(case, pipe), untouched(case.name))


# -- 3: runs that end early


@pytest.mark.slow
@CASE
@KIND
def test_a_run_after_an_aborted_one_is_as_fresh(case: Case, kind: str) -> None:
    def in_callback(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return values

    def in_network(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 2:
            raise KeyboardInterrupt
        return call_next()

    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    for callback, interceptor in ((in_callback, lambda call_next, call: call_next()), (None, in_network)):
        remove = session_of(pipe).on_call(interceptor)
        with pytest.raises(KeyboardInterrupt):
            called(case, pipe, callback)
        remove()
        assert report(pipe).failed and session_of(pipe).run.state == {}
        assert not pipe._interrupt
        assert_fresh(case, pipe, kind)
        assert not pipe._interrupt and not report(pipe).failed


@pytest.mark.slow
@CASE
@KIND
def test_a_run_after_one_that_the_user_interrupted_is_as_fresh(case: Case, kind: str) -> None:
    def interrupt(pipe: Any, step: int, timestep: Any, values: Any) -> Any:
        pipe._interrupt = step == 2
        return values

    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    called(case, pipe, interrupt)
    assert report(pipe).failed and len(report(pipe).steps) == 3
    assert session_of(pipe).run.state == {}
    assert pipe._interrupt, "which is the user's own, as without us"
    assert_fresh(case, pipe, kind)
    assert not pipe._interrupt
    restore(pipe)
    assert torch.equal(images(case, pipe), untouched(case.name))


@CASE
@KIND
def test_another_number_of_steps_or_images_starts_afresh(case: Case, kind: str) -> None:
    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    assert_fresh(case, pipe, kind)
    images(case, pipe, batch=1, steps=5)
    assert_fresh(case, pipe, kind)


# -- 4: several pipelines


@pytest.mark.slow
@CASE
@KIND
def test_pipelines_that_take_turns_do_not_mix(case: Case, kind: str) -> None:
    """Of two runs the second happens in the middle of the first."""
    pipes, inner = [pipeline(case, seed) for seed in (0, 1)], []
    for pipe in pipes:
        switch_on(case, pipe, kind)

    def nested(call_next: Callable[..., Any], call: Call) -> Any:
        if call.step == 3 and "cond" in call.branches:
            inner.append((images(case, pipes[1]), decisions(pipes[1])))
        return call_next()

    remove = session_of(pipes[0]).on_call(nested)
    assert_fresh(case, pipes[0], kind)
    remove()
    expected, taken = fresh(case.name, kind, 1)
    assert torch.equal(inner[0][0], expected) and inner[0][1] == taken
    restore(pipes[0])
    assert torch.equal(images(case, pipes[0]), untouched(case.name))
    assert_fresh(case, pipes[1], kind, 1)


@pytest.mark.slow
@CASE
@KIND
def test_a_pipeline_that_shares_the_network_of_an_accelerated_one_is_untouched(case: Case, kind: str) -> None:
    pipe = pipeline(case)
    own = {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    other = tiny.silent(type(pipe)(**{**pipe.components, **own}))
    switch_on(case, pipe, kind)
    for _ in range(2):
        assert_fresh(case, pipe, kind)
        assert torch.equal(images(case, other), untouched(case.name))
    with pytest.raises(RecipeConflictError, match="transformer is shared with a"):
        switch_on(case, other, kind)
    restore(pipe)
    switch_on(case, other, kind)
    assert_fresh(case, other, kind)
    assert torch.equal(images(case, pipe), untouched(case.name))


def test_two_pipelines_share_a_policy() -> None:
    case = CASES["sit"]
    pipes = [pipeline(case), pipeline(case)]
    policy = lively(case)
    for pipe in pipes:
        accelerate(pipe, LearnedPolicy(policy))
    restore(pipes[0])
    assert_fresh(case, pipes[1], "policy")
    assert torch.equal(images(case, pipes[0]), untouched("sit"))


# -- 5: save, load in a fresh process

LOADED = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from safetensors.torch import save_file
from flowaccel.methods.policy import runtime
from flowaccel.pipelines import AcceleratedPipeline
from policies import FAMILIES, SMALL_BLOCKS, pipeline
from test_conformance_policies import KINDS, decisions, images

runtime.SparseAttention = SMALL_BLOCKS
folder, found, taken = Path({folder!r}), {{}}, {{}}
for case in FAMILIES:
    for kind in KINDS:
        absent = {{part: None for part, value in pipeline(case).components.items() if value is None}}
        pipe = AcceleratedPipeline.from_pretrained(folder / case.name / kind, **absent)
        pipe.set_progress_bar_config(disable=True)
        found[case.name + kind], taken[case.name + kind] = images(case, pipe).contiguous(), repr(decisions(pipe))
save_file(found, folder / "found.safetensors")
(folder / "taken.json").write_text(json.dumps(taken))
"""


def test_a_fresh_process_decides_and_makes_the_same(tmp_path: Path, process: Process) -> None:
    expected, taken = {}, {}
    for case in FAMILIES:
        for kind in KINDS:
            pipe = pipeline(case)
            switch_on(case, pipe, kind)
            pipe.save_pretrained(tmp_path / case.name / kind)
            expected[case.name + kind], found = fresh(case.name, kind)
            taken[case.name + kind] = repr(found)
    here = Path(__file__).parent
    script = LOADED.format(tests=str(here.parent), here=str(here), folder=str(tmp_path))
    process("-c", script)
    there = load_file(tmp_path / "found.safetensors")
    assert {name for name in expected if not torch.equal(there[name], expected[name])} == set()
    assert json.loads((tmp_path / "taken.json").read_text()) == taken


# -- 6: images of a prompt, and guidance


@KIND
def test_several_images_of_a_prompt_are_as_of_several_prompts(kind: str) -> None:
    case = CASES["sd3"]
    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    arguments, single = case.arguments(batch=BATCH, steps=STEPS), case.arguments(batch=1, steps=STEPS)
    texts = [name for name in arguments if name.endswith("_embeds")]
    repeated = arguments | {name: single[name].repeat_interleave(BATCH, 0) for name in texts}
    expected, taken = pipe(**repeated).images, decisions(pipe)
    generators, encode = tiny.generators(*range(3, 3 + BATCH)), pipe.encode_prompt

    def encode_repeated(*args: Any, num_images_per_prompt: int, **kwargs: Any) -> Any:
        """What diffusers does with the texts of prompts, and not with embeddings that it is given."""
        return tuple(text.repeat_interleave(num_images_per_prompt, 0) for text in encode(*args, **kwargs))

    pipe.encode_prompt = encode_repeated
    found = pipe(**{**single, "generator": generators}, num_images_per_prompt=BATCH).images
    assert torch.equal(found, expected)
    assert decisions(pipe) == taken


@CASE
@KIND
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
def test_an_image_is_what_it_is_alone(case: Case, kind: str, guided: bool) -> None:
    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    together, (paths, _) = images(case, pipe, guided=guided), decisions(pipe)
    for image in range(BATCH):
        assert_close(images(case, pipe, batch=1, seed=3 + image, guided=guided), together[image : image + 1])
        assert image_paths(report(pipe)) == paths[image : image + 1]


GUIDANCE = {"interval": {"stop": 0.25}, "adaptive": {"threshold": 0.97}}


@CASE
@pytest.mark.parametrize("when", GUIDANCE)
def test_guidance_ends_after_a_policy(case: Case, when: str) -> None:
    """Per image, as if it were alone, and the rows of images that are not guided do not run."""
    pipe = pipeline(case)
    policy = LearnedPolicy(policy_for(pipe), levels=(STEP,))
    skip = GuidanceSkip(when, mode="hold", **GUIDANCE[when])
    with CallCounter(networks(pipe)) as all_rows, accelerated(pipe, policy):
        images(case, pipe)
        whole, steps = report(pipe).macs, sum(map(len, image_paths(report(pipe))))
    with CallCounter(networks(pipe)) as counter:
        accelerate(pipe, [policy, skip])
        together, found = images(case, pipe), report(pipe)
    guided = [step.guided for step in found.steps]
    assert 0 < sum(map(sum, guided)) < sum(map(len, guided))
    assert sum(counter.rows.values()) < sum(all_rows.rows.values())
    assert found.macs / sum(map(len, image_paths(found))) < whole / steps
    for image in range(BATCH):
        assert_close(images(case, pipe, batch=1, seed=3 + image), together[image : image + 1])
        alone = report(pipe)
        assert image_paths(alone) == image_paths(found)[image : image + 1]
        steps = len(image_paths(alone)[0])
        assert [step.guided[0] for step in alone.steps][:steps] == [flags[image] for flags in guided][:steps]


@pytest.mark.parametrize("options", [{"mode": "extrapolate"}, {"space": "x0"}], ids=["mode", "space"])
def test_guidance_that_reckons_with_the_time_of_a_call_is_refused_where_images_have_their_own(
    options: dict[str, Any],
) -> None:
    pipe = pipeline(CASES["sit"])
    policy = policy_for(pipe)
    with pytest.raises(RecipeConflictError, match="mode='hold' and space='v'"):
        accelerate(pipe, [LearnedPolicy(policy), GuidanceSkip(**options)])
    assert torch.equal(images(CASES["sit"], pipe), untouched("sit"))
    accelerate(pipe, [LearnedPolicy(policy, levels=(CACHE,)), GuidanceSkip(**options)])
    images(CASES["sit"], pipe)


# -- 7: pipelines that cannot be interrupted


@contextmanager
def deaf(pipe: Any, attribute: bool) -> Iterator[None]:
    """A subclass whose loop goes on whatever happens; with `_interrupt`, or without."""

    class Deaf(type(pipe)):
        interrupt = False

    kind, pipe.__class__ = type(pipe), Deaf
    if not attribute:
        del pipe.__dict__["_interrupt"]
        Deaf._interrupt = property(_nothing, lambda pipe, value: None)
        assert not hasattr(pipe, "_interrupt")
    try:
        yield
    finally:
        pipe.__class__ = kind


def _nothing(pipe: Any) -> Any:
    raise AttributeError


@pytest.mark.slow
@CASE
@pytest.mark.parametrize("attribute", [True, False], ids=["unheard", "without"])
def test_where_nothing_can_be_interrupted_finished_images_idle(case: Case, attribute: bool) -> None:
    pipe, steps = pipeline(case), 40
    policy = LearnedPolicy(lively(case, max_steps=None), levels=(STEP, CACHE))
    with accelerated(pipe, policy):
        expected, taken = images(case, pipe, steps=steps), report(pipe)
        assert not pipe._interrupt, "ours, and taken back"
    assert len(taken.steps) < steps, "it was interrupted"
    with deaf(pipe, attribute), accelerated(pipe, policy):
        assert torch.equal(images(case, pipe, steps=steps), expected)
        found = report(pipe)
    assert image_paths(found) == image_paths(taken)
    assert len(found.steps) == steps and not found.failed
    idle = [call for call in found.calls if call.step >= len(taken.steps)]
    assert {call.what for call in idle} == {"reused"}
    assert {time for call in idle for time in call.times} == {None}


# -- 8: callbacks see and change the state


@CASE
def test_a_callback_that_changes_the_state_does_what_it_does_untouched(case: Case) -> None:
    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return {"latents": values["latents"] * 0.9 + 0.01}

    pipe, seen = pipeline(case), []
    expected, before = called(case, pipe, change), list(seen)
    table = [*pipe.scheduler.sigmas.tolist()[1:STEPS], 0.0]
    seen.clear()
    with decided_by(pipe, ScriptSource(levels=[table]), policy_for(pipe, max_steps=None)):
        assert torch.equal(called(case, pipe, change, steps=STEPS + 4), expected)
    assert len(seen) == STEPS and all(torch.equal(*pair) for pair in zip(seen, before, strict=True))


@CASE
@KIND
def test_a_callback_changes_the_image_that_it_changes(case: Case, kind: str) -> None:
    """What the heads see of one image is its changed state, and nothing of that reaches the others."""

    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents = values["latents"].clone()
        latents[1] *= 0.5 if step == 1 else 1.0
        return {"latents": latents}

    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    plain, taken = fresh(case.name, kind)
    found = called(case, pipe, change)
    assert_close(found[::2], plain[::2])
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    assert decisions(pipe)[0][::2] == taken[0][::2]
    assert kind == "sparse" or decisions(pipe)[0][1] != taken[0][1]


# -- 9: the attention backend


@CASE
def test_a_backend_chosen_later_computes_full_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(case)
    stock = [layer.processor for layer in attentions(pipe.transformer).values()]
    has_choice = hasattr(stock[0], "_attention_backend")
    assert has_choice == (case.name != "sd3"), "SD3's processor calls torch itself"
    with attention_backend("native"), accelerated(pipe, SparseAttention(keep=0.5, dense_steps=0.5, **SMALL)):
        images(case, pipe)
        pipe.transformer.set_attention_backend("_native_math")
        chosen = [getattr(processor, "_attention_backend", None) for processor in stock]
        assert chosen == ["_native_math" if has_choice else None] * len(stock)
        images(case, pipe)
        pipe.transformer.reset_attention_backend()
        assert {getattr(processor, "_attention_backend", None) for processor in stock} == {None}
    assert [layer.processor for layer in attentions(pipe.transformer).values()] == stock
    assert all(hasattr(processor, "_attention_backend") == has_choice for processor in stock)


# -- 10: together with others


@CASE
@pytest.mark.parametrize("scope", ["stack", "output", "module"])
def test_sparse_attention_with_a_cache(case: Case, scope: str) -> None:
    """Sparse where it computes; an image is what it is alone, and in any order of the two."""
    pipe = pipeline(case)
    parts = [SparseAttention(keep=0.5, **SMALL), FeatureCache(gate="interval", interval=3, scope=scope)]
    with accelerated(pipe, parts):
        together = images(case, pipe)
        calls = report(pipe).calls
        assert {(call.what, bool(sparsity(call)[0])) for call in calls} == {("computed", True), ("reused", False)}
        for image in range(BATCH):
            assert_close(images(case, pipe, batch=1, seed=3 + image), together[image : image + 1])
    with accelerated(pipe, parts[::-1]):
        assert torch.equal(images(case, pipe), together)
    with accelerated(pipe, parts[1]):
        assert not torch.allclose(images(case, pipe), together, atol=1e-4)


@CASE
def test_sparse_attention_with_a_policy(case: Case) -> None:
    """Who has a sparse head of its own is refused, and nothing changes; who has none is not."""
    pipe = pipeline(case)
    policy, sparse = lively(case), SparseAttention(keep=0.5, **SMALL)
    before = tiny.snapshot(pipe)
    for parts in ([LearnedPolicy(policy), sparse], [sparse, LearnedPolicy(policy)]):
        with pytest.raises(RecipeConflictError, match="both set how sparse attention is"):
            accelerate(pipe, parts)
        assert tiny.snapshot(pipe) == before
    without = LearnedPolicy(policy, levels=(STEP, CACHE))
    with accelerated(pipe, [without, sparse]):
        together, taken = images(case, pipe), report(pipe)
        assert any(sparsity(call)[0] for call in taken.calls)
        for image in range(BATCH):
            assert_close(images(case, pipe, batch=1, seed=3 + image), together[image : image + 1])
            assert image_paths(report(pipe)) == image_paths(taken)[image : image + 1]
    with accelerated(pipe, without):
        assert not torch.allclose(images(case, pipe), together, atol=1e-4)
    assert torch.equal(images(case, pipe), untouched(case.name))


def test_sparse_attention_with_other_attention_is_refused() -> None:
    pipe, sparse = pipeline(CASES["sit"]), SparseAttention(keep=0.5, **SMALL)
    network = MediatorSiTTransformer2DModel.from_base(pipe.transformer, {"counts": (4,)})
    with pytest.raises((RecipeConflictError, UnsupportedModelError), match="sparse_attention"):
        accelerate(pipe, [Mediators(network), sparse])
    for case in (CASES["sit"], CASES["dit"]):
        pipe = case.make()
        for parts in ([AgentAttention(), sparse], [sparse, AgentAttention()]):
            with pytest.raises((RecipeConflictError, UnsupportedModelError), match=r"(sparse|agent)_attention"):
                accelerate(pipe, parts)
            assert not hasattr(pipe, "_flowaccel_session")


# -- 11: steps of second order


@pytest.mark.slow
@CASE
def test_steps_of_second_order_depend_on_their_image_alone(case: Case) -> None:
    pipe = pipeline(case)
    policy = lively(case, solver_order=2)
    accelerate(pipe, LearnedPolicy(policy))
    together, taken = images(case, pipe), image_paths(report(pipe))
    assert len(set(map(len, taken))) > 1
    for image in range(BATCH):
        assert_close(images(case, pipe, batch=1, seed=3 + image), together[image : image + 1])
        assert image_paths(report(pipe)) == taken[image : image + 1]
    assert not torch.allclose(together, fresh(case.name, "policy")[0], atol=1e-4)


# -- 12: networks in half precision


class InFloat32(FlowMatchEulerDiscreteScheduler):
    """Without the stock scheduler's rounding of what a step adds to the precision of the network."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        (state,) = super().step(model_output.float(), timestep, sample, return_dict=False)
        return (state.to(model_output.dtype),)


def halved(case: Case) -> Any:
    pipe = pipeline(case)
    pipe.to(torch.bfloat16)
    return pipe


def in_half(case: Case, pipe: Any, **options: Any) -> Tensor:
    arguments = case.arguments(**{"batch": BATCH, "steps": STEPS, **options})
    found = {name: v.bfloat16() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    return torch.as_tensor(pipe(**found).images)


@CASE
def test_forced_times_give_the_untouched_image_bit_for_bit_in_half_precision(case: Case) -> None:
    """SD3's and FLUX's but for the stock scheduler's rounding."""
    pipe = halved(case)
    policy = policy_for(pipe, max_steps=None)
    stock = in_half(case, pipe)
    pipe.scheduler = InFloat32.from_config(pipe.scheduler.config)
    expected = in_half(case, pipe)
    assert torch.equal(stock, expected) == (case.name == "sit"), "whose pipeline keeps its state in float32"
    table = [*pipe.scheduler.sigmas.tolist()[1:STEPS], 0.0]
    with decided_by(pipe, ScriptSource(levels=[table]), policy):
        assert torch.equal(in_half(case, pipe, steps=STEPS + 3), expected)


@CASE
def test_heads_stay_in_float32_beside_a_network_in_half_precision(case: Case) -> None:
    pipe = halved(case)
    policy = lively(case)
    before = in_half(case, pipe)
    with accelerated(pipe, LearnedPolicy(policy)):
        pipe.to(torch.bfloat16)
        found = in_half(case, pipe)
        paths, calls = decisions(pipe)
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
        assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
        assert torch.equal(in_half(case, pipe), found) and decisions(pipe) == (paths, calls)
    assert found.isfinite().all() and not torch.equal(found, before)
    assert len(paths) == BATCH and any(max(level) for level, *_ in calls if level)
    assert torch.equal(in_half(case, pipe), before)


@KIND
def test_a_pipeline_loaded_in_half_precision_has_heads_in_float32(kind: str, tmp_path: Path) -> None:
    from flowaccel.pipelines import AcceleratedPipeline

    case = CASES["sit"]
    pipe = pipeline(case)
    switch_on(case, pipe, kind)
    pipe.save_pretrained(tmp_path)
    loaded = AcceleratedPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    twin = halved(case)
    switch_on(case, twin, kind)
    assert torch.equal(images(case, loaded), images(case, twin))
    assert decisions(loaded) == decisions(twin)
    assert loaded.transformer.dtype == torch.bfloat16
