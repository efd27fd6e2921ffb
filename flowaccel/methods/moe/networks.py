"""Stock networks with experts in place of feed-forwards (DiffMoE, arXiv 2503.14487)."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from flowaccel.errors import CheckpointError, UnsupportedModelError
from flowaccel.methods.moe.control import moe_layers
from flowaccel.methods.moe.experts import ExpertModules, ExpertShape
from flowaccel.methods.moe.feed_forward import MoEFeedForward
from flowaccel.methods.moe.official import read_diffmoe, write_diffmoe
from flowaccel.methods.moe.settings import BY_TOKEN, MoESettings
from flowaccel.models.official import load_converted
from flowaccel.models.sit import SiTTransformer2DModel
from flowaccel.models.variants import VariantMixin

BLOCKS, FEED_FORWARD = "transformer_blocks", "ff"
"""Names of the feed-forwards that can have experts: those of blocks that modulate what they read. FLUX's single-stream
blocks have none of their own, and those of text stay dense."""


class MoEMixin(VariantMixin):
    """Mixin that adds experts to a stock network.

    The argument `moe_config` has the entries of `MoESettings`; None is the stock network.
    """

    argument = "moe_config"
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "gate",
        "gate_hidden",
        "capacity_predictor",
        "thresholds",
        "selection_bias",
    ]

    @classmethod
    def settings_of(cls, given: Any) -> MoESettings | None:
        """Return the settings of a configuration entry; None stays None."""
        return None if given is None else MoESettings.of(given)

    def install(self, settings: MoESettings | None) -> None:
        """Replace feed-forwards by new experts."""
        network: Any = self
        network.register_to_config(moe_config=None if settings is None else asdict(settings))
        if settings is None:
            return
        blocks = network.get_submodule(BLOCKS)
        for index in settings.blocks(len(blocks)):
            dense: FeedForward = getattr(blocks[index], FEED_FORWARD)
            setattr(blocks[index], FEED_FORWARD, MoEFeedForward.of(dense, settings))

    def routing(self) -> list[Tensor]:
        """Return the tensors of gates, capacity predictors, thresholds and selection biases."""
        network: Any = self
        return [
            tensor
            for layer in moe_layers(network).values()
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
            if name.partition(".")[0] in self._keep_in_fp32_modules
        ]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the network as diffusers does.

        Raises:
            ValueError: the experts are unpacked, and `from_pretrained` would not find them.
        """
        network: Any = self
        unpacked = [path for path, layer in moe_layers(network).items() if isinstance(layer.experts, ExpertModules)]
        if unpacked:
            raise ValueError(
                f"the experts of {unpacked[0]} are unpacked, and are saved packed: fuse and unload adapters, and call "
                "flowaccel.methods.moe.control.pack_experts(network) first; an adapter alone is saved with "
                "save_lora_adapter"
            )
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a network as diffusers does.

        Raises:
            CheckpointError: weights of other shapes than the configuration says, such as those of another number of
                experts.
        """
        try:
            return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if "expected shape" not in str(error):
                raise
            reason = str(error).partition(". If you want")[0].strip().replace("Cannot load  because ", "")
            raise CheckpointError(
                f"the weights are not those of a network with this configuration: {reason}. num_experts, inner_dim and "
                "shared_inner_dim of moe_config must be what the weights were saved with; for another number of "
                "experts, start from a dense network with flowaccel.methods.moe.networks.upcycle_to_moe"
            ) from error

    @classmethod
    def from_base(cls, base: nn.Module, settings: MoESettings | dict[str, Any]) -> Any:
        """Build a network with new experts that shares the other weights of `base`, which is not changed.

        Args:
            base: a network of the class that this one is a form of.
            settings: settings of the experts.

        Raises:
            ValueError: settings that are not known or do not fit.
        """
        network = cls.sharing_parameters(base)
        cls.install(network, MoESettings.of(settings))
        return network


class MoESiTTransformer2DModel(MoEMixin, SiTTransformer2DModel):
    """`SiTTransformer2DModel` with experts.

    A published size: `MoESiTTransformer2DModel.from_preset("SiT-S/2", moe_config={"num_experts": 16})`.
    """

    @classmethod
    def from_official(
        cls, path_or_state_dict: str | Path | dict[str, Tensor], which: str | None = None, **overrides: Any
    ) -> Self:
        """Load a checkpoint in the layout of the official DiffMoE repository.

        All computed channels are returned, as there: with learned variance the second half is to be dropped for flow
        models. Thresholds that are all 0 count as never fitted. In the `ema` entry of a training checkpoint, those of
        the first ten thousands of steps lag behind the weights, because they were averaged like these, from 0: fit them
        again with `flowaccel.methods.moe.train.calibrate_thresholds`.

        Args:
            path_or_state_dict: as for `SiTTransformer2DModel.from_official`.
            which: take this entry of a training checkpoint.
            overrides: constructor arguments that the weights do not tell: `num_attention_heads` for a width that no
                published size has, `out_channels`, and entries of `moe_config` such as `capacity`.

        Raises:
            CheckpointError: a truncated, foreign or hostile file, weights that do not fit, or a network without
                experts; nothing is changed.
        """
        config, state = read_diffmoe(path_or_state_dict, which, overrides)
        model = cls(**config)
        load_converted(model, state)
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """Return this network's weights under the official key names.

        The dict is new; tensors are shared where they are unchanged.

        Raises:
            ValueError: a router other than `diffmoe`, or parts that the layout has no name for.
        """
        return write_diffmoe(self)


class MoEDiTTransformer2DModel(MoEMixin, DiTTransformer2DModel):
    """`DiTTransformer2DModel` with experts."""


class MoESD3Transformer2DModel(MoEMixin, SD3Transformer2DModel):
    """`SD3Transformer2DModel` with experts for image tokens."""


class MoEFluxTransformer2DModel(MoEMixin, FluxTransformer2DModel):
    """`FluxTransformer2DModel` with experts for image tokens of its double-stream blocks."""


MOE: dict[str, type[MoEMixin]] = {
    kind.stock.__name__: kind
    for kind in (
        MoESiTTransformer2DModel,
        MoEDiTTransformer2DModel,
        MoESD3Transformer2DModel,
        MoEFluxTransformer2DModel,
    )
}
"""Classes with experts by the class name of the stock network."""


def moe_class(base: nn.Module) -> type[MoEMixin]:
    """Return the class with experts that corresponds to a stock network's class.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = type(base).__name__
    if name not in MOE:
        raise UnsupportedModelError(
            f"{name} has no form with experts; there is one for {', '.join(MOE)}. A family is a class in "
            "flowaccel/methods/moe/networks.py"
        )
    return MOE[name]


