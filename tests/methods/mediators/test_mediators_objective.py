"""The objective of networks with several numbers of mediators."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowaccel.data import ImageSet
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel, set_mediators
from flowaccel.methods.mediators.train import MediatorObjective
from flowaccel.training.flow import FlowObjective

SIZES = {"sample_size": 4, "patch_size": 1, "in_channels": 1, "num_layers": 2, "num_attention_heads": 2}


def network(counts: tuple[int, ...], **settings: Any) -> Any:
    torch.manual_seed(0)
    made = MediatorSiTTransformer2DModel(
        **SIZES,
        attention_head_dim=4,
        num_classes=3,
        learn_sigma=False,
        mediator_config={"counts": counts, **settings},
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return made


def objective(**options: Any) -> FlowObjective:
    data = ImageSet(images=torch.randn(9, 1, 4, 4), labels=torch.arange(9) % 3)
    return FlowObjective(data=data, null_label=3, **{"batch_size": 6, **options})


def test_a_batch_is_shared_out_among_all_numbers() -> None:
    torch.manual_seed(1)
    made, inner = network((1, 4)), objective()
    loss = MediatorObjective(objective=inner, counts=(1, 4))(made, torch.Generator().manual_seed(5))
    batch = inner.draw(torch.Generator().manual_seed(5))
    expected = 0.0
    for place, count in enumerate((1, 4)):
        set_mediators(made, count)
        states, t, labels = inner.arguments(batch)
        error = made(states, t, labels, return_dict=False)[0] - (batch.images - batch.noise)
        expected += float(error[place::2].detach().square().mean()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    for count in (1, 4):
        biases = made.transformer_blocks[0].attn.mediator_biases[str(count)]
        assert biases.reading.table.grad.abs().sum() > 0


@pytest.mark.parametrize("use_bias", [True, False], ids=["biases", "none"])
def test_layers_with_a_number_each_learn_from_the_whole_batch(use_bias: bool) -> None:
    torch.manual_seed(1)
    made, inner = network((16, 4), per_layer=True, use_bias=use_bias), objective()
    made.enable_gradient_checkpointing()
    if not use_bias:
        set_mediators(made, 1)  # whatever was set before
    loss = MediatorObjective(objective=inner, counts=None)(made, torch.Generator().manual_seed(5))
    states, t, labels = inner.arguments(batch := inner.draw(torch.Generator().manual_seed(5)))
    error = made(states, t, labels, return_dict=False)[0] - (batch.images - batch.noise)
    assert loss.item() == pytest.approx(float(error.detach().square().mean()), rel=1e-5)
    assert [block.attn.count for block in made.transformer_blocks] == [16, 4]
    loss.backward()
    learned = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert (
        not use_bias
        or {f"transformer_blocks.{i}.attn.mediator_biases.{n}.asking.rows" for i, n in ((0, 16), (1, 4))} <= learned
    )
    assert "transformer_blocks.1.attn.to_q.weight" in learned


def test_the_distance_to_a_teacher_is_added_by_block() -> None:
    torch.manual_seed(1)
    made, teacher, inner = network((4,)), network((4,)), objective()
    alone = MediatorObjective(objective=inner, counts=(4,))(made, torch.Generator().manual_seed(5))
    same = MediatorObjective(objective=inner, counts=(4,), teacher=teacher)(made, torch.Generator().manual_seed(5))
    assert same.item() == pytest.approx(alone.item(), rel=1e-5)
    with torch.no_grad():
        teacher.patch_embed.weight += 1
    other = MediatorObjective(objective=inner, counts=(4,), teacher=teacher, feature_weight=2.0)
    assert other(made, torch.Generator().manual_seed(5)).item() > alone.item() + 0.1


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match=r"counts must hold at least one number and at most batch_size=1 of them"):
        MediatorObjective(objective=objective(batch_size=1), counts=(1, 4))
    with pytest.raises(ValueError, match="feature_weight must not be negative"):
        MediatorObjective(objective=objective(), counts=(4,), feature_weight=-1.0)
    made = network((1, 4))
    made.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"a step has \[1, 4\]; switch it off, or train one number"):
        MediatorObjective(objective=objective(), counts=(1, 4))(made, torch.Generator())
    MediatorObjective(objective=objective(), counts=(4,))(made, torch.Generator().manual_seed(0)).backward()
