"""FlowTurbo's velocity refiner (arXiv 2409.18128): a one-block network that corrects a reused velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from flowaccel.hooks import Call, Pipeline, denoiser, lend, session_of
from flowaccel.methods.flowturbo.refinement import refined
from flowaccel.models import convention_of, stock_class
from flowaccel.models.attention import attend_like
from flowaccel.recipe.accelerator import Accelerator, Detach
from flowaccel.recipe.compatibility import Tag
from flowaccel.recipe.loading import beside, load_network
from flowaccel.recipe.sampler import Sampler
from flowaccel.recipe.serialization import learned
from flowaccel.samplers import Blocks

FOLDER = "refiner"
# what the refiner must share with its base, because both are called with the same arguments
_SHARED = (
    "sample_size",
    "patch_size",
    "num_classes",
    "null_class",
    "joint_attention_dim",
    "pooled_projection_dim",
    "cross_attention_dim",
    "caption_channels",
    "guidance_embeds",
    "axes_dims_rope",
)


@dataclass(frozen=True)
class VelocityRefiner(Accelerator):
    """Accelerator that lets a small refiner replace the network on the R steps of a `FlowTurboScheduler`.

    For every row of the batch the accelerated call returns the guided velocity of before plus the refiner's offset for
    that row, so that the pipeline's own guidance yields v + r(null) + s * (r(y) - r(null)), whatever its guidance
    layout.

    Args:
        refiner: the refiner, or the folder it was saved to; None takes the folder `refiner` beside the pipeline's
            components.

    Raises:
        TypeError: `refiner` is none of these.
    """

    name: ClassVar[str] = "velocity_refiner"

    refiner: nn.Module | str | Path | None = learned(FOLDER, lambda folder: load_refiner(folder), default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.refiner, (nn.Module, str, Path, type(None))):
            raise TypeError(f"refiner must be a module, a folder or None, got {type(self.refiner).__name__}")

    @property
    def tags(self) -> frozenset[str]:
        """Those of every accelerator, and that it works on the sampler's R steps."""
        return super().tags | {Tag.REFINER}

    def attach(self, pipe: Pipeline) -> Detach:
        """Wrap the network's calls, and pass the refiner to the scheduler."""
        network, scheduler = denoiser(pipe), pipe.scheduler
        _check_scheduler(scheduler)
        refiner = self.resolve(pipe)
        check_refiner(refiner, network)
        if refiner.dtype != network.dtype:  # asked first, because diffusers warns at every cast
            refiner.to(network.dtype)
        refiner.eval()
        put_back = attend_like(refiner, network)
        session = session_of(pipe)

        def interceptor(call_next: Callable[..., Any], call: Call) -> Any:
            refinement = getattr(session.pipe.scheduler, "refinement", None)
            if refinement is None:
                return call_next()
            device = call.arguments["hidden_states"].device
            if refiner.device != device:  # not at attach: an offloaded network is not where it computes
                refiner.to(device)
            call.record.what = "refined"
            feed, base = refinement.feed, refinement.base
            if call.kept is not None:  # `refined` repeats them for whole branches only; SiT steps both halves
                feed, base = (value[[place % len(value) for place in call.kept]] for value in (feed, base))
            return refined(refiner, convention_of(call.module), call.arguments, feed, base)

        remove = session.on_call(interceptor)
        take_back = lend(scheduler, "refiner", refiner)

        def detach() -> None:
            remove()
            put_back()
            take_back()

        return detach

    def resolve(self, pipe: Pipeline | None = None) -> nn.Module:
        """Return the refiner as a module, loaded if a folder was given."""
        if isinstance(self.refiner, nn.Module):
            return self.refiner
        if self.refiner is not None:
            return load_refiner(Path(self.refiner))
        advice = "train one with `flowaccel train refiner`, or pass VelocityRefiner(refiner=FOLDER)"
        return load_refiner(beside(pipe, FOLDER, "refiner", advice))

    def loaded(self, pipe: Pipeline) -> VelocityRefiner:
        """Return this accelerator with the refiner as a module."""
        return VelocityRefiner(self.resolve(pipe))


def _check_scheduler(scheduler: Any) -> None:
    blocks = getattr(scheduler, "blocks", None)
    if blocks is None or not blocks.refine:
        raise ValueError(
            f"VelocityRefiner works on the R steps of a FlowTurboScheduler, but the pipeline has a "
            f"{type(scheduler).__name__}{' without R steps' if blocks is not None else ''}; "
            "put Sampler('flowturbo', {'blocks': 'H2P4R2'}) before it"
        )


def new_refiner(network: Any) -> Any:
    """Create a refiner for `network`: its own class with one block and doubled input channels, returning 0 at first.

    Args:
        network: a `SiTTransformer2DModel` or a stock diffusers flow transformer (SD3, FLUX and others that have
            `in_channels`, `out_channels` and `num_layers`).
    """
    # Without diffusers' private entries: `_use_default_values` names arguments that from_config ignores.
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    overrides: dict[str, Any] = {
        "in_channels": 2 * config["in_channels"],
        "out_channels": config.get("out_channels") or config["in_channels"],
        "num_layers": 1,
    }
    if "num_single_layers" in config:
        overrides["num_single_layers"] = 0
    if "dual_attention_layers" in config:
        overrides["dual_attention_layers"] = tuple(i for i in config["dual_attention_layers"] if i < 1)
    refiner = stock_class(network).from_config({**config, **overrides})
    nn.init.zeros_(refiner.proj_out.weight)
    nn.init.zeros_(refiner.proj_out.bias)
    return refiner


def check_refiner(refiner: Any, network: Any) -> None:
    """Raise a ValueError that names every misfit between a refiner and its base network."""
    stock = stock_class(network)
    if type(refiner) is not stock:
        raise ValueError(
            f"the refiner is a {type(refiner).__name__}, the network a {stock.__name__}; they must be alike"
        )
    base = network.config
    wanted = {name: base[name] for name in _SHARED if name in base}
    wanted["in_channels"] = 2 * base["in_channels"]
    wanted["out_channels"] = base.get("out_channels") or base["in_channels"]
    misfits = [
        f"{name} is {refiner.config[name]}, must be {value}"
        for name, value in wanted.items()
        if refiner.config[name] != value
    ]
    if misfits:
        raise ValueError(f"the refiner does not fit the network: {'; '.join(misfits)}; train one for this network")


def load_refiner(folder: Path) -> nn.Module:
    """Load a refiner saved by `save_pretrained`, whatever its class; raises as `load_network` does."""
    return load_network(folder, "refiner")


def flowturbo(blocks: str, refiner_mode: str = "released") -> list[Accelerator]:
    """Return the parts of the presets `flowturbo-BLOCKS` and `flowturbo-BLOCKS-MODE`.

    These are the sampler, and the refiner where there are R steps.
    """
    sampler = Sampler("flowturbo", {"blocks": blocks, "refiner_mode": refiner_mode})
    return [sampler, VelocityRefiner()] if Blocks.parse(blocks).refine else [sampler]
