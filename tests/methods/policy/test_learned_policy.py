"""A learned policy on the stock loops of SiT, SD3 and FLUX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3InpaintPipeline
from torch import Tensor

from families import CASES, Case, assert_close
from flowaccel import (
    LearnedPolicy,
    MixtureOfExperts,
    Recipe,
    RecipeConflictError,
    SiTInpaintPipeline,
    UnsupportedModelError,
    accelerate,
    accelerated,
    report,
    restore,
)
from flowaccel.hooks import denoiser
from flowaccel.methods.policy import runtime
from flowaccel.methods.policy.accelerator import base_of
from flowaccel.methods.policy.network import CACHE, COUNT, SPARSE, STEP, AccelerationPolicy
from flowaccel.methods.policy.policy_decisions import HeadSource, ScriptSource
from flowaccel.recipe.sampler import swapped_scheduler
from flowaccel.samplers import PolicyScheduler
from moe_parts import fitted
from policies import FAMILIES, SMALL_BLOCKS, conditioned, decided_by, driven, image_paths, pipeline, policy_for

STEPS = 6
ONE_SHOT: dict[str, Any] = {"levels": (COUNT, CACHE), "counts": (2, 4, 7, 11)}
CASE = pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)


@CASE
def test_the_schedulers_own_times_give_the_untouched_image_bit_for_bit(case: Case) -> None:
    pipe = pipeline(case)
    before = case(pipe, batch=2, steps=STEPS)
    table = [*pipe.scheduler.sigmas.tolist()[1:STEPS], 0.0]
    policy = policy_for(pipe, max_steps=None)
    found = driven(pipe, case, ScriptSource(levels=[table]), policy, batch=2, steps=9)
    assert torch.equal(found, before)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert torch.equal(case(pipe, batch=2, steps=STEPS), before)


@CASE
def test_images_of_different_length_are_what_they_are_alone(case: Case) -> None:
    pipe = pipeline(case)
    policy = policy_for(pipe, max_steps=None)
    levels = [[0.7, 0.2, 0.0], [0.9, 0.6, 0.5, 0.31, 0.1, 0.0]]
    choices = {CACHE: [[0, 0, 1], [0, 1, 0, 1, 1, 0]]}
    together = driven(pipe, case, ScriptSource(levels, choices), policy, batch=2, steps=9)
    for image in range(2):
        source = ScriptSource([levels[image]], {CACHE: [choices[CACHE][image]]})
        alone = driven(pipe, case, source, policy, batch=1, seed=3 + image, steps=9)
        assert_close(together[image : image + 1], alone)


@pytest.mark.parametrize(
    "case", [CASES[name] for name in ("sit", "sd3", "flux", "flux_img2img")], ids=lambda case: case.name
)
def test_a_forced_count_is_the_plain_run_of_so_many_steps(case: Case) -> None:
    """On the grid of that number, shifted as the pipeline's scheduler is, and from where the run starts."""
    pipe = pipeline(case)
    policy = policy_for(pipe, max_steps=None, **ONE_SHOT)
    back = swapped_scheduler(pipe, PolicyScheduler, "a test")
    plain = {count: case(pipe, batch=2, steps=count) for count in (2, 4, 6)}
    back()
    for choice, count in enumerate((2, 4)):
        source = ScriptSource(choices={COUNT: [[choice]]})
        assert torch.equal(driven(pipe, case, source, policy, batch=2, steps=14), plain[count])
    longest = ScriptSource(choices={COUNT: [[3]]})
    assert torch.equal(driven(pipe, case, longest, policy, batch=2, steps=6), plain[6])
    bounded = policy_for(pipe, max_steps=6, **ONE_SHOT)
    if case.begins_at:
        with pytest.raises(ValueError, match="begins midway needs a number of steps that max_steps allows"):
            driven(pipe, case, longest, bounded, batch=2, steps=14)
    else:
        assert torch.equal(driven(pipe, case, longest, bounded, batch=2, steps=14), plain[6])


@CASE
def test_a_batch_mixes_counts(case: Case) -> None:
    pipe = pipeline(case)
    policy = policy_for(pipe, **ONE_SHOT)
    counts, reuse = [[2], [0]], [[0, 1, 0, 1, 1, 0, 0], [0, 1]]
    together = driven(pipe, case, ScriptSource(choices={COUNT: counts, CACHE: reuse}), policy, batch=2, steps=9)
    for image in range(2):
        source = ScriptSource(choices={COUNT: [counts[image]], CACHE: [reuse[image]]})
        alone = driven(pipe, case, source, policy, batch=1, seed=3 + image, steps=9)
        assert_close(together[image : image + 1], alone)


@pytest.mark.parametrize("config", [{}, ONE_SHOT], ids=["step", "count"])
@CASE
def test_heads_decide_for_every_image_alone(case: Case, config: dict[str, Any]) -> None:
    pipe = pipeline(case)
    seed = 3 if case.name == "sit" and config else 0  # of heads that do not decide alike about all
    policy = policy_for(pipe, seed, **config)
    with accelerated(pipe, LearnedPolicy(policy)):
        together = case(pipe, batch=3, steps=20)
        taken = image_paths(report(pipe))
        assert len({len(path) for path in taken}) > 1 or len(set(taken)) > 1
        for image in range(3):
            alone = case(pipe, batch=1, seed=3 + image, steps=20)
            assert image_paths(report(pipe)) == (taken[image],)
            assert_close(together[image : image + 1], alone)


