"""Networks that take and return a list with one tensor for every row, as Z-Image's does; also of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

import tiny
from families import CASES
from flowaccel import accelerated, report
from flowaccel.hooks import packer, tensors_of
from flowaccel.hooks.calls import in_one

SIZES = ((4, 4), (8, 4), (4, 8))


def test_rows_of_several_sizes_are_one_tensor_and_back() -> None:
    rows = [torch.rand(2, 1, *size) for size in SIZES]
    whole = in_one(rows)
    assert whole.shape == (3, 2, 1, 8, 8)
    assert float(whole.sum()) == pytest.approx(float(sum(row.sum() for row in rows)))
    for output in ((rows,), [rows], {"sample": rows}):
        kind: Any = type(output)
        (found,) = tensors_of(output)
        assert torch.equal(found, whole)
        back = packer(output)((found,))
        assert type(back) is kind
        (made,) = back.values() if isinstance(back, dict) else back
        assert all(torch.equal(one, row) for one, row in zip(made, rows, strict=True))


def test_a_packer_of_some_rows_packs_both_branches() -> None:
    """Guidance runs the conditional rows alone, and packs those of both branches in the same sizes."""
    rows = [torch.rand(2, *size) for size in SIZES]
    (made,) = packer((rows,))((torch.cat([in_one(rows)] * 2),))
    assert [one.shape[1:] for one in made] == [*SIZES, *SIZES]


class SeveralSizes(DiffusionPipeline):
    """Images of several sizes in one batch, by Euler's method."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, ids: tuple[int, ...] = (0, 1, 2), steps: int = 6) -> list[Tensor]:
        images = [tiny.embedding(4, SIZES[i][0] * SIZES[i][1], i).view(4, 1, *SIZES[i]) for i in ids]
        words = [tiny.embedding(tiny.TOKENS, tiny.CONTEXT, 10 + i) for i in ids]
        self.scheduler.set_timesteps(steps)
        with self.progress_bar(total=steps):
            for here, after in zip(self.scheduler.sigmas[:-1], self.scheduler.sigmas[1:], strict=True):
                made = self.transformer(images, (1 - here).expand(len(ids)), words, return_dict=False)[0]
                images = [image - (after - here) * one for image, one in zip(images, made, strict=True)]
                self.scheduler.step(made[0], self.scheduler.timesteps[0], images[0])
        return images


@pytest.mark.parametrize("recipe", ["fbcache:threshold=1.3", "ab_cache", "easycache:threshold=2", "taylorseer"])
def test_images_of_several_sizes_decide_for_themselves(recipe: str) -> None:
    network = CASES["z_image"].make().transformer
    pipe = tiny.silent(SeveralSizes(network, FlowMatchEulerDiscreteScheduler()))
    with accelerated(pipe, recipe):
        together = pipe(steps=8)
        computed = [call.computed for call in report(pipe).calls]
        assert any(not all(flags) for flags in computed)
        for image in range(3):
            (alone,) = pipe((image,), steps=8)
            assert [call.computed[0] for call in report(pipe).calls] == [flags[image] for flags in computed]
            torch.testing.assert_close(alone, together[image], atol=1e-4, rtol=1e-4)
