"""Our dynamic network computes what the official DyDiT does: gates, outputs, the loss and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowaccel.methods.dynamic_width.networks import DynamicSiTTransformer2DModel
from flowaccel.methods.dynamic_width.official import dydit_from_official, dydit_to_official
from flowaccel.methods.dynamic_width.train import MacsCosts
from flowaccel.models.sit import modulate
from flowaccel.pipelines.sit_blocks import guide
from flowaccel.training.ddpm import DIT, DiffusionTerms
from helpers import Golden, assert_close, golden, with_recorded_times

BLOCK, MODEL = golden("dydit_block"), golden("dydit_model")
GUIDED_CHANNELS = 3
OFFICIAL_ROUTERS = {"attn": "attn_rate", "ff": "mlp_rate", "tokens": "token_selection"}
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [(torch.float32, "eval", 1e-5), (torch.float64, "eval64", 1e-9)],
    ids=["float32", "float64"],
)


def stored_noise(file: Golden) -> Any:
    """A replacement of `Dynamics.noise` that hands out the draws of the official run."""

    def noise(path: str, shape: tuple[int, ...]) -> Tensor:
        _, block, module = path.split(".")
        here = "" if file is BLOCK else f"blocks.{block}."
        drawn = [file[f"train_noise/{here}{OFFICIAL_ROUTERS[module]}/gumbel{number}"] for number in (1, 2)]
        assert drawn[0].shape == shape
        return drawn[0] - drawn[1]

    return noise


@contextmanager
def tokens_of(network: Any) -> Iterator[list[Tensor]]:
    """The token masks (B, N, 1) that every feed-forward works with, in the order of the calls."""
    seen: list[Tensor] = []
    hooks = [site.module.register_forward_pre_hook(lambda module, _: seen.append(module.keep)) for site in
             network.dynamic.sites]  # fmt: skip
    yield seen
    for hook in hooks:
        hook.remove()


def assert_same_gates(found: list[Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(torch.stack(found, 1).float(), expected, atol=0, rtol=0)


# --- one block


def one_block(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A network whose only block has the file's weights, and that block."""
    heads, width = BLOCK.config["num_heads"], BLOCK.config["hidden_size"]
    network = DynamicSiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        mlp_ratio=BLOCK.config["mlp_ratio"],
    )
    weights = dydit_from_official({f"blocks.0.{key}": value for key, value in BLOCK.group("sd/").items()})
    assert network.load_state_dict(weights, strict=False).unexpected_keys == []
    network.to(dtype).eval()
    network.dynamic.noise = stored_noise(BLOCK)
    return network, network.transformer_blocks[0]


def enter(network: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Set the gates as the embedding of time does, and return the block's arguments."""
    network.dynamic.timed(network.time_embed, (), BLOCK["in/e_t"].to(dtype))
    return BLOCK["in/x"].to(dtype), nn.functional.silu(BLOCK["in/c"].to(dtype))


@PRECISIONS
@torch.no_grad()
def test_block_in_evaluation(dtype: torch.dtype, group: str, tolerance: float) -> None:
    network, block = one_block(dtype)
    x, condition = enter(network, dtype)
    shift, scale = block.modulation(condition).chunk(6, dim=-1)[:2]
    assert_close(block.attn(modulate(block.norm1(x), shift, scale)), BLOCK[f"{group}/attn_out"], tolerance)
    assert_close(block.ff(x), BLOCK[f"{group}/mlp_out_on_x"], tolerance)
    with tokens_of(network) as tokens:
        assert_close(block(x, condition), BLOCK[f"{group}/output"], tolerance)
    assert torch.equal(tokens[0].float(), BLOCK["eval/token_mask"])
    with network.dynamic.complete():
        x, condition = enter(network, dtype)
        assert_close(block(x, condition), BLOCK[f"{group}/output_complete"], tolerance)


@torch.no_grad()
def test_routers_of_the_block() -> None:
    network, block = one_block()
    dynamics, embedding = network.dynamic, BLOCK["in/e_t"]
    for name, logits in zip(("attn_rate", "mlp_rate"), dynamics.logits(embedding), strict=True):
        assert_close(logits, BLOCK[f"eval/logits/{name}.router"], 1e-5)
    for name, gates in zip(("head", "group"), dynamics.evaluated(embedding), strict=True):
        assert torch.equal(gates.float(), BLOCK[f"eval/{name}_mask"])
    found: list[Tensor] = []
    dynamics.sites[0].router.register_forward_hook(lambda module, args, output: found.append(output))
    block(*enter(network, torch.float32))
    assert_close(found[0], BLOCK["eval/logits/token_selection.mlp_head"], 1e-5)


def test_block_in_training() -> None:
    """Gates with the stored noise, and the gradients of everything, those of the gates included."""
    network, block = one_block()
    network.train()
    arguments = enter(network, torch.float32)
    with tokens_of(network) as tokens:
        output = block(*arguments)
    masks = dict(zip(("head", "group", "token"), [*network.dynamic.masks, *tokens], strict=True))
    for name, mask in masks.items():
        assert torch.equal(mask.detach(), BLOCK[f"train/{name}_mask"])
    assert_close(output.detach(), BLOCK["train/output"], 1e-5)
    loss = (output * BLOCK["in/cotangent"]).sum()
    loss = loss + sum((mask * BLOCK[f"in/w_{name}"]).sum() for name, mask in masks.items())
    loss.backward()
    inside = {
        name: parameter.grad
        for name, parameter in network.named_parameters()
        if name.startswith(("transformer_blocks.", "dynamic.blocks."))
    }
    found = {key.removeprefix("blocks.0."): value for key, value in dydit_to_official(inside).items()}
    expected = BLOCK.group("train/grad/")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, 1e-5, relative=1e-4)


