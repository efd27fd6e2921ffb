"""Settings of a network's experts that can be changed after it was built."""

from __future__ import annotations

from torch import nn

from flowaccel.methods.moe.experts import BACKENDS, ExpertModules, Experts
from flowaccel.methods.moe.feed_forward import MoEFeedForward


def moe_layers(network: nn.Module) -> dict[str, MoEFeedForward]:
    """Return the feed-forwards of a network that have experts, by name."""
    return {path: module for path, module in network.named_modules() if isinstance(module, MoEFeedForward)}


def set_experts_backend(network: nn.Module, name: str) -> None:
    """Set how experts are run.

    `auto` chooses; `loop` runs one after the other, `bmm` all at once where they have equally many tokens, `grouped_mm`
    all at once with torch's `grouped_mm`. What does not run on given types and shapes falls back to `loop`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, got {name!r}")
    for layer in moe_layers(network).values():
        layer.experts.backend = name


def set_moe_capacity(network: nn.Module, capacity: float | None) -> None:
    """Set how many experts a token takes on average in inference; None restores the capacity of the training.

    Raises:
        ValueError: a router without thresholds; nothing was fitted for other capacities yet; or a capacity out of
            range.
    """
    layers = moe_layers(network)
    for path, layer in layers.items():
        if capacity is not None and not layer.settings.thresholded:
            raise ValueError(
                f"capacity cannot be set after training: {path} has router={layer.settings.router!r}, where every "
                "token or expert takes equally many"
            )
    for layer in layers.values():
        layer.thresholds.use(capacity)


def set_moe_selection(network: nn.Module, selection: str) -> None:
    """Set how the `diffmoe` router chooses in inference, see `MoESettings.inference_selection`.

    Raises:
        ValueError: another router, or an unknown way.
    """
    for layer in moe_layers(network).values():
        layer.choose_by(selection)


def set_moe_budget(network: nn.Module, budget: float | None) -> None:
    """Limit an expert to `budget * L / E` of the L tokens of a sample in inference; None removes the limit.

    Shapes are then static, as compiled networks and CUDA graphs need.

    Raises:
        ValueError: a budget that is not positive.
    """
    if budget is not None and not budget > 0:
        raise ValueError(f"budget must be positive, or None for no bound, got {budget!r}")
    for layer in moe_layers(network).values():
        layer.budget = budget


def set_aux_loss_scale(network: nn.Module, scale: float) -> None:
    """Set the factor on the gradients of the routers' own losses.

    It is 1 / N where the rest of the loss is divided by N accumulation steps, times the scale of a gradient scaler.

    Raises:
        ValueError: a scale that is not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale!r}")
    for layer in moe_layers(network).values():
        layer.aux_loss_scale = scale


def unpack_experts(network: nn.Module) -> None:
    """Convert experts to modules with `nn.Linear` layers, which LoRA and quantisers find.

    The layers are `experts.E.proj_in` and `.proj_out`. They share the packed weights until they are moved.
    """
    for layer in moe_layers(network).values():
        if isinstance(layer.experts, Experts):
            layer.experts = ExpertModules(layer.experts).train(layer.training)


def pack_experts(network: nn.Module) -> None:
    """Undo `unpack_experts`, with the current weights.

    Raises:
        ValueError: layers that are no plain `nn.Linear` any more; nothing is changed.
    """
    packed = {
        path: layer.experts.packed()
        for path, layer in moe_layers(network).items()
        if isinstance(layer.experts, ExpertModules)
    }
    for path, experts in packed.items():
        network.get_submodule(path).experts = experts
