"""SiT with mediator attention (arXiv 2408.05710)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flowaccel.errors import UnsupportedModelError
from flowaccel.methods.mediators.attention import GridAttention, MediatorAttention, PlaceBiases, SoftmaxGridAttention
from flowaccel.methods.mediators.official import read_mediators, write_mediators
from flowaccel.methods.mediators.settings import MediatorSettings
from flowaccel.models.official import load_converted
from flowaccel.models.sit import SiTTransformer2DModel
from flowaccel.models.variants import VariantMixin


class MediatorSiTTransformer2DModel(VariantMixin, SiTTransformer2DModel):
    """`SiTTransformer2DModel` with mediator attention.

    `mediator_config` has the entries of `MediatorSettings`; None is the stock network.
    """

    argument = "mediator_config"
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        *SiTTransformer2DModel._skip_layerwise_casting_patterns,
        "mediator_biases",
        "place_biases",
        "dwc",
    ]

    @classmethod
    def settings_of(cls, given: Any) -> MediatorSettings | None:
        """Return the settings of a configuration entry; None stays None."""
        return None if given is None else MediatorSettings.of(given)

    def install(self, settings: MediatorSettings | None) -> None:
        """Replace the stock attention by mediator attention that keeps its projections."""
        self.register_to_config(mediator_config=None if settings is None else asdict(settings))
        if settings is None:
            return
        blocks: Any = self.transformer_blocks
        for index, counts in settings.blocks(len(blocks)).items():
            blocks[index].attn = mediated(blocks[index].attn, (self.grid_size, self.grid_size), counts, settings)

    def set_attention_backend(self, backend: str) -> None:
        """Set the attention backend as diffusers does.

        Raises:
            ValueError: a backend that cannot add the position biases.
        """
        for module in self.modules():
            if isinstance(module, GridAttention):
                module.check_backend(backend)
        super().set_attention_backend(backend)

    def routing(self) -> list[Tensor]:
        """Return an empty list, since no weights take part in decisions."""
        return []

    @classmethod
    def from_base(cls, base: nn.Module, settings: MediatorSettings | dict[str, Any] | None = None) -> Any:
        """Build a network with mediators that shares the weights of a softmax network, which is not changed.

        It does not compute what `base` computes and has to be trained: biases and the convolution start at 0.

        Args:
            base: a `SiTTransformer2DModel`.
            settings: settings of the mediators.

        Raises:
            UnsupportedModelError: another network, or another form of it.
            ValueError: settings that are not known or do not fit.
        """
        if type(base) is not cls.stock:
            raise UnsupportedModelError(
                f"mediators are put into a {cls.stock.__name__}, got a {type(base).__name__}; give the stock network"
            )
        network = cls.sharing_parameters(base)
        cls.install(network, MediatorSettings.of(settings))
        with torch.no_grad():
            for layer in (module for module in network.modules() if isinstance(module, GridAttention)):
                for name, parameter in layer.named_parameters():
                    if not name.startswith("to_"):
                        parameter.zero_()
        return network

    def resized(self, sample_size: int) -> Self:
        """Return this network for images of another size, as a start for training.

        The position table is new, the bias columns are interpolated, and all else is copied.

        Raises:
            ValueError: a size that the patch size does not divide, with fewer tokens than mediators, or a network with
                full attention in its place.
        """
        if any(isinstance(module, SoftmaxGridAttention) for module in self.modules()):
            raise ValueError("counts=None has a bias for every token of one size, and cannot be resized")
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        other = type(self)(**{**config, "sample_size": sample_size})
        grid = (other.grid_size, other.grid_size)
        state = {name: value for name, value in self.state_dict().items() if name != "pos_embed"}
        for path, biases in self.named_modules():
            if isinstance(biases, PlaceBiases):
                state |= {f"{path}.{name}": value for name, value in biases.resized(grid).state_dict().items()}
        other.load_state_dict(state | {"pos_embed": other.pos_embed.data})
        return other.to(self.device, self.dtype).train(self.training)

    @classmethod
    def from_official(
        cls, path_or_state_dict: str | Path | dict[str, Tensor], which: str | None = None, **overrides: Any
    ) -> Self:
        """Load a checkpoint in the layout of the official Attention-Mediators repository.

        Args:
            path_or_state_dict: as for `SiTTransformer2DModel.from_official`.
            which: take this entry of a training checkpoint.
            overrides: constructor arguments that the weights do not tell, such as `num_attention_heads`.

        Raises:
            CheckpointError: a truncated, foreign or hostile file, weights that do not fit, or a network without
                mediators; nothing is changed.
        """
        config, state = read_mediators(path_or_state_dict, which, overrides)
        model = cls(**config)
        load_converted(model, state)
        return model.eval()

    def to_official(self) -> dict[str, Tensor]:
        """Return this network's weights under the official key names.

        Raises:
            ValueError: different numbers of mediators, or parts left out that the layout has.
        """
        return write_mediators(self)


def mediated(
    attention: Any, grid: tuple[int, int], counts: tuple[int, ...] | None, settings: MediatorSettings
) -> GridAttention:
    """Return mediator attention that keeps the projections of a stock one."""
    weight, bias = attention.to_q.weight, attention.to_q.bias is not None
    options = {"use_bias": settings.use_bias, "use_dwc": settings.use_dwc, "bias": bias}
    width, heads = attention.to_q.in_features, attention.heads
    layer: GridAttention
    if counts is None:
        layer = SoftmaxGridAttention(width, heads, grid, **options)
    else:
        layer = MediatorAttention(width, heads, grid, counts, **options)
    layer.to(weight.device, weight.dtype)
    for name in ("to_q", "to_k", "to_v", "to_out"):
        setattr(layer, name, getattr(attention, name))
    return layer


def mediator_layers(network: nn.Module) -> dict[str, MediatorAttention]:
    """Return the mediator attention layers of a network, by name."""
    return {path: module for path, module in network.named_modules() if isinstance(module, MediatorAttention)}


def check_mediators(network: nn.Module, count: int) -> None:
    """Raise unless all layers can use `count` mediators.

    Raises:
        ValueError: one cannot.
    """
    layers = mediator_layers(network).values()
    for layer in layers:
        try:
            layer.check(count)
        except ValueError as error:
            if len({layer.counts for layer in layers}) == 1:
                raise
            own = [layer.counts[-1] for layer in layers]
            raise ValueError(
                f"{error}; this network's layers have numbers of their own, {own}, which they use when none is given"
            ) from error


def set_mediators(network: nn.Module, count: int | None) -> None:
    """Set how many mediators the layers use.

    All use the same number or, with None, each the most that it was made for.

    Raises:
        ValueError: a number that a layer cannot use; nothing is changed.
    """
    if count is not None:
        check_mediators(network, count)
    for layer in mediator_layers(network).values():
        layer.count = layer.counts[-1] if count is None else count
