"""How the digits generator gets its width, and its control, for a few steps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowaccel import CheckpointError, zoo
from flowaccel.methods.dynamic_width.train import STRATA
from flowaccel.pipelines import load_pipeline
from flowaccel.zoo_build import width as zoo_width
from flowaccel.zoo_build.width import LOOP, dynamic_digits, train_longer, train_width

SHORT = replace(LOOP, steps=2, save_every=1)


@pytest.fixture(scope="module")
def base() -> Any:
    return load_pipeline(zoo.folder("sit-digits")).transformer.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_width, "BATCH", 8)


def states(network: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What it is trained on from now on."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(_: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(args[:3])

    network.register_forward_pre_hook(note)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_the_network_and_its_control_see_the_same_images(tokens: bool, base: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    dynamic, control = dynamic_digits(base, tokens=tokens), copy.deepcopy(base)
    seen = states(dynamic), states(control)
    done = [*train_width(dynamic, base, tmp_path / "width", ratio=0.5, loop=SHORT)]
    done += train_longer(control, tmp_path / "longer", loop=SHORT)
    assert [state.step for state in done] == [1, 2, 1, 2]
    assert bool(dynamic.dynamic.sites) == tokens and len(seen[0]) == 2
    for (state, t, labels), (other, u, others) in zip(*seen, strict=True):
        assert torch.equal(labels, others)
        strata = (u + torch.arange(8) % STRATA) / STRATA  # what the dynamic one makes of the control's times
        torch.testing.assert_close(t, strata)
        a, b = t.reshape(-1, 1, 1, 1), u.reshape(-1, 1, 1, 1)
        data, noise = ((1 - b) * state - (1 - a) * other) / (a - b), (a * other - b * state) / (a - b)
        apart = (a - b).abs().flatten() > 0.1
        assert apart.any()
        assert data[apart].abs().max() < 1.001, "the same images"
        assert 0.9 < noise[apart].std() < 1.1, "and the same noise"
    for network in (dynamic, control):
        moved = {name for name, value in before.items() if not torch.equal(network.state_dict()[name], value)}
        assert "pos_embed" not in moved and any(name.startswith("transformer_blocks.0.") for name in moved)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


@pytest.mark.slow
def test_routers_of_another_start_are_refused(base: Any, tmp_path: Path) -> None:
    def start(**routers: Any) -> None:
        network = dynamic_digits(base, tokens=False, **routers)
        for _ in train_width(network, base, tmp_path, ratio=0.5, loop=SHORT):
            pass

    start()
    with pytest.raises(CheckpointError, match=r"'tau': \(2\.0, 3\.0\)"):
        start(tau=3.0)
