"""Which output is the conditional one, told from what guidance makes of the two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from flowaccel import accelerated, report
from flowaccel.hooks import session_of
from flowaccel.hooks.guidance_order import first_is_conditional

SCALE = 3.0


def plain(cond: Tensor, uncond: Tensor, scale: float = SCALE) -> Tensor:
    return uncond + scale * (cond - uncond)


def turned_and_rescaled(cond: Tensor, uncond: Tensor, scale: float = SCALE) -> Tensor:
    return -0.6 * plain(cond, uncond, scale)


def projected(cond: Tensor, uncond: Tensor, scale: float = SCALE) -> Tensor:
    """Without the part of the difference that is parallel to the conditional output, as in APG."""
    difference = cond - uncond
    parallel = (difference * cond).sum(dim=-1, keepdim=True) / (cond * cond).sum(dim=-1, keepdim=True) * cond
    return cond + (scale - 1) * (difference - parallel)


def zero_star(cond: Tensor, uncond: Tensor, scale: float = SCALE) -> Tensor:
    """With the unconditional output scaled to fit, as in CFG-Zero*."""
    fit = (cond * uncond).sum(dim=-1, keepdim=True) / (uncond * uncond).sum(dim=-1, keepdim=True)
    return plain(cond, uncond * fit, scale)


def bent(cond: Tensor, uncond: Tensor, scale: float = SCALE) -> Tensor:
    return torch.tanh(plain(cond, uncond, scale))


def outputs(images: int = 3, size: int = 40, alike: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(images, size, generator=generator)
    return cond, cond + alike * torch.randn(images, size, generator=generator)


@pytest.mark.parametrize("guide", [plain, turned_and_rescaled, projected, zero_star])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_conditional_output_is_the_one_that_guidance_moves_to(guide: Callable[..., Tensor], dtype: Any) -> None:
    cond, uncond = (output.to(dtype) for output in outputs())
    guided = guide(cond, uncond)
    assert first_is_conditional(cond, uncond, guided) is True
    assert first_is_conditional(uncond, cond, guided) is False


def test_what_does_not_tell_is_not_guessed() -> None:
    cond, uncond = outputs()
    assert first_is_conditional(cond, uncond, plain(cond, uncond, 0.5)) is None  # between the two
    assert first_is_conditional(cond, uncond, bent(cond, uncond)) is None
    assert first_is_conditional(cond, cond.clone(), cond) is None
    assert first_is_conditional(cond, uncond * torch.nan, cond) is None
    assert first_is_conditional(cond, uncond, cond.view(3, 4, 10)) is None
    mixed = torch.cat([plain(cond, uncond)[:1], plain(uncond, cond)[1:]])
    assert first_is_conditional(cond, uncond, mixed) is None


def test_a_variance_that_is_not_guided_does_not_matter() -> None:
    cond, uncond = (output.view(3, 4, 10) for output in outputs())
    guided = plain(cond[:, :2], uncond[:, :2])
    assert first_is_conditional(cond, uncond, guided) is True


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.layer(hidden_states) + temb)


class Network(ModelMixin, ConfigMixin):
    """Of a family that nobody wrote a row for; `mixes` makes a row depend on those beside it."""

    @register_to_config
    def __init__(self, mixes: bool = False, in_channels: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Tokens() for _ in range(3)])

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor, **_: Any) -> tuple[Tensor]:
        tokens = hidden_states
        for block in self.blocks:
            tokens = block(hidden_states=tokens, temb=prompt[:, None] + timestep[:, None, None] / 1000)
        return (tokens - self.config.mixes * tokens.mean(dim=0, keepdim=True),)


class Guided(DiffusionPipeline):
    """Guides in a way of its own, with both branches in one call or a call each, in either order."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Tensor,
        guide: Callable[..., Tensor] = plain,
        conditional_first: bool = True,
        split: bool = False,
        scales: tuple[float, ...] = (SCALE,) * 6,
    ) -> Tensor:
        images = len(prompt)
        sample = torch.randn(images, 5, 4, generator=torch.Generator().manual_seed(1))
        prompts = [prompt, torch.zeros_like(prompt)]
        self.scheduler.set_timesteps(len(scales))
        for timestep, scale in zip(self.scheduler.timesteps, scales, strict=True):
            time = timestep.expand(2 * images)
            order = prompts if conditional_first else prompts[::-1]
            if split:
                halves = [self.transformer(sample, time[:images], one)[0] for one in order]
            else:
                halves = list(self.transformer(torch.cat([sample] * 2), time, torch.cat(order))[0].chunk(2))
            cond, uncond = halves if conditional_first else halves[::-1]
            sample = self.scheduler.step(guide(cond, uncond, scale), timestep, sample, return_dict=False)[0]
        return sample


