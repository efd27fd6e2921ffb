"""The published polynomials of TeaCache: each says what it was fitted to, and does there what was published of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowaccel.caching.gates import ModulatedInput, Step
from flowaccel.caching.gates.base import TIME_SIGNALS
from flowaccel.caching.gates.teacache_fits import PUBLISHED, UNUSABLE

EVERY = pytest.mark.parametrize("name", PUBLISHED)


def computed(gate: ModulatedInput, changes: np.ndarray, warmup: int, last: int) -> int:
    """Steps computed of a run in which the signal changes by these parts from step to step."""
    signal, state, count = torch.ones(1, 4, dtype=torch.float64), {}, 0
    for index in range(len(changes) + 1):
        step = Step(index=index, count=len(changes) + 1, time=0.0)
        signal = signal * (1 + (float(changes[index - 1]) if index else 0.0))
        compute = torch.tensor([index < warmup or index > len(changes) - last])
        if state:
            score, state = gate.score(state, signal, step)
            compute |= ~(score < 1)
        state = gate.update(state, signal, None, compute, step)
        count += int(compute)
    return count


@EVERY
@pytest.mark.parametrize("bounded", [True, False])
def test_over_the_changes_of_its_fit_it_saves_about_as_much_as_published(name: str, bounded: bool) -> None:
    """Within a factor of 2.5: times were published, and how the changes are spread is not known."""
    fit = PUBLISHED[name]
    changes = np.geomspace(*fit.changes, fit.steps - 1)
    shares = []
    for threshold, speedup in fit.speedups.items():
        gate = ModulatedInput(threshold, name, bounded=bounded)
        shares.append(computed(gate, changes, fit.warmup, fit.last) / fit.steps)
        assert speedup is None or 1 / 2.5 < shares[-1] * speedup < 2.5
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.9
    assert list(fit.speedups) == sorted(fit.speedups)


@EVERY
def test_over_the_changes_of_its_fit_it_is_positive_and_below_a_few_thresholds(name: str) -> None:
    fit = PUBLISHED[name]
    change = torch.linspace(*fit.changes, 200, dtype=torch.float64)
    value = ModulatedInput(coefficients=name).rescaled(change)
    assert float(value.min()) > 0 and float(value.max()) < 20 * min(fit.speedups)
    assert torch.equal(value, ModulatedInput(coefficients=name, bounded=False).rescaled(change))
    assert float(value[100:].mean()) > float(value[:100].mean()), "more change counts more"


@EVERY
def test_outside_of_its_changes_it_is_clipped_and_for_parity_taken_as_it_is(name: str) -> None:
    fit = PUBLISHED[name]
    low, high = fit.changes
    outside = torch.tensor([low / 4, 3 * high], dtype=torch.float64)
    ends = torch.tensor(fit.changes, dtype=torch.float64)
    bounded, parity = ModulatedInput(coefficients=name), ModulatedInput(coefficients=name, bounded=False)
    assert torch.equal(bounded.rescaled(outside), bounded.rescaled(ends))
    expected = torch.from_numpy(np.polyval(fit.coefficients, outside.numpy()))
    torch.testing.assert_close(parity.rescaled(outside), expected)
    given = ModulatedInput(coefficients=name, fitted_range=(0.0, 2.0))
    torch.testing.assert_close(given.rescaled(outside), expected.clamp(min=0))


def test_parity_adds_negative_values() -> None:
    """The published code clamps nothing: at changes of 0.05 the sum of the 14B polynomial falls, step by step."""
    changes = np.full(20, 0.05)
    assert computed(ModulatedInput(0.2, "wan2.1-t2v-14b", bounded=False), changes, 1, 1) == 2
    lowered = np.array([0.16, 0.05, 0.16, 0.16])  # 0.15, -4.1, ...
    assert computed(ModulatedInput(0.1, "wan2.1-t2v-14b", bounded=False), lowered, 1, 0) == 2
    assert computed(ModulatedInput(0.1, "wan2.1-t2v-14b", fitted_range=(0.0, 1.0)), lowered, 1, 0) == 4


@EVERY
def test_every_fit_names_its_signal_and_source(name: str) -> None:
    fit = PUBLISHED[name]
    assert ModulatedInput(coefficients=name).signal == fit.signal
    assert fit.source.startswith("github.com/") and len(fit.coefficients) == 5
    wanted = "modulated_input"
    if name.startswith("cogvideox") or name.startswith("wan"):
        wanted = "time_projection" if name.endswith("-ret") else "time_embedding"
    assert fit.signal == wanted
    assert (fit.warmup, fit.last) == ((5, 0) if name.endswith("-ret") else (1, 1))


def test_coefficients_of_ones_own_read_the_modulated_input() -> None:
    assert ModulatedInput().signal == ModulatedInput(coefficients=(2.0, 0.1)).signal == "modulated_input"
    assert {fit.signal for fit in PUBLISHED.values()} == {"modulated_input", *TIME_SIGNALS}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_fit_whose_signal_cannot_be_had_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValueError, match=f"coefficients '{name}' cannot be used: it was fitted to.*calibrate"):
        ModulatedInput(coefficients=name)
    assert name not in PUBLISHED
