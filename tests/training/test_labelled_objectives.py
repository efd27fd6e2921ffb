"""The objectives of class-conditional networks: what they draw and in which order, and what they make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

import tiny
from flowaccel.data import ImageSet
from flowaccel.methods.moe.train import prepare_training
from flowaccel.training.ddpm import DIT, DDPMObjective, Diffusion
from flowaccel.training.flow import FlowObjective, shift_augment

NULL = 10
DATA = ImageSet(
    images=torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(9)) * 2 - 1, labels=torch.arange(30) % 10
)
DROP = 0.4


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dit(**config: Any) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 1, "out_channels": 2, "num_layers": 2}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": NULL}
    made = DiTTransformer2DModel(**{**sizes, **heads, **config})
    tiny.random_weights(made, 0)
    return made


def draws(generator: torch.Generator, batch: int, augment: bool, times: Any) -> tuple[Tensor, ...]:
    """Images, noise, times and labels, in the order that the first version of the flow objective drew them in."""
    index = torch.randint(len(DATA), (batch,), generator=generator)
    images, labels = DATA.images[index], DATA.labels[index]
    if augment:
        images = shift_augment(images, generator)
    noise = torch.randn(images.shape, generator=generator)
    t = times(batch, generator)
    labels = torch.where(torch.rand(batch, generator=generator) < DROP, NULL, labels)
    return images, noise, t, labels


@pytest.mark.parametrize("augment", [False, True])
def test_flow(augment: bool) -> None:
    """x_t = t data + (1 - t) noise, and the mean squared error of the velocity data - noise."""
    network = tiny.sit_network()
    goal = FlowObjective(
        data=DATA, null_label=NULL, batch_size=12, label_drop=DROP, augment=shift_augment if augment else None
    )
    generator = seeded()
    found = goal(network, generator)
    by_hand = seeded()
    images, noise, t, labels = draws(by_hand, 12, augment, lambda n, drawn: torch.rand(n, generator=drawn))
    level = t.reshape(-1, 1, 1, 1)
    output = network(level * images + (1 - level) * noise, t, labels).sample
    torch.testing.assert_close(found, (output - (images - noise)).square().mean())
    assert torch.equal(generator.get_state(), by_hand.get_state()), "nothing more is drawn"
    assert (labels == NULL).any() and (labels != NULL).any()


def test_ddpm() -> None:
    """DiT's loss at the times of the chain, on a network of diffusers' class."""
    chain = Diffusion(torch.linspace(1e-3, 0.05, 40))
    goal = DDPMObjective(data=DATA, null_label=NULL, batch_size=12, label_drop=DROP, chain=chain)
    network = dit()
    prepare_training(network)
    generator, by_hand = seeded(), seeded()
    found = goal(network.train(), generator)
    images, noise, t, labels = draws(by_hand, 12, False, lambda n, drawn: torch.randint(40, (n,), generator=drawn))
    output = network.eval()(chain.noised(images, noise, t), t, labels).sample
    torch.testing.assert_close(found, chain.terms(output, images, noise, t).loss.mean())
    assert torch.equal(generator.get_state(), by_hand.get_state())
    found.backward()
    table = network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.grad
    assert set(table.abs().sum(1).nonzero().flatten().tolist()) == set(labels.tolist())


def test_times_cover_the_whole_chain() -> None:
    goal = DDPMObjective(data=DATA, null_label=NULL, batch_size=4000)
    t = goal.times(seeded())
    assert t.dtype == torch.int64 and goal.chain is DIT
    assert 0 <= int(t.min()) < 5 and 995 < int(t.max()) < 1000
    assert float(t.float().mean()) == pytest.approx(499.5, abs=15)


def test_labels_are_dropped_once() -> None:
    """By the objective alone: diffusers' DiT would drop them in every block anew, and from the global generator."""
    stock = dit().train()
    assert {module.dropout_prob for module in stock.modules() if isinstance(module, LabelEmbedding)} == {0.1}
    prepared = dit().train()
    prepare_training(prepared)
    images, t, labels = torch.randn(200, 1, 8, 8, generator=seeded()), torch.arange(200), torch.arange(200) % 10
    with torch.no_grad():
        expected = prepared.eval()(images, t, labels).sample
        assert torch.equal(prepared.train()(images, t, labels).sample, expected)
        torch.manual_seed(0)
        assert not torch.isclose(stock(images, t, labels).sample, expected).all()
    for share, kept in ((0.0, True), (1.0, False)):
        drawn = DDPMObjective(data=DATA, null_label=NULL, label_drop=share).draw(seeded()).labels
        assert bool((drawn != NULL).all()) == kept and bool((drawn == NULL).all()) != kept


@pytest.mark.parametrize("make", [tiny.sit_network, dit])
def test_what_is_trained(make: Any) -> None:
    """All but tables of positions that are fixed."""
    network = make().requires_grad_(False)
    prepare_training(network)
    assert {name for name, value in network.named_parameters() if not value.requires_grad} <= {"pos_embed"}


@pytest.mark.parametrize("kind", [FlowObjective, DDPMObjective])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"label_drop": 1.5}, r"label_drop must lie in \[0, 1\], got 1.5"),
        ({"label_drop": float("nan")}, r"label_drop must lie in \[0, 1\], got nan"),
    ],
)
def test_wrong_options(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(data=DATA, null_label=NULL, **options)


def test_a_network_without_variance_is_refused() -> None:
    network = dit(out_channels=1)
    with pytest.raises(ValueError, match=r"noise and variance channels, shape \(2, 2, 8, 8\)"):
        DDPMObjective(data=DATA, null_label=NULL, batch_size=2)(network, seeded())