PROMPTS = torch.randn(2, 4, generator=torch.Generator().manual_seed(2)) * 3
HALF = (SCALE,) * 3 + (1.0,) * 3
"""Scales of a run that is guided in its first half."""
ORDERS = pytest.mark.parametrize("conditional_first", [True, False])


def pipeline(mixes: bool = False) -> Guided:
    torch.manual_seed(0)
    return Guided(Network(mixes).eval(), FlowMatchEulerDiscreteScheduler())


@ORDERS
@pytest.mark.parametrize("split", [False, True])
def test_ended_guidance_keeps_the_prompt_whatever_order_the_rows_have(conditional_first: bool, split: bool) -> None:
    """A pipeline that calls for the unconditional rows first has nothing to stand in for them: it stays as it is."""
    pipe, options = pipeline(), {"conditional_first": conditional_first, "split": split}
    idle = split and not conditional_first
    expected = pipe(PROMPTS, scales=(SCALE,) * 6 if idle else HALF, **options)
    says = pytest.warns(UserWarning, match="saves nothing") if idle else contextlib.nullcontext()
    with accelerated(pipe, "guidance_interval"):
        with says:
            images = [pipe(PROMPTS, **options) for _ in range(2)]
        for found in images:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (report(pipe).guided_rate == 1) == idle
        records = session_of(pipe).run.records
        assert sum(record.not_run.get("", 0) for record in records) == (0 if idle else 3 * len(PROMPTS))


@ORDERS
def test_caches_decide_by_the_conditional_rows_from_the_first_run_on(conditional_first: bool) -> None:
    found = {}
    for first in (True, conditional_first):
        pipe = pipeline()
        with accelerated(pipe, "fbcache:threshold=0.05"):
            images = [pipe(PROMPTS, conditional_first=first) for _ in range(2)]
            assert torch.equal(*images)
            computed = [record.computed for record in session_of(pipe).run.records]
            found[first] = computed, images[0]
            assert len(computed) == 6
            branches = {record.branches for record in session_of(pipe).run.records}
            assert branches == {("cond", "uncond") if first else ("uncond", "cond")}
    assert found[True][0] == found[conditional_first][0]
    torch.testing.assert_close(found[True][1], found[conditional_first][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mixes", "guide", "said"),
    [(False, bent, "did not show which output"), (True, plain, "conditional rows alone do not give")],
)
@ORDERS
def test_where_it_is_not_certain_guidance_stays_and_that_is_said(
    mixes: bool, guide: Callable[..., Tensor], said: str, conditional_first: bool
) -> None:
    options: dict[str, Any] = {"guide": guide, "conditional_first": conditional_first}
    expected = pipeline(mixes)(PROMPTS, **options)
    for recipe in ("guidance_interval", "guidance_skip:threshold=-0.99"):
        pipe = pipeline(mixes)
        with accelerated(pipe, recipe), pytest.warns(UserWarning, match=f"changes and saves nothing.*{said}"):
            assert torch.equal(pipe(PROMPTS, **options), expected)