@CASE
def test_what_runs_is_what_was_decided(case: Case) -> None:
    """Times fall, the run ends when all are done, and reused steps leave the blocks out."""
    pipe = pipeline(case)
    log: dict[str, list[Any]] = {}
    policy = policy_for(pipe, max_steps=None)
    generators = [np.random.default_rng(seed) for seed in (5, 6)]
    driven(pipe, case, HeadSource(policy, generators, log=log), policy, batch=2, steps=20)
    run = pipe_runs(pipe, case, policy)
    for path in run:
        times = [time for time, *_ in path]
        assert times == sorted(times, reverse=True)
        assert all(abs(time - round(time)) < 1e-3 for time in times)
    assert set(log) == {STEP, CACHE}
    assert all(0 < share < 1 for choices in log[STEP] for share in choices.action.tolist())


def pipe_runs(pipe: Any, case: Case, policy: AccelerationPolicy) -> list[Any]:
    with accelerated(pipe, LearnedPolicy(policy)):
        case(pipe, batch=2, steps=40)
        found = report(pipe)
        assert not found.failed
        assert len(found.steps) < 40
        return image_paths(report(pipe))


def test_a_sampled_rollout_depends_on_its_generator_alone() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    policy = policy_for(pipe)

    def sampled(*seeds: int, seed: int = 3) -> Tensor:
        source = HeadSource(policy, [np.random.default_rng(own) for own in seeds])
        return driven(pipe, case, source, policy, batch=len(seeds), seed=seed, steps=20)

    both = sampled(5, 6)
    assert_close(both[1:], sampled(6, seed=4))
    assert not torch.allclose(both, sampled(7, 8))


@CASE
def test_the_sparse_head_sets_every_image_apart(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "SparseAttention", SMALL_BLOCKS)
    pipe = pipeline(case)
    options = {"max_steps": None, "sparse_tokens": 1, "dense_blocks": 0, "sparsity": (0.5, 0.25)}
    policy = policy_for(pipe, levels=(STEP, CACHE, SPARSE), **options)
    levels, reuse = [[0.8, 0.5, 0.3, 0.0]], [[0, 1, 0, 0]]

    def made(*sparse: list[int], seed: int = 3) -> Tensor:
        source = ScriptSource(levels, {CACHE: reuse, SPARSE: sparse})
        return driven(pipe, case, source, policy, batch=len(sparse), seed=seed, steps=9)

    plain = driven(pipe, case, ScriptSource(levels, {CACHE: reuse}), policy_for(pipe), batch=2, steps=9)
    assert torch.equal(made([0], [0]), plain)
    mixed = made([0], [2])
    assert_close(mixed[:1], plain[:1])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-4)
    assert_close(mixed[1:], made([2], seed=4))


def test_rails_hold() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    policy = policy_for(pipe, max_reuse=2, max_steps=8, smallest=100)
    with torch.no_grad():
        policy.heads[CACHE].fc2.weight.zero_()
        policy.heads[CACHE].fc2.bias.copy_(torch.tensor([-5.0, 5.0]))  # always reuse
        policy.heads[STEP].fc2.weight.zero_()
        policy.heads[STEP].fc2.bias.copy_(torch.tensor([3.0, 0.0]))
    with accelerated(pipe, LearnedPolicy(policy)):
        case(pipe, batch=1, steps=20)
        (path,) = image_paths(report(pipe))
    assert [computed for _, computed, _ in path][:7] == [True, False, False, True, False, False, True]
    assert len(path) <= 8
    assert min(time for time, *_ in path) >= 100


def test_one_level_alone() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    policy = policy_for(pipe)
    plain = case(pipe, batch=1, steps=STEPS)
    with accelerated(pipe, LearnedPolicy(policy, levels=(CACHE,))):
        case(pipe, batch=1, steps=STEPS)
        assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
        assert len(report(pipe).steps) == STEPS
    with accelerated(pipe, LearnedPolicy(policy, levels=(STEP,))):
        case(pipe, batch=1, steps=20)
        assert type(pipe.scheduler) is PolicyScheduler
        assert all(computed for (path,) in [image_paths(report(pipe))] for _, computed, _ in path)
    assert torch.equal(case(pipe, batch=1, steps=STEPS), plain)


@pytest.mark.parametrize("config", [{}, ONE_SHOT], ids=["step", "count"])
def test_saved_and_loaded_it_decides_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    case, used = CASES["sit"], (COUNT if config else STEP,)
    pipe = pipeline(case)
    accelerate(pipe, LearnedPolicy(policy_for(pipe, base=base_of(denoiser(pipe)), **config), levels=used))
    before, taken = case(pipe, batch=2, steps=20), image_paths(report(pipe))
    Recipe([LearnedPolicy(policy_for(pipe, **config), levels=used)]).save_pretrained(tmp_path)
    restore(pipe)
    with accelerated(pipe, tmp_path):
        assert torch.equal(case(pipe, batch=2, steps=20), before)
        assert image_paths(report(pipe)) == taken


