"""The small file of routers and TD-LoRA, and the fingerprint of what decides."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynamic_networks import FAMILIES, dynamic, flux, random_experts, relative, sd3, sd3_call, sit, sit_call, sliced
from flowaccel.errors import CheckpointError, WeightsNotFoundError
from flowaccel.methods.dynamic_width.adapter import WidthAdapter, add_timed_lora
from flowaccel.methods.dynamic_width.networks import make_dynamic
from flowaccel.methods.dynamic_width.settings import DynamicSettings

TIMES = torch.tensor([0.25, 0.7])
WEIGHTS = "width_adapter.safetensors"


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[Callable[..., Any], Callable[[nn.Module, Tensor], Tensor]]:
    return FAMILIES[request.param]


def trained(base: Any, *, timed: bool = True) -> Any:
    network = dynamic(base)
    if timed:
        add_timed_lora(network)
        random_experts(network)
    return network


@pytest.mark.parametrize("timed", [False, True], ids=["routers", "routers and TD-LoRA"])
def test_it_gives_the_same_network_from_disk(family: Any, tmp_path: Path, timed: bool) -> None:
    make, call = family
    network = trained(make(), timed=timed)
    WidthAdapter.of(network, "abc").save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    again = WidthAdapter.from_pretrained(tmp_path).apply(make(), "abc").eval()
    assert again.dynamic.fingerprint == network.dynamic.fingerprint
    assert (again.dynamic.timed_lora is not None) == timed
    assert torch.equal(sliced(call, again, TIMES), sliced(call, network, TIMES))


def test_the_base_and_the_random_numbers_stay_as_they_were() -> None:
    adapter = WidthAdapter.of(trained(sit()))
    base = sit()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = [(name, type(module)) for name, module in base.named_modules()]
    wanted = sliced(sit_call, base, TIMES)
    learns = [value.requires_grad for value in base.parameters()]
    random = torch.get_rng_state()
    network = adapter.apply(base)
    assert torch.equal(torch.get_rng_state(), random)
    assert relative(sliced(sit_call, network, TIMES), wanted) > 1e-2
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    assert [value.requires_grad for value in base.parameters()] == learns
    assert before.keys() == base.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert torch.equal(sliced(sit_call, base, TIMES), wanted)
    assert network.proj_out.weight is base.proj_out.weight


def test_a_narrow_base_keeps_the_routers(tmp_path: Path) -> None:
    network = trained(sd3())
    WidthAdapter.of(network).save_pretrained(tmp_path)
    narrow = WidthAdapter.from_pretrained(tmp_path).apply(sd3().to(torch.bfloat16))
    assert narrow.dynamic.fingerprint == network.dynamic.fingerprint
    assert narrow.dtype == torch.bfloat16
    assert {value.dtype for name, value in narrow.named_parameters() if ".lora_" in name} == {torch.bfloat16}
    found = sliced(lambda module, times: half(sd3_call, module, times), narrow, TIMES)
    assert relative(found.float(), sliced(sd3_call, network, TIMES)) < 0.1


def half(call: Any, network: Any, times: Tensor) -> Tensor:
    """The call with floating arguments in the network's type."""

    def cast(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return tuple(map(narrow, args)), {name: narrow(value) for name, value in kwargs.items()}

    def narrow(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        return value.to(network.dtype) if floating else value

    handle = network.register_forward_pre_hook(cast, with_kwargs=True)
    try:
        return call(network, times)
    finally:
        handle.remove()


def test_another_base_is_refused() -> None:
    adapter = WidthAdapter.of(trained(sit()), "abc")
    with pytest.raises(ValueError, match="but other weights: 64 of them differ by"):
        adapter.apply(sit(seed=1), "abc")
    with pytest.raises(ValueError, match=r"belongs to a SiTTransformer2DModel \(configuration abc\), the network is a"):
        adapter.apply(sit(), "def")
    with pytest.raises(ValueError, match="the network is a SD3Transformer2DModel"):
        adapter.apply(sd3())
    adapter.apply(sit())


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_and_damaged_files(tmp_path: Path, name: str) -> None:
    WidthAdapter.of(trained(sit())).save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name):
        WidthAdapter.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WeightsNotFoundError, match=f"it has no {name}"):
        WidthAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "SD3Transformer2DModel"}, "it is one of a 'SD3Transformer2DModel'"),
        ({"dynamic": {"widths": 3}}, "unknown"),
        ({"timed_lora": {"rank": -1}}, "rank must be"),
        ({"timed_lora": {"size": 1}}, "unexpected keyword"),
    ],
)
def test_a_foreign_configuration(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    WidthAdapter.of(trained(sit())).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        WidthAdapter.from_pretrained(tmp_path)


def test_foreign_weights(tmp_path: Path) -> None:
    WidthAdapter.of(trained(sit())).save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    gate = next(name for name in weights if name.endswith("attn_gate.group_of"))
    router = next(name for name in weights if name.endswith("attn_gate.router.weight"))

    def read(changed: dict[str, Tensor]) -> WidthAdapter:
        save_file(changed, tmp_path / WEIGHTS)
        return WidthAdapter.from_pretrained(tmp_path)

    with pytest.raises(CheckpointError, match="other weights than those of a WidthAdapter"):
        read({"weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"damaged: .* is not finite"):
        read({**weights, router: weights[router] * float("nan")})
    with pytest.raises(CheckpointError, match="1 entries are missing, unexpected or of another shape"):
        read({name: value for name, value in weights.items() if name != router}).apply(sit())
    with pytest.raises(CheckpointError, match="1 entries are missing"):
        read({**weights, router: weights[router][:1]}).apply(sit())
    with pytest.raises(CheckpointError, match=r"the groups of .* are not equal"):
        read({**weights, gate: weights[gate] + 1}).apply(sit())


@pytest.mark.parametrize("make", [sit, sd3, flux])
def test_the_full_form_keeps_the_fingerprint(make: Callable[..., Any], tmp_path: Path) -> None:
    network = dynamic(make())
    wanted = network.dynamic.fingerprint
    assert len(wanted) == 12
    network.save_pretrained(tmp_path)
    kind: Any = type(network)
    assert kind.from_pretrained(tmp_path).dynamic.fingerprint == wanted
    narrow = kind.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert {value.dtype for value in narrow.dynamic.parameters()} == {torch.float32}
    assert narrow.dynamic.fingerprint == wanted


def test_the_full_form_has_no_place_for_a_td_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WidthAdapter"):
        trained(sit()).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_deep_copy_is_a_network_of_its_own() -> None:
    network = trained(sit())
    wanted = sliced(sit_call, network, TIMES)
    copied = copy.deepcopy(network)
    assert torch.equal(sliced(sit_call, copied, TIMES), wanted)
    random_experts(copied, seed=9)
    assert relative(sliced(sit_call, copied, TIMES), wanted) > 1e-2
    assert torch.equal(sliced(sit_call, network, TIMES), wanted)


def test_a_cast_keeps_the_fingerprint() -> None:
    network = dynamic(sit())
    wanted = network.dynamic.fingerprint
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        network.to(kind)
        assert network.proj_out.weight.dtype == kind
        assert network.dynamic.fingerprint == wanted


def test_the_fingerprint_is_of_all_that_decides_on_widths() -> None:
    found = {dynamic(sit()).dynamic.fingerprint}
    for change in ("router", "bias", "group", "time"):
        network = dynamic(sit())
        gate = network.dynamic.gated_layers[-1].gate
        with torch.no_grad():
            if change == "router":
                gate.router.weight[0, 0] += 1e-6
            elif change == "bias":
                gate.router.bias[0] += 1e-6
            elif change == "group":
                gate.group_of.copy_(gate.group_of.flip(0))
            else:
                network.dynamic.time_mean += 1e-6
        found.add(network.dynamic.fingerprint)
    assert len(found) == 5
    assert dynamic(sit()).dynamic.fingerprint in found


def test_settings_travel() -> None:
    settings = DynamicSettings(tokens=False, groups=2, bias=3.0, tau=2.0)
    adapter = WidthAdapter.of(make_dynamic(sit(), settings))
    assert adapter.apply(sit()).dynamic.settings == settings