def upcycle_to_moe(base: nn.Module, settings: MoESettings | dict[str, Any], method: str = "copies") -> Any:
    """Return a network with experts that computes the same as a dense one, as a start for further training.

    - `copies`: every expert is a copy of the dense feed-forward. Exact where the weights of a token sum to 1: with
      `token_choice`, `dit_moe` and `deepseek` they are normalised; the others start at a capacity of all experts
      (`layer.capacity`), from where a schedule leads to that of the settings.
    - `shared`: the dense feed-forward stays, as the shared one, and experts beside it start at 0. Exact with every
      router; costs the experts' work on top.

    Args:
        base: a dense network; it stays as it is, and its other weights are shared.
        settings: settings of the experts. `shared_inner_dim` is set by the method `shared`; `inner_dim` may then be
            less than that of the dense feed-forward.
        method: `copies` or `shared`.

    Raises:
        UnsupportedModelError: no form with experts for its class.
        ValueError: settings that are not known, or with which the method would not be exact.
    """
    settings = MoESettings.of(settings)
    kind = moe_class(base)
    if method not in ("copies", "shared"):
        raise ValueError(f"method must be 'copies' or 'shared', got {method!r}")
    blocks: Any = base.get_submodule(BLOCKS)
    dense = {index: getattr(blocks[index], FEED_FORWARD) for index in settings.blocks(len(blocks))}
    shape = ExpertShape.of(next(iter(dense.values())))
    for name in ("activation_fn", "bias"):
        if getattr(settings, name) not in (None, getattr(shape, name)):
            raise ValueError(
                f"{name} must be that of the dense feed-forward, {getattr(shape, name)!r}, for its weights to fit, got "
                f"{getattr(settings, name)!r}; leave it out"
            )
    settings = (_for_copies if method == "copies" else _for_shared)(settings, shape.inner_dim)
    network = kind.from_base(base, settings)
    for index, feed_forward in dense.items():
        layer: MoEFeedForward = getattr(network.get_submodule(BLOCKS)[index], FEED_FORWARD)
        (_fill_copies if method == "copies" else _fill_shared)(layer, feed_forward)
    return network


def _for_copies(settings: MoESettings, width: int) -> MoESettings:
    if settings.inner_dim not in (None, width) or settings.shared_inner_dim is not None:
        raise ValueError(
            f"method='copies' makes experts as wide as the dense feed-forward, {width}, and no shared one; got "
            f"inner_dim={settings.inner_dim}, shared_inner_dim={settings.shared_inner_dim}: use method='shared'"
        )
    by_token = settings.router in BY_TOKEN
    if not by_token and settings.scores != "softmax":
        raise ValueError(
            f"method='copies' needs weights that sum to 1, and router={settings.router!r} has score_fn="
            f"{settings.scores!r}; use method='shared'"
        )
    if by_token and settings.norm_topk is False:
        raise ValueError("method='copies' needs norm_topk=True, so that the weights of a token sum to 1")
    if settings.routed_scale != 1:
        raise ValueError(f"method='copies' needs routed_scale=1, got {settings.routed_scale}")
    return replace(settings, norm_topk=True) if by_token else settings


def _fill_copies(layer: MoEFeedForward, dense: FeedForward) -> None:
    for expert in range(len(layer.experts)):
        layer.experts.copy_(expert, dense)
    if not layer.settings.normalised:
        layer.capacity = float(len(layer.experts))


def _for_shared(settings: MoESettings, width: int) -> MoESettings:
    if settings.shared_inner_dim not in (None, width):
        raise ValueError(
            f"method='shared' keeps the dense feed-forward of width {width}, got "
            f"shared_inner_dim={settings.shared_inner_dim}; leave it out"
        )
    return replace(settings, shared_inner_dim=width)


def _fill_shared(layer: MoEFeedForward, dense: FeedForward) -> None:
    assert layer.shared is not None
    layer.shared.load_state_dict(dense.state_dict())
    with torch.no_grad():
        layer.experts.w_out.zero_()
        if layer.experts.b_out is not None:
            layer.experts.b_out.zero_()
