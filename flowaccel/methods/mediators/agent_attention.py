"""Agent Attention (arXiv 2312.08874) in self-attention at high resolution, without training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from flowaccel.checks import check_whole
from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import Call, CallStats, Pipeline, Session, is_present, networks, session_of
from flowaccel.methods.mediators.agents import AgentAttnProcessor, AgentSwitch
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.calibration import warn_once


@dataclass(frozen=True)
class AgentAttention(Accelerator):
    """Accelerator that uses agents in large self-attentions in the first steps (Agent Attention, arXiv 2312.08874).

    The agents are pooled queries.

    For networks of `BasicTransformerBlock`s (UNets of Stable Diffusion, DiT, PixArt). The released form for Stable
    Diffusion without two of its parts: agents are means over square cells, where it merges similar tokens, and no
    tokens are merged besides. An approximation, whose error depends on the model: look at it with `flowaccel
    evaluate`. It pays only where attention itself is most of the work.

    Args:
        stride: side of the cells, in tokens; attention costs 2 / stride**2 of what it did.
        first: the share of the steps, from the first on, that it is used in; published are 20 of 50. 0 is never.
        min_tokens: the fewest tokens of a layer that it is used in; below 4096 it does not pay.

    Raises:
        ValueError: out of range.
    """

    name: ClassVar[str] = "agent_attention"
    within_calls = True

    stride: int = 4
    first: float = 0.4
    min_tokens: int = 4096

    def __post_init__(self) -> None:
        check_whole(self, stride=2, min_tokens=1)
        if not 0 <= self.first <= 1:
            raise ValueError(f"first must be a share of the steps, from 0 to 1, got {self.first!r}")

    def attach(self, pipe: Pipeline) -> Detach:
        """Replace the stock attention processors; detaching restores them.

        Raises:
            UnsupportedModelError: a network without such self-attention.
            RecipeConflictError: other processors than diffusers' stock ones are in place.
        """
        found = {network: self_attentions(network) for network in networks(pipe).values()}
        for network, layers in found.items():
            _check(network, layers)
        with ExitStack() as undo:
            session = session_of(pipe)
            for network, layers in found.items():
                switch = AgentSwitch(self.stride, self.min_tokens)
                for path, layer in layers.items():
                    ours = AgentAttnProcessor(layer.processor, path, switch)
                    undo.callback(_put_back, layer, ours)
                    layer.processor = ours
                undo.callback(session.on_call(functools.partial(self._intercept, session, network, switch)))
            return undo.pop_all().close

    def _intercept(
        self, session: Session, network: nn.Module, switch: AgentSwitch, call_next: Callable[..., Any], call: Call
    ) -> Any:
        if call.module is not network or call.step >= round(self.first * call.run.num_steps):
            return call_next()
        switch.size, switch.largest = tuple(call.sample.shape[-2:]), 0
        switch.applies = functools.partial(is_present, call)
        switch.ran.clear()
        try:
            output = call_next()
        finally:
            switch.size, switch.applies = None, lambda: True
        if switch.ran:
            call.record.stats[self.name] = AgentStats(tuple(layer.path for layer in switch.ran))
        call.record.spared += sum(layer.macs_spared for layer in switch.ran)
        if 0 < switch.largest < self.min_tokens:
            warn_once(
                session.pipe,
                (self.name, self.min_tokens),
                f"{self.name} does nothing here: the largest self-attention has {switch.largest} tokens, and "
                f"min_tokens={self.min_tokens}; make larger images, or leave it out",
            )
        return output


def self_attentions(network: nn.Module) -> dict[str, Attention]:
    """Return the self-attentions `attn1` of transformer blocks whose processors can be swapped, by name.

    These have no norms and no residual of their own.
    """
    return {
        f"{path}.attn1": block.attn1
        for path, block in network.named_modules()
        if isinstance(block, BasicTransformerBlock) and _plain(block.attn1)
    }


def _plain(layer: Attention) -> bool:
    norms = (layer.spatial_norm, layer.group_norm, layer.norm_q, layer.norm_k)
    alone = not (layer.is_cross_attention or layer.residual_connection)
    return alone and layer.rescale_output_factor == 1 and all(norm is None for norm in norms)


def _check(network: nn.Module, layers: dict[str, Attention]) -> None:
    """Raise unless there are layers, and all of them have stock processors."""
    if not layers:
        raise UnsupportedModelError(
            f"{AgentAttention.name} is for networks with the self-attention of diffusers' BasicTransformerBlock, such "
            f"as UNet2DConditionModel and DiTTransformer2DModel; this {type(network).__name__} has none"
        )
    for path, layer in layers.items():
        if type(layer.processor) not in (AttnProcessor, AttnProcessor2_0):
            raise RecipeConflictError(
                f"{AgentAttention.name} takes the place of stock attention processors, and {path} has a "
                f"{type(layer.processor).__name__}; take that out first, such as by set_default_attn_processor() or "
                "unload_ip_adapter()"
            )


def _put_back(layer: Attention, ours: AgentAttnProcessor) -> None:
    if layer.processor is ours:  # else somebody chose another one since
        layer.processor = ours.stock


@dataclass
class AgentStats(CallStats):
    """Layers that used agent attention in a network call."""

    layers: tuple[str, ...]
    """Names in the network of the attention layers that ran with agents."""

    def __str__(self) -> str:
        return f", agents in {len(self.layers)} layers"

    @classmethod
    def summary(cls, stats: Sequence[AgentStats], calls: int, macs: str) -> str:
        """Return the number of calls that used agent attention."""
        left_out = f", {macs} left out" if macs else ""
        return f"Agents in the place of full attention in {len(stats)} of {calls} calls{left_out}."