# --- a whole network


def whole(dtype: torch.dtype = torch.float32) -> Any:
    network = DynamicSiTTransformer2DModel.from_official(
        MODEL.group("sd/"), num_attention_heads=MODEL.config["num_heads"]
    )
    network.dynamic.noise = stored_noise(MODEL)
    return with_recorded_times(network.to(dtype))


def costs(network: Any) -> MacsCosts:
    """Upstream's constants, in thousands of millions of multiply-adds."""
    constants = MODEL.notes["flops_constants_used"]
    each = [
        round(1e9 * constants["attn" if gated.rule.kind == "heads" else "mlp"])
        for gated in network.dynamic.gated_layers
    ]
    return MacsCosts(tuple(each))


def flops_loss(ratio: Tensor) -> Tensor:
    return MODEL.notes["flops_loss_weight"] * (ratio - MODEL.notes["flops_target"]).square()


@PRECISIONS
@torch.no_grad()
def test_forward(dtype: torch.dtype, group: str, tolerance: float) -> None:
    network = whole(dtype)
    arguments = MODEL["in/x"].to(dtype), MODEL["in/t"], MODEL["in/y"]
    assert_close(network(*arguments).sample, MODEL[f"{group}/forward"], tolerance)
    with network.dynamic.complete():
        assert_close(network(*arguments).sample, MODEL[f"{group}/forward_complete"], tolerance)


@PRECISIONS
@torch.no_grad()
def test_forward_with_guidance(dtype: torch.dtype, group: str, tolerance: float) -> None:
    x, t, labels = MODEL["in/x"].to(dtype), MODEL["in/t"], MODEL["in/y"]
    null = torch.full_like(labels, MODEL.notes["null_class"])
    output = whole(dtype)(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).sample
    guided = guide(output, MODEL.notes["cfg_scale"], GUIDED_CHANNELS)
    assert_close(guided, MODEL[f"{group}/forward_with_cfg"], tolerance)


@torch.no_grad()
def test_gates_and_their_cost() -> None:
    network = whole()
    embeddings: list[Tensor] = []
    network.time_embed.register_forward_hook(lambda module, args, output: embeddings.append(output))
    with tokens_of(network) as tokens:
        network(MODEL["in/x"], MODEL["in/t"], MODEL["in/y"])
    gates = network.dynamic.evaluated(embeddings[0])
    assert_same_gates(gates[0::2], MODEL["eval/head_mask"])
    assert_same_gates(gates[1::2], MODEL["eval/group_mask"])
    assert_same_gates(tokens, MODEL["eval/token_mask"])
    kept = {site.path: mask.float().mean((1, 2)) for site, mask in zip(network.dynamic.sites, tokens, strict=True)}
    ratio = costs(network).ratio(network.dynamic, gates, kept).mean().reshape(1)
    assert_close(ratio, MODEL["eval/active_ratio"], 1e-6)
    assert_close(flops_loss(ratio), MODEL["eval/flops_loss"], 1e-6)


def diffusion_terms(network: Any, dropped: str) -> DiffusionTerms:
    data, noise, t = MODEL["in/x0"], MODEL["in/noise"], MODEL["in/t_train"]
    labels = torch.where(MODEL[f"train_noise/{dropped}"], MODEL.notes["null_class"], MODEL["in/y"])
    state = DIT.noised(data, noise, t)
    assert_close(state, MODEL["train/x_t"], 1e-6)
    return DIT.terms(network(state, t, labels).sample, data, noise, t)


def test_training_loss() -> None:
    """Both passes, with their own label drops, and the cost, in one backward pass."""
    network = whole().train()
    with tokens_of(network) as tokens:
        dynamic = diffusion_terms(network, "label_drop_mask")
    masks = network.dynamic.masks
    assert_same_gates([mask.detach() for mask in masks[0::2]], MODEL["train/head_mask"])
    assert_same_gates([mask.detach() for mask in masks[1::2]], MODEL["train/group_mask"])
    assert_same_gates([mask.detach() for mask in tokens], MODEL["train/token_mask"])
    kept = network.dynamic.kept_tokens(len(MODEL["in/x0"]))
    ratio = costs(network).ratio(network.dynamic, masks, kept).mean().reshape(1)
    with network.dynamic.complete():
        complete = diffusion_terms(network, "label_drop_mask_complete")
    assert_close(dynamic.mse.detach(), MODEL["train/terms/mse"], 1e-5)
    assert_close(complete.mse.detach(), MODEL["train/terms/complete_mse"], 1e-5)
    assert_close(dynamic.vb.detach(), MODEL["train/terms/vb"], 1e-5, relative=1e-4)
    assert_close(complete.vb.detach(), MODEL["train/terms/complete_vb"], 1e-5, relative=1e-4)
    assert_close(dynamic.loss.detach(), MODEL["train/terms/loss"], 1e-5, relative=1e-4)
    assert_close(ratio.detach(), MODEL["train/active_ratio"], 1e-6)
    assert_close(flops_loss(ratio).detach(), MODEL["train/flops_loss"], 1e-6)
    total = dynamic.loss.mean() + complete.loss.mean() + flops_loss(ratio)
    assert_close(total.detach(), MODEL["train/total"], 1e-5)
    total.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    found, expected = dydit_to_official(gradients), MODEL.group("train/grad/")
    assert len(expected) == 5
    for name, value in expected.items():
        assert_close(found[name], value, 1e-5, relative=1e-4)


def test_official_weights_there_and_back() -> None:
    found, given = whole().to_official(), MODEL.group("sd/")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