def test_it_refuses_what_it_was_not_made_for() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    with pytest.raises(RecipeConflictError, match="was trained for"):
        accelerate(pipe, LearnedPolicy(policy_for(pipe, base="FluxTransformer2DModel (configuration 0)")))
    with pytest.raises(RecipeConflictError, match="counts time from 500"):
        accelerate(pipe, LearnedPolicy(policy_for(pipe, num_train_timesteps=500)))
    with pytest.raises(ValueError, match="levels must be among those of the policy"):
        accelerate(pipe, LearnedPolicy(policy_for(pipe, levels=(STEP,)), levels=(CACHE,)))
    with pytest.raises(ValueError, match="levels must hold at least one"):
        LearnedPolicy(levels=())
    with pytest.raises(ValueError, match="must not hold both 'step' and 'count'"):
        LearnedPolicy(levels=(STEP, COUNT))
    with pytest.raises(ValueError, match="looks at 9 channels"):
        accelerate(pipe, LearnedPolicy(AccelerationPolicy(in_channels=9, condition_dim=conditioned(pipe))))
    with pytest.raises(TypeError, match="must be an AccelerationPolicy"):
        LearnedPolicy(torch.nn.Linear(1, 1))
    assert not hasattr(pipe, "_flowaccel_session")


def test_heads_have_the_size_of_the_paper() -> None:
    """About 3 million parameters for FLUX: 64 packed channels, embedding of 3072."""
    with torch.device("meta"):
        policy = AccelerationPolicy(64, 3072, ("step", "cache", "sparse"), sparsity=(0.75, 0.6, 0.5))
    assert 3.05e6 < sum(parameter.numel() for parameter in policy.parameters()) < 3.1e6


def test_a_pipeline_of_embeddings_that_are_not_known_is_refused() -> None:
    pipe = CASES["pixart"].make()
    policy = AccelerationPolicy(in_channels=denoiser(pipe).config.in_channels, condition_dim=4, levels=(CACHE,))
    with accelerated(pipe, LearnedPolicy(policy)), pytest.raises(Exception, match="embedding"):
        CASES["pixart"](pipe)


@pytest.mark.parametrize("kind", [SiTInpaintPipeline, StableDiffusion3InpaintPipeline], ids=["sit", "sd3"])
def test_inpainting_with_times_per_image_is_refused(kind: Any) -> None:
    pipe = kind.from_pipe(pipeline(CASES["sit" if kind is SiTInpaintPipeline else "sd3"]))
    policy = policy_for(pipe)
    with pytest.raises(UnsupportedModelError, match="puts back what is to be kept"):
        accelerate(pipe, LearnedPolicy(policy))
    accelerate(pipe, LearnedPolicy(policy, levels=(CACHE,)))


def test_modulation_of_another_width_is_refused() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    other = AccelerationPolicy(pipe.transformer.config.in_channels, conditioned(pipe) + 1, width=8)
    with accelerated(pipe, LearnedPolicy(other)), pytest.raises(RecipeConflictError, match="numbers modulate"):
        case(pipe, batch=1, steps=4)


def test_the_trace_tells_how_sparse_a_step_was(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["sit"]
    monkeypatch.setattr(runtime, "SparseAttention", SMALL_BLOCKS)
    pipe = pipeline(case)
    policy = policy_for(
        pipe, levels=(STEP, CACHE, SPARSE), max_steps=None, sparse_tokens=1, dense_blocks=0, sparsity=(0.5, 0.25)
    )
    source = ScriptSource([[0.8, 0.5, 0.0]], {CACHE: [[0, 1, 0]], SPARSE: [[0, 0, 2]]})
    with decided_by(pipe, source, policy):
        case(pipe, batch=1, steps=9)
        found = report(pipe)
    (path,) = image_paths(found)
    assert [what for _, *what in path] == [[True, 0], [False, 0], [True, 2]]
    assert "1000 800r 500s2" in str(found)


def test_a_sparse_head_that_does_nothing_says_so() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    policy = policy_for(pipe, levels=(STEP, SPARSE), sparsity=(0.5,), dense_blocks=0)
    source = ScriptSource([[0.5, 0.0]], {SPARSE: [[1]]})
    with pytest.warns(UserWarning, match="the sparse head of a policy does nothing here: the image has"):
        driven(pipe, case, source, policy, batch=1, steps=4)


def test_over_a_network_with_experts() -> None:
    case = CASES["sit"]
    pipe = pipeline(case)
    network = fitted(pipe, lambda whole: case(whole, batch=2, steps=4))
    policy = policy_for(pipe)
    recipe = [MixtureOfExperts(network), LearnedPolicy(policy)]
    with accelerated(pipe, recipe):
        together, taken = case(pipe, batch=2, steps=20), image_paths(report(pipe))
        alone = case(pipe, batch=1, seed=4, steps=20)
        assert image_paths(report(pipe)) == taken[1:]
        assert_close(together[1:], alone)
