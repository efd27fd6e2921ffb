"""Our experts compute what the official DiffMoE does: choices, outputs, losses, thresholds and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.experts import ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel
from flowaccel.methods.moe.official import diffmoe_to_official, layer_from_official, layer_to_official
from flowaccel.methods.moe.settings import MoESettings
from flowaccel.pipelines.sit_blocks import guide
from flowaccel.samplers.paths import LINEAR, flow_loss
from helpers import Golden, assert_close, golden, with_recorded_times

LAYERS = ("diffmoe_layer", "diffmoe_layer_shared", "diffmoe_layer_swiglu")
MODEL = golden("diffmoe_model")
GUIDED_CHANNELS = 3
EXACT = {"atol": 0, "rtol": 0}
ACTIVATIONS = {"gelu_tanh": "gelu-approximate", "swiglu": "swiglu"}

each_layer = pytest.mark.parametrize("name", LAYERS)
each_precision = pytest.mark.parametrize(
    ("dtype", "suffix", "tolerance"), [(torch.float32, "", 1e-5), (torch.float64, "64", 1e-9)], ids=["32", "64"]
)


# --- one layer


def one_layer(file: Golden, dtype: torch.dtype = torch.float32, threshold: str | None = None) -> MoEFeedForward:
    """The file's layer in evaluation with the published choice, with the thresholds `threshold`."""
    dim, activation = file.config["dim"], ACTIVATIONS[file.config["act"]]
    settings = MoESettings(
        num_experts=file.config["E"],
        capacity=file.config["capacity"],
        shared_inner_dim=8 * dim if file.config["shared"] else None,
        threshold_momentum=file["sd/ema_decay"].item(),  # a float32 there, which counts in float64
        inference_selection="gate_topk_count",
    )
    bias = activation != "swiglu"
    shape = ExpertShape(dim=dim, inner_dim=file.config["hidden"], activation_fn=activation, bias=bias)
    layer = MoEFeedForward(settings, shape)
    given = {} if threshold is None else {"expert_threshold": file[threshold]}
    layer.load_state_dict(layer_from_official(file.group("sd/") | given))
    return layer.to(dtype).eval()


def predictions(layer: Any) -> list[Tensor]:
    """A list that the capacity predictor's logits (S, E) are appended to with every call."""
    found: list[Tensor] = []
    layer.capacity_predictor[2].register_forward_hook(lambda module, args, output: found.append(output.detach()))
    return found


def chosen(layer: MoEFeedForward, like: Tensor) -> Tensor:
    """What the last call chose, of the shape of `like` (B, L, E)."""
    assert layer.plan is not None
    return layer.plan.mask(like[..., 0].numel()).view(like.shape)


