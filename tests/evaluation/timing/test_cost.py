"""Multiply-adds against analytic numbers, and counters that leave nothing behind."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import flop_registry

from flowaccel.evaluation.timing.cost import CallCounter, count_macs, peak_memory_mb, reset_peak_memory, timed_stages

B, H, L, S, D, V = 2, 4, 16, 24, 8, 8
ATTENTION_MACS = B * H * L * S * (D + V)


def attention(**options: object) -> Tensor:
    query, key, value = torch.randn(B, H, L, D), torch.randn(B, H, S, D), torch.randn(B, H, S, V)
    return scaled_dot_product_attention(query, key, value, **options)  # type: ignore[arg-type]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return self.linear(sample)


# --- multiply-adds


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_attention_on_the_cpu_is_counted(backend: SDPBackend) -> None:
    with sdpa_kernel(backend):
        assert count_macs(attention) == ATTENTION_MACS


def test_masked_attention_is_counted() -> None:
    assert count_macs(lambda: attention(attn_mask=torch.ones(L, S, dtype=torch.bool))) == ATTENTION_MACS


def test_attention_counts_in_inference_mode_and_half_precision() -> None:
    def run() -> None:
        with torch.inference_mode():
            query = torch.randn(B, H, L, D, dtype=torch.bfloat16)
            scaled_dot_product_attention(query, query, query)

    assert count_macs(run) == B * H * L * L * 2 * D


def test_linear_and_convolution() -> None:
    assert count_macs(lambda: nn.Linear(3, 5)(torch.randn(7, 3))) == 7 * 3 * 5
    assert count_macs(lambda: nn.Conv2d(2, 4, 3, padding=1)(torch.randn(1, 2, 8, 8))) == 4 * 8 * 8 * 2 * 9


def test_groups_of_rows_are_counted() -> None:
    rows, weights, ends = torch.randn(20, 16), torch.randn(3, 16, 32), torch.tensor([8, 8, 20], dtype=torch.int32)
    assert count_macs(lambda: nn.functional.grouped_mm(rows, weights, offs=ends)) == 20 * 16 * 32


def test_work_that_is_left_out_is_not_counted() -> None:
    assert count_macs(lambda: None) == 0


def test_the_formula_is_not_registered_globally() -> None:
    before = set(flop_registry)
    count_macs(attention)
    assert set(flop_registry) == before


# --- calls and rows


def test_calls_and_rows_by_name() -> None:
    network, refiner = Network(), Network()
    with CallCounter({"network": network, "refiner": refiner}) as counter:
        network(torch.randn(4, 3))
        network(sample=torch.randn(2, 3), timestep=torch.zeros(9))
        refiner(torch.randn(1, 3))
    assert counter.calls == {"network": 2, "refiner": 1}
    assert counter.rows == {"network": 6, "refiner": 1}


def test_scalars_before_the_batch_are_passed_over_and_lists_count_their_length() -> None:
    class Odd(nn.Module):
        def forward(self, scale: float, step: Tensor, images: list[Tensor]) -> None:
            pass

    module = Odd()
    with CallCounter({"odd": module}) as counter:
        module(1.0, torch.tensor(3), [torch.zeros(5), torch.zeros(7)])
    assert counter.rows == {"odd": 2}


def test_entering_again_starts_from_zero() -> None:
    network = Network()
    counter = CallCounter({"network": network})
    for _ in range(2):
        with counter:
            network(torch.randn(4, 3))
        assert counter.calls == {"network": 1}


def test_hooks_are_removed_also_after_an_exception() -> None:
    network = Network()
    with pytest.raises(RuntimeError), CallCounter({"network": network}) as counter:
        network(torch.randn(2, 99))
    network(torch.randn(2, 3))
    assert counter.calls == {"network": 1}
    assert not network._forward_pre_hooks
    assert not network._forward_pre_hooks_with_kwargs


def test_a_call_without_a_batch_is_explained() -> None:
    class Empty(nn.Module):
        def forward(self) -> None:
            pass

    module = Empty()
    with CallCounter({"empty": module}), pytest.raises(ValueError, match="module 'empty' was called without a tensor"):
        module()


# --- memory


def test_peak_memory_on_the_cpu_is_plausible() -> None:
    reset_peak_memory("cpu")
    peak = peak_memory_mb("cpu")
    assert peak is None or 20 < peak < 1e6  # a Python with torch; wrong units would be off by 1024


# --- stages


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Decoder:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def decode(self, latents: int, scale: float = 1.0) -> str:
        """Decode."""
        self.clock.now += 2.0
        if latents < 0:
            raise RuntimeError("negative")
        return f"image {latents}"


def test_stages_add_up_and_methods_are_put_back() -> None:
    clock, network = Clock(), Network()
    decoder = Decoder(clock)
    before = dict(vars(network)), dict(vars(decoder))
    with timed_stages({"denoise": (network, "forward"), "decode": (decoder, "decode")}, clock=clock) as seconds:
        assert decoder.decode(1) == "image 1"
        assert list(inspect.signature(decoder.decode).parameters) == ["latents", "scale"]
        network(torch.randn(1, 3))
        clock.now += 5.0
        decoder.decode(2)
    assert seconds == {"denoise": 0.0, "decode": 4.0, "total": 9.0}
    assert (dict(vars(network)), dict(vars(decoder))) == before


def test_a_module_is_timed_through_its_call() -> None:
    clock, network = Clock(), Network()
    network.register_forward_hook(lambda *_: None)
    original = network.linear.forward

    def slow(sample: Tensor) -> Tensor:
        clock.now += 3.0
        return original(sample)

    network.linear.forward = slow  # type: ignore[method-assign]
    with timed_stages({"linear": (network.linear, "forward")}, clock=clock) as seconds:
        network(torch.randn(1, 3))
    assert seconds["linear"] == 3.0
    assert network.linear.forward is slow  # what others put on the instance stays theirs


def test_stages_survive_an_exception() -> None:
    clock = Clock()
    decoder = Decoder(clock)
    with pytest.raises(RuntimeError), timed_stages({"decode": (decoder, "decode")}, clock=clock) as seconds:
        decoder.decode(-1)
    assert seconds == {"decode": 2.0, "total": 2.0}
    assert "decode" not in vars(decoder)


def test_wrong_stages_are_explained() -> None:
    decoder = Decoder(Clock())
    with pytest.raises(ValueError, match="Decoder has no method 'encode'"), timed_stages({"e": (decoder, "encode")}):
        pass
    with pytest.raises(ValueError, match='stage "total"'), timed_stages({"total": (decoder, "decode")}):
        pass
