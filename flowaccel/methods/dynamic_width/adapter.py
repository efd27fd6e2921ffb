"""Adapters for a frozen backbone: routers, optionally a TD-LoRA, and the small file that stores them.

The parameter-efficient form of DyDiT++ (arXiv 2504.06803). Shapes: D width of the timestep embedding.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowaccel.errors import CheckpointError, WeightsNotFoundError
from flowaccel.methods.dynamic_width.networks import make_dynamic, time_embedding
from flowaccel.methods.dynamic_width.rules import rule_of
from flowaccel.methods.dynamic_width.settings import DynamicSettings
from flowaccel.methods.dynamic_width.td_lora import ADAPTER, TimedLoraSettings, inject_timed_lora, timed_layers

CONFIG_FILE, WEIGHTS_FILE = "config.json", "width_adapter.safetensors"
PROBES = 64
_TOLERANCE = 0.02
_STRIDE = 7_919
"""A prime: probes spread over a layer."""


def add_timed_lora(network: Any, settings: TimedLoraSettings | None = None) -> None:
    """Add a TD-LoRA to every gated layer: the attention projections and feed-forwards of all blocks.

    At first it adds nothing. Its weights have the type of the layers.

    Args:
        network: a dynamic network.
        settings: its size.

    Raises:
        ValueError: there is one already.
        UnsupportedModelError: a layer that is not plain.
    """
    settings = settings or TimedLoraSettings()
    dynamics = network.dynamic
    names = {id(module): name for name, module in network.named_modules()}
    paths = [names[id(layer)] for layer in dynamics.layers]
    inject_timed_lora(network, paths, dynamics.gated_layers[0].gate.router.in_features, settings)
    dynamics.timed_lora = settings
    dynamics.connect()


def fix_time(network: Any, time: float | None) -> None:
    """Fix the time of a dynamic network's TD-LoRA for every call, so that it can be merged.

    Args:
        network: a dynamic network.
        time: fixed time, as given to the network's `timestep`; None lets it follow the time again.

    Raises:
        ValueError: the adapter is merged at the time that is fixed now.
    """
    layers = timed_layers(network)
    if any(ADAPTER in layer.merged_adapters for layer in layers.values()):
        raise ValueError("the TD-LoRA is merged; unmerge it (unfuse_lora) before another time is fixed")
    given = None if time is None else _given(network, torch.tensor([float(time)]))
    for layer in layers.values():
        layer.experts.fixed = None if given is None else given.to(layer.experts.weight.device)


def plain_lora(network: Any, times: Tensor | None = None) -> dict[str, Tensor]:
    """Return a plain LoRA that stands in for the TD-LoRA of a dynamic network.

    It has no experts, is in float32, and has the format of diffusers' loaders (`load_lora_adapter`, prefix
    `transformer`).

    Args:
        network: a dynamic network.
        times: (T,), as given to the network's `timestep`: experts are mixed as on average over these; exact for one
            time. None mixes them alike.

    Raises:
        ValueError: no TD-LoRA.
    """
    layers = timed_layers(network)
    if not layers:
        raise ValueError("the network has no TD-LoRA; add_timed_lora gives it one")
    given = None if times is None else _given(network, times)
    state = {}
    for path, layer in layers.items():
        experts = layer.experts
        shares = experts.shares(None if given is None else given.to(experts.weight.device)).mean(0)
        second = experts.mixed(shares).float() * layer.scaling[ADAPTER]
        state[f"transformer.{path}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach().float().cpu().clone()
        state[f"transformer.{path}.lora_B.weight"] = second.detach().cpu().contiguous()
    return state


def bucket_loras(network: Any, times: Tensor, buckets: int) -> list[dict[str, Tensor]]:
    """Return a `plain_lora` for each of `buckets` equal stretches of `times`, to be switched while sampling.

    Args:
        network: a dynamic network.
        times: (T,) the times of all steps, in their order; T buckets are exact.
        buckets: at least 1, at most T.

    Raises:
        ValueError: `buckets` out of range, or no TD-LoRA.
    """
    if not 1 <= buckets <= len(times):
        raise ValueError(f"buckets must lie between 1 and the number of times, {len(times)}, got {buckets}")
    return [plain_lora(network, part) for part in torch.tensor_split(times, buckets)]


def _given(network: Any, times: Tensor) -> Tensor:
    dynamics = network.dynamic
    given: Tensor = dynamics.given(time_embedding(network, times).to(dynamics.time_mean.device))
    return given


class WidthAdapter(nn.Module):
    """Adapter that makes a network dynamic without changing its weights.

    It holds the routers, the assignment of units to gates, and perhaps a TD-LoRA: a small part of the network, valid
    for one set of weights only, which it recognises by a probe.

    Nothing in it is computed with; `apply` gives a network. Its weights stay on the CPU in their type.

    Args:
        base: class name of the stock network.
        base_config: a hash of that network's configuration, "" if not known.
        dynamic: settings of the dynamic parts.
        weights: tensors by name: `dynamic.*`, `PATH.lora_A.weight`, `PATH.lora_B.weight`, `PATH.lora_td_router.weight`,
            and `probe`, (64,) values of the stock network.
        timed_lora: the size of the TD-LoRA, None without.
    """

    def __init__(
        self,
        base: str,
        base_config: str,
        dynamic: DynamicSettings,
        weights: dict[str, Tensor],
        timed_lora: TimedLoraSettings | None = None,
    ) -> None:
        super().__init__()
        self.base, self.base_config = base, base_config
        self.dynamic, self.timed_lora = dynamic, timed_lora
        self.weights = weights
        self._applied: weakref.WeakKeyDictionary[nn.Module, tuple[list[int], Any]] = weakref.WeakKeyDictionary()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return a copy of `weights`."""
        return dict(self.weights)

    @classmethod
    def of(cls, network: Any, base_config: str = "") -> Self:
        """Create the adapter of a dynamic network.

        Args:
            network: its weights, but for routers and TD-LoRA, must be those of the stock network.
            base_config: a hash of the stock network's configuration, for `apply` to compare.
        """
        live = {**dict(_learned(network)), "probe": probe(network)}
        weights = {name: value.detach().cpu().clone().contiguous() for name, value in live.items()}
        dynamics = network.dynamic
        return cls(dynamics.rule.base, base_config, dynamics.settings, weights, dynamics.timed_lora)

    def apply(self, base: Any, base_config: str = "") -> Any:
        """Build a dynamic network that shares the weights of `base`, which is not changed.

        Args:
            base: the stock network that this was trained on.
            base_config: a hash of its configuration; compared if both are known.

        Raises:
            ValueError: another class, configuration or weights than it was trained on.
            CheckpointError: its own weights do not fit its configuration.
            UnsupportedModelError, RecipeConflictError: as `make_dynamic`.
        """
        kind = rule_of(base).base
        if kind != self.base or (base_config and self.base_config and base_config != self.base_config):
            raise ValueError(
                f"the adapter belongs to a {self.base} (configuration {self.base_config or 'not known'}), the network "
                f"is a {kind} (configuration {base_config or 'not known'}); train one for this network"
            )
        with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
            network = make_dynamic(base, self.dynamic)
            self._check_probe(probe(network))
            if self.timed_lora is not None:
                add_timed_lora(network, self.timed_lora)
        self._load(network)
        return network

    def applied(self, base: Any, base_config: str = "") -> Any:
        """Return `apply(base)`, reusing the earlier network if `base` still holds the same tensors and layers."""
        held = [id(part) for part in (*base.modules(), *base.parameters())]
        before, network = self._applied.get(base, ([], None))
        if network is None or before != held:
            network = self.apply(base, base_config)
            self._applied[base] = (held, network)
        return network

    def _check_probe(self, found: Tensor) -> None:
        wanted = self.weights["probe"].float()
        apart = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
        if not apart <= _TOLERANCE:
            raise ValueError(
                f"the network has the configuration that the adapter was trained on, but other weights: {PROBES} of "
                f"them differ by {apart:.1%}, where rounding makes at most {_TOLERANCE:.0%}. Routers fit the weights "
                "they were trained with: load that base, or train an adapter for this one"
            )

    def _load(self, network: Any) -> None:
        own = dict(_learned(network))
        given = {name: value for name, value in self.weights.items() if name != "probe"}
        misfits = sorted(
            name
            for name in own.keys() | given.keys()
            if name not in own or name not in given or own[name].shape != given[name].shape
        )
        if misfits:
            raise CheckpointError(
                f"the adapter's weights do not fit its configuration: {len(misfits)} entries are missing, unexpected "
                f"or of another shape, {', '.join(misfits[:3])} among them"
            )
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(given[name])
        for gated in network.dynamic.gated_layers:
            groups = gated.gate.group_of.long().cpu()
            each = len(groups) // gated.gate.units
            if groups.sort().values.tolist() != [place // each for place in range(len(groups))]:
                raise CheckpointError(f"the adapter's weights are damaged: the groups of {gated.path} are not equal")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and one safetensors file.

        Args:
            folder: made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "base": self.base,
            "base_config": self.base_config,
            "dynamic": asdict(self.dynamic),
            "timed_lora": None if self.timed_lora is None else asdict(self.timed_lora),
        }
        save_file(self.weights, folder / WEIGHTS_FILE, {"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote.

        Raises:
            WeightsNotFoundError: a file is missing.
            CheckpointError: a file is damaged, or not of an adapter.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise WeightsNotFoundError(f"no adapter of dynamic width in {folder}: it has no {name}")
        try:
            base, base_config, dynamic, timed_lora = _parsed(json.loads((folder / CONFIG_FILE).read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} is not the configuration of a {cls.__name__} ({type(error).__name__}: {error})"
            ) from error
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot load {folder / WEIGHTS_FILE} ({type(error).__name__}: {error}); copy it again from its source"
            ) from error
        if weights.get("probe", torch.empty(0)).shape != (PROBES,):
            raise CheckpointError(f"{folder / WEIGHTS_FILE} holds other weights than those of a {cls.__name__}")
        infinite = sorted(name for name, value in weights.items() if not bool(value.isfinite().all()))
        if infinite:
            raise CheckpointError(f"{folder / WEIGHTS_FILE} is damaged: {infinite[0]} is not finite")
        return cls(base, base_config, dynamic, weights, timed_lora)


def _parsed(config: dict[str, Any]) -> tuple[str, str, DynamicSettings, TimedLoraSettings | None]:
    if config["_class_name"] != WidthAdapter.__name__:
        raise ValueError(f"it is one of a {config['_class_name']!r}")
    settings = config["timed_lora"]
    timed_lora = None if settings is None else TimedLoraSettings(**settings)
    return str(config["base"]), str(config["base_config"]), DynamicSettings.of(config["dynamic"]), timed_lora


def probe(network: Any) -> Tensor:
    """Return (64,) values of the stock weights in the gated layers of a dynamic network, in float32 on the CPU."""
    weights = [linear.weight.detach().flatten() for gated in network.dynamic.gated_layers for linear in gated.rows]
    chosen = [weights[index * len(weights) // PROBES] for index in range(PROBES)]
    values = [weight[index * _STRIDE % len(weight)] for index, weight in enumerate(chosen)]
    return torch.stack([value.float().cpu() for value in values])


def _learned(network: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that an adapter holds (not copies), with the names under which it saves them."""
    for name, value in network.dynamic.state_dict().items():
        yield f"dynamic.{name}", value
    for path, layer in timed_layers(network).items():
        yield f"{path}.lora_A.weight", layer.lora_A[ADAPTER].weight
        yield f"{path}.lora_B.weight", layer.experts.weight
        yield f"{path}.lora_td_router.weight", layer.experts.router.weight