@each_layer
@each_precision
def test_layer_in_training(name: str, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    file = golden(name)
    layer = one_layer(file, dtype).train()
    logits = predictions(layer)
    output = layer(file["in/x_train"].to(dtype))
    assert_close(output.detach(), file[f"train{suffix}/output"], tolerance)
    torch.testing.assert_close(chosen(layer, file["train/selected"]).float(), file["train/selected"], **EXACT)
    assert_close(logits[0].view_as(file["train/selected"]), file[f"train{suffix}/capacity_logits"], tolerance)
    assert layer.aux_loss is not None
    assert_close(layer.aux_loss.reshape(1), file[f"train{suffix}/predictor_loss"], tolerance)


@each_layer
@each_precision
def test_thresholds_in_training(name: str, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    """Upstream's averages start from 0, where ours start from the first value."""
    file = golden(name)
    layer = one_layer(file, dtype).train()
    for step, batch in enumerate(("x_train", "x_train2", "x_train"), 1):
        layer(file[f"in/{batch}"].to(dtype))
        if step == 1:
            assert int(layer.thresholds.updates) == 0
            assert not layer.thresholds.predictor.any()
            layer.thresholds.updates.fill_(1)
        layer.commit()
        assert_close(layer.thresholds.predictor, file[f"train{suffix}/threshold_after_{step}"], tolerance)


@each_layer
def test_gradients_of_a_layer(name: str) -> None:
    """The router's own loss reaches the predictor without being added to the loss, and nothing else."""
    file = golden(name)
    layer = one_layer(file).train()
    x = file["in/x_train"].clone().requires_grad_()
    (layer(x) * file["in/cotangent"]).sum().backward()
    assert x.grad is not None
    found = layer_to_official({key: parameter.grad for key, parameter in layer.named_parameters()})
    expected = file.group("train/grad/")
    assert found.keys() | {"x"} == expected.keys()
    for key, value in (found | {"x": x.grad}).items():
        assert_close(value, expected[key], 1e-5, relative=1e-4)


@each_layer
@each_precision
@torch.no_grad()
def test_published_inference(name: str, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    file = golden(name)
    layer = one_layer(file, dtype, threshold="in/eval_threshold")
    logits = predictions(layer)
    x = file["in/x_eval"].to(dtype)
    assert_close(layer(x), file[f"eval{suffix}/output"], tolerance)
    assert layer.plan is not None
    assert torch.equal(layer.plan.counts.long(), file["eval/counts"])
    assert torch.equal(chosen(layer, file["eval/selected"]), file["eval/selected"])
    assert_close(logits[0].view_as(file["eval/selected"]), file["eval/capacity_logits"], 1e-5)
    for i, image in enumerate(x):
        alone = file["eval/selected_one_by_one"][i : i + 1]
        assert_close(layer(image[None])[0], file[f"eval{suffix}/output_one_by_one"][i], tolerance)
        assert torch.equal(layer.plan.counts.long(), file["eval/counts_one_by_one"][i])
        assert torch.equal(chosen(layer, alone), alone)


@pytest.mark.parametrize(("name", "differing"), [(LAYERS[0], 60), (LAYERS[1], None), (LAYERS[2], None)])
@torch.no_grad()
def test_our_inference_is_another_rule(name: str, differing: int | None) -> None:
    """A token takes the experts whose threshold its prediction is above. By the files' description, 60 decisions of
    the first layer are then others than the published ones."""
    file = golden(name)
    layer = one_layer(file, torch.float64, threshold="in/eval_threshold")
    layer.choose_by("predictor_mask")
    x = file["in/x_eval"].double()
    output = layer(x)
    taken = chosen(layer, file["eval/selected"])
    assert torch.equal(taken, file["eval/capacity_logits"].sigmoid() > file["in/eval_threshold"])
    changed = int((taken != file["eval/selected"]).sum())
    assert changed > 0
    assert differing in (None, changed)
    assert_close(output, by_definition(file, x, taken), 1e-9)
    assert_close(torch.cat([layer(image[None]) for image in x]), output, 1e-9)


def by_definition(file: Golden, x: Tensor, taken: Tensor) -> Tensor:
    """Every expert on every token (B, L, D), weighted by the gate where `taken` (B, L, E)."""
    weights = {key: value.double() for key, value in file.group("sd/").items()}
    gates = (x @ weights["gate_weight"].t()).softmax(-1) * taken
    experts = [_feed_forward(weights, f"experts.{expert}.", x) for expert in range(file.config["E"])]
    total = torch.einsum("ble,eblD->blD", gates, torch.stack(experts))
    return total + (_feed_forward(weights, "shared_experts.", x) if file.config["shared"] else 0)


def _feed_forward(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if "up_proj.weight" in own:
        hidden = torch.nn.functional.silu(x @ own["gate_proj.weight"].t()) * (x @ own["up_proj.weight"].t())
        return hidden @ own["down_proj.weight"].t()
    hidden = torch.nn.functional.gelu(x @ own["fc1.weight"].t() + own["fc1.bias"], approximate="tanh")
    return hidden @ own["fc2.weight"].t() + own["fc2.bias"]


# --- a whole network


def whole(dtype: torch.dtype = torch.float32) -> Any:
    """In float64 with the features of time as recorded, in float32 with its own."""
    network = MoESiTTransformer2DModel.from_official(
        MODEL.group("sd/") | MODEL.group("in/threshold/"),
        num_attention_heads=MODEL.config["num_heads"],
        moe_config={
            "capacity": MODEL.config["MoE_config"]["capacity"],
            "inference_selection": "gate_topk_count",
            "threshold_momentum": MODEL["sd/blocks.1.mlp.ema_decay"].item(),
        },
    )
    return with_recorded_times(network.to(dtype)) if dtype == torch.float64 else network


def layers_of(network: Any) -> dict[int, Any]:
    """Those with experts, by the number of their block."""
    return {int(path.split(".")[1]): layer for path, layer in moe_layers(network).items()}


def test_configuration_is_read_from_the_weights() -> None:
    network = whole()
    assert list(layers_of(network)) == MODEL.notes["moe_blocks"]
    assert network.config.moe_config["layers"] == "odd"
    assert network.config.moe_config["num_experts"] == MODEL.config["MoE_config"]["num_experts"]
    assert network.config.mlp_ratio == MODEL.config["mlp_ratio"]
    assert network.config.out_channels == 2 * MODEL.config["in_channels"]
    assert network.null_label == MODEL.notes["null_class"]


@each_precision
@torch.no_grad()
def test_forward(dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    output = whole(dtype)(MODEL["in/xt"].to(dtype), MODEL["in/t"], MODEL["in/y"]).sample
    assert_close(output, MODEL[f"eval{suffix}/forward"], tolerance)


@each_precision
@torch.no_grad()
def test_forward_with_guidance(dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    x, t, labels = MODEL["in/xt"].to(dtype), MODEL["in/t"], MODEL["in/y"]
    null = torch.full_like(labels, MODEL.notes["null_class"])
    output = whole(dtype)(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).sample
    guided = guide(output, MODEL.notes["cfg_scale"], GUIDED_CHANNELS)
    assert_close(guided, MODEL[f"eval{suffix}/forward_with_cfg"], tolerance)


@each_precision
def test_training_loss(dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    """Gradients of the predictors come from losses that nobody added up."""
    network = whole(dtype).train()
    layers = layers_of(network)
    logits = {block: predictions(layer) for block, layer in layers.items()}
    data, noise, t = MODEL["in/x1"].to(dtype), MODEL["train/x0"].to(dtype), MODEL["train/t"].to(dtype)
    labels = torch.where(MODEL["train/drop_mask"], MODEL.notes["null_class"], MODEL["in/y"])
    output = network(LINEAR.interpolate(data, noise, t), MODEL["train/t"], labels).sample
    assert_close(output.detach(), MODEL[f"train{suffix}/network_output"], tolerance)
    terms = f"train{suffix}/loss_terms"
    velocity = output.chunk(2, dim=1)[0]
    losses = flow_loss(LINEAR, velocity, data, noise, t)
    assert_close(losses.detach(), MODEL[f"{terms}/mse"], tolerance)
    for block, layer in layers.items():
        selected = MODEL[f"train/selected_{block}"]
        torch.testing.assert_close(chosen(layer, selected).float(), selected, **EXACT)
        assert_close(logits[block][0].view_as(selected), MODEL[f"train/capacity_logits_{block}"], 1e-5)
        assert_close(layer.aux_loss.reshape(1), MODEL[f"{terms}/Capacity_Pred_loss_{block}"], tolerance)
    own = sum(layer.aux_loss for layer in layers.values()).reshape(1)
    assert_close(own, MODEL[f"{terms}/cp_loss"], tolerance)
    assert_close(losses.mean().detach() + own, MODEL[f"{terms}/loss"], tolerance)
    losses.mean().backward()
    assert_same_gradients(network)
    for block, layer in layers.items():
        layer.commit()
        assert_close(layer.thresholds.predictor, MODEL[f"train/updated/blocks.{block}.mlp.expert_threshold"], 1e-5)


def assert_same_gradients(network: Any) -> None:
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
    found, expected = diffmoe_to_official(gradients), MODEL.group("train/grad/")
    assert len(expected) == 5
    for name, value in expected.items():
        assert_close(found[name], value, 1e-5, relative=1e-4)


def test_official_weights_there_and_back() -> None:
    given = MODEL.group("sd/") | MODEL.group("in/threshold/")
    found = whole().to_official()
    assert found.keys() == given.keys()
    assert all(torch.equal(found[key], given[key]) for key in given)
