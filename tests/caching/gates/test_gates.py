"""Every gate against its published rule, worked out again in numpy on hand-made signals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp
from torch import Tensor

from flowaccel.caching.gates import (
    GATES,
    Codebook,
    Easy,
    FirstBlock,
    Gate,
    Interval,
    Magnitude,
    Mask,
    ModulatedInput,
    Step,
    ThirdDifference,
)
from flowaccel.caching.gates.codebook import CODEBOOKS
from flowaccel.caching.gates.schedules import MASKS

STEPS = 24
SHAPE = (4, 6)
"""Tokens and width."""
READING: list[Gate] = [
    FirstBlock(0.2),
    ModulatedInput(0.3),
    Magnitude(0.05),
    Easy(0.3),
    Codebook(((0.02, 4), (0.1, 2), (1.0, 1))),
    ThirdDifference(0.3),
    ThirdDifference(1.2, "vector"),
]
"""Gates that look at the images; those with a threshold are set to compute some of the steps below and not others."""
NAMED = [f"{gate.name}-{gate.mode}" if isinstance(gate, ThirdDifference) else gate.name for gate in READING]


def walk(seed: int, steps: int = STEPS) -> np.ndarray:
    """(steps, 1, *SHAPE) a path whose steps differ in size and direction, never near 0."""
    draw = np.random.default_rng(seed)
    moves = draw.normal(size=(steps, 1, *SHAPE)) * draw.uniform(0.02, 0.3, size=(steps, 1, 1, 1))
    return 2.0 + np.cumsum(0.7 * moves + 0.05, axis=0)


def times(steps: int = STEPS) -> list[float]:
    return [1000.0 * (1 - i / steps) ** 1.3 for i in range(steps)]


def run(
    gate: Gate,
    signals: np.ndarray | None,
    feedbacks: np.ndarray | None = None,
    *,
    units: int = 1,
    steps: int = STEPS,
    forced: Sequence[int] = (),
    watch: Callable[[dict[str, Tensor]], Any] = lambda state: None,
) -> np.ndarray:
    """(steps, units) whether computed, as a cache asks its gate; `forced` steps are computed whatever it says."""
    state: dict[str, Tensor] = {}
    found = []
    for index in range(steps):
        step = Step(index=index, count=steps, time=times(steps)[index])
        signal = None if signals is None else torch.from_numpy(signals[index]).float()
        computed = torch.ones(units, dtype=torch.bool)
        if state:
            score, state = gate.score(state, signal, step)
            assert score.shape == (units,)
            computed = ~(score.cpu() < 1.0)
        if index in forced:
            computed = torch.ones(units, dtype=torch.bool)
        feedback = None
        if feedbacks is not None and bool(computed.any()):
            feedback = torch.from_numpy(feedbacks[index]).float()
            feedback[~computed] = math.nan  # holds nothing of use
        state = gate.update(state, signal, feedback, computed, step)
        watch(state)
        found.append(computed.numpy())
    return np.stack(found)


def mixed(decisions: np.ndarray) -> np.ndarray:
    """The decisions, which are worth comparing only if some are taken either way."""
    assert 2 < decisions.sum() < decisions.size - 1
    return decisions


def relative(new: np.ndarray, old: np.ndarray) -> float:
    return float(np.abs(new - old).mean() / np.abs(old).mean())


# -- the published rules


def test_first_block_compares_with_the_last_computed_step() -> None:
    signal, reference, expected = walk(0), None, []
    for residual in signal:
        compute = reference is None or relative(residual, reference) > 0.2
        if compute:
            reference = residual
        expected.append([compute])
    assert (mixed(run(FirstBlock(0.2), signal)) == expected).all()
    assert (FirstBlock(blocks=8).probe, FirstBlock().probe, Easy().probe) == (8, 1, 0)


@pytest.mark.parametrize(
    ("coefficients", "fitted_range", "threshold"),
    [
        ((1.0, 0.0), None, 0.3),
        ((7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02), None, 0.15),  # HunyuanVideo
        ((21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326), (0.05, 0.1), 0.3),  # LTX
        ((-4.0, 0.3), None, 0.2),  # negative above 0.075
    ],
)
def test_modulated_input_adds_up_a_polynomial_of_the_step_to_step_change(
    coefficients: tuple[float, ...], fitted_range: tuple[float, float] | None, threshold: float
) -> None:
    signal, total, expected = walk(1), 0.0, [[True]]
    for old, new in itertools.pairwise(signal):
        change = relative(new, old)
        total += max(float(np.polyval(coefficients, np.clip(change, *(fitted_range or (0, np.inf))))), 0.0)
        expected.append([total >= threshold])
        total = 0.0 if total >= threshold else total
    assert (mixed(run(ModulatedInput(threshold, coefficients, fitted_range), signal)) == expected).all()


def test_a_forced_step_starts_the_sums_anew() -> None:
    signal = np.stack([np.full((1, *SHAPE), 1.1**i) for i in range(8)])  # changes of 0.1
    gate = ModulatedInput(0.25)
    assert run(gate, signal, steps=8)[:, 0].tolist() == [True, False, False, True, False, False, True, False]
    forced = run(gate, signal, steps=8, forced=(2,))[:, 0].tolist()
    assert forced == [True, False, True, False, False, True, False, False]


def test_magnitude_follows_the_published_error_reset_at_computed_steps() -> None:
    draw = np.random.default_rng(2)
    ratios = [1.0, *(1 + draw.normal(size=27) * 0.04)]
    for steps in (28, 17, 50, 1):
        ratio, error, run_length, expected = 1.0, 0.0, 0, []
        places = np.round(np.linspace(0, 27, steps)).astype(int)
        retention = math.ceil(0.2 * steps)
        for index in range(steps):
            ratio *= ratios[places[index]]
            error += abs(1 - ratio)
            run_length += 1
            compute = not (error <= 0.06 and index >= retention)
            if index == 0 or compute:
                ratio, error, run_length, compute = 1.0, 0.0, 0, True
            expected.append([compute])
        found = run(Magnitude(0.06, ratios), None, steps=steps, forced=range(retention))
        assert (found == expected).all()
        assert steps == 1 or (~found).any()


def test_ratios_are_stretched_as_published() -> None:
    """MagCache in float64; diffusers' float32 falls to the other side at some exact halves, and only there."""
    gate = Magnitude(ratios=FLUX_MAG_RATIOS.tolist())
    for steps in range(2, 120):
        places = np.arange(steps) * (27 / (steps - 1))
        expected = FLUX_MAG_RATIOS[torch.from_numpy(np.round(places)).long()]
        found = torch.tensor([gate._ratio(Step(index=i, count=steps, time=0.0)) for i in range(steps)])
        assert torch.equal(found, expected)
        halves = torch.from_numpy(np.abs(places % 1 - 0.5) < 1e-6)
        assert torch.equal(found[~halves], nearest_interp(FLUX_MAG_RATIOS, steps)[~halves])


def test_magnitude_without_ratios_takes_those_of_the_last_two_computed_steps() -> None:
    feature, expected, state = walk(3), [], None
    for index, value in enumerate(feature):
        size = np.linalg.norm(value, axis=-1)
        if state is not None:
            state["product"] *= state["gamma"]
            state["error"] += abs(1 - state["product"])
        compute = state is None or not state["error"] < 0.05
        if compute:
            gamma = (
                math.inf if state is None else float((size / state["size"]).mean()) ** (1 / (index - state["index"]))
            )
            state = {"size": size, "index": index, "gamma": gamma, "product": 1.0, "error": 0.0}
        expected.append([compute])
    assert (mixed(run(Magnitude(0.05), None, feature)) == expected).all()


def test_easy_predicts_the_output_change_from_the_input_change() -> None:
    inputs, outputs = walk(4), walk(5)
    computed: list[int] = []
    rate, total, expected = math.inf, 0.0, []
    for index in range(STEPS):
        if index:
            last = outputs[computed[-1]]
            total += rate * np.abs(inputs[index] - inputs[index - 1]).mean() / np.abs(last).mean()
        compute = index == 0 or not total < 0.3
        if compute:
            total = 0.0
            if computed:
                before = computed[-1]
                rate = np.abs(outputs[index] - outputs[before]).mean() / np.abs(inputs[index] - inputs[before]).mean()
            computed.append(index)
        expected.append([compute])
    assert (mixed(run(Easy(0.3), inputs, outputs)) == expected).all()


@pytest.mark.parametrize("book", ["fast", "slow", "fast-100", ((0.02, 4), (0.1, 2), (1.0, 1))])
def test_codebook_is_the_published_schedule(book: Any) -> None:
    pairs = CODEBOOKS[book] if isinstance(book, str) else book
    residual = walk(6)
    last, due, expected = 0, 1, [[True]]
    for index in range(1, STEPS):  # steps counted from 0: the first, and the two last, are computed
        forced = index >= STEPS - 2
        compute = forced or index == due
        if compute:
            change = relative(residual[index], residual[last]) / (index - last)
            due = index + next((steps for bound, steps in pairs if change < bound), pairs[-1][1])
            last = index
        expected.append([compute])
    found = run(Codebook(book), None, residual, forced=(STEPS - 2, STEPS - 1))
    assert (mixed(found) == expected).all()


@pytest.mark.parametrize("per_time", [False, True])
@pytest.mark.parametrize(("mode", "threshold"), [("scalar", 0.3), ("vector", 1.2)])
def test_third_difference_is_the_published_criterion(mode: Any, threshold: float, per_time: bool) -> None:
    latents, grid = walk(7), times()
    expected = []
    for index in range(STEPS):
        if index < 4:
            expected.append([True])
            continue
        moves = [
            (latents[i] - latents[i - 1]) / (abs(grid[i] - grid[i - 1]) if per_time else 1)
            for i in (index, index - 1, index - 2)
        ]
        if mode == "scalar":
            moves = [np.abs(move).mean() for move in moves]
        newest, middle, oldest = moves
        expected.append([np.abs((newest + oldest) / 2 - middle).mean() > threshold * np.abs(middle).mean()])
    assert (mixed(run(ThirdDifference(threshold, mode, per_time), latents)) == expected).all()


def test_the_modes_of_the_third_difference_differ() -> None:
    """A zigzag: its steps have one length, and directions that change."""
    latents = np.cumsum(np.random.default_rng(0).choice([-1.0, 1.0], size=(STEPS, 1, *SHAPE)), axis=0)
    assert run(ThirdDifference(0.01), latents).sum() == 4
    assert run(ThirdDifference(0.01, "vector"), latents).sum() == STEPS


def test_an_uneven_grid_bends_a_straight_path_unless_divided_by_time() -> None:
    latents = np.stack([np.full((1, *SHAPE), t) for t in [1000.0 * (1 - i / STEPS) ** 2 for i in range(STEPS)]])
    grid = np.stack([np.full((1, *SHAPE), t) for t in times()])
    assert run(ThirdDifference(0.001, per_time=True), grid).sum() == 4
    assert run(ThirdDifference(1e-6), latents[:, :, :1, :1]).sum() == 4  # a quadratic has no third difference
    assert run(ThirdDifference(1e-6), grid).sum() > 4


@pytest.mark.parametrize("phase", [None, 0, 1, 4, -1, 7])
@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_interval_counts_from_the_last_computed_step_or_from_its_phase(interval: int, phase: int | None) -> None:
    forced = (0, 1, 2, STEPS - 1)
    found = run(Interval(interval, phase), None, forced=forced)[:, 0]
    last, expected = 0, []
    for index in range(STEPS):
        due = index - last >= interval if phase is None else (index - phase) % interval == 0
        if due or index in forced:
            last = index
        expected.append(due or index in forced)
    assert found.tolist() == expected


def test_the_phase_of_taylorseer() -> None:
    """diffusers: computed if step < before or (step - before - 1) % interval == 0; before = 3, interval = 5."""
    found = run(Interval(5, phase=4), None, forced=(0, 1, 2))[:, 0]
    assert found.tolist() == [step < 3 or (step - 4) % 5 == 0 for step in range(STEPS)]


# -- masks


PUBLISHED = {  # cache-dit: steps computed, and steps reused, in turn, at 28 steps
    "slow": ([8, 3, 3, 2, 1, 1], [1, 2, 2, 2, 3], 18),
    "medium": ([6, 2, 2, 2, 2, 1], [1, 3, 3, 3, 3], 15),
    "fast": ([6, 1, 1, 1, 1, 1], [1, 3, 4, 5, 4], 11),
    "ultra": ([4, 1, 1, 1, 1], [2, 5, 6, 7], 8),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_masks_are_the_published_ones_at_28_steps(name: str) -> None:
    computed, reused, count = PUBLISHED[name]
    expected: list[int] = []
    for ones, zeros in zip(computed, [*reused, 0], strict=True):
        expected += [1] * ones + [0] * zeros
    assert Mask(name).at(28) == tuple(expected)
    assert sum(expected) == count and set(MASKS) == set(PUBLISHED)
    assert run(Mask(name), None, steps=28)[:, 0].tolist() == [bool(entry) for entry in expected]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 50, 56, 100])
@pytest.mark.parametrize("name", PUBLISHED)
def test_stretched_masks_compute_as_large_a_part_as_early(name: str, steps: int) -> None:
    mask, reference = Mask(name).at(steps), Mask(name).at(28)
    assert len(mask) == steps and mask[0] == 1 and set(mask) <= {0, 1}
    assert abs(sum(mask) - max(1.0, PUBLISHED[name][2] * steps / 28)) <= 0.5 + 1e-9
    for step in range(steps):  # nowhere more than one step away from the reference's curve
        place = 28 * (step + 1) / steps
        due = sum(reference[: int(place)]) + (place - int(place)) * (reference[int(place)] if place < 28 else 0)
        assert abs(sum(mask[: step + 1]) - due * steps / 28) <= 1.0 + 1e-9


def test_slower_masks_compute_no_less() -> None:
    for steps in range(1, 60):
        counts = [sum(Mask(name).at(steps)) for name in ("slow", "medium", "fast", "ultra")]
        assert counts == sorted(counts, reverse=True)


def test_a_mask_of_another_length_is_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match="the mask has 3 entries and the run 5 steps"):
        run(Mask((1, 0, 1)), None, steps=5)
    assert Mask([True, False, True]).at(3) == (1, 0, 1)
    assert run(Mask((0, 0, 1)), None, steps=3)[:, 0].tolist() == [True, False, True]  # the first is always computed


# -- what holds for all


def inputs(gate: Gate, seeds: Sequence[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Signal and feedback of as many units."""
    signal = None if gate.signal == "none" else np.concatenate([walk(seed) for seed in seeds], axis=1)
    feedback = None if gate.feedback == "none" else np.concatenate([walk(seed + 50) for seed in seeds], axis=1)
    return signal, feedback


@pytest.mark.parametrize("gate", READING, ids=NAMED)
def test_units_decide_as_if_alone(gate: Gate) -> None:
    """Also where some were not computed: `run` hands NaN for what holds nothing of use."""
    together = run(gate, *inputs(gate, (0, 1, 2)), units=3)
    assert (together != together[:, :1]).any(), "the units must differ for this to say something"
    for unit in range(3):
        assert (run(gate, *inputs(gate, (unit,)))[:, 0] == together[:, unit]).all()


@pytest.mark.parametrize("gate", READING, ids=NAMED)
def test_states_have_a_leading_units_axis(gate: Gate) -> None:
    lengths: set[int] = set()
    run(gate, *inputs(gate, (0, 1, 2)), units=3, watch=lambda state: lengths.update(len(v) for v in state.values()))
    assert lengths == {3}


WITH_THRESHOLD = [gate for gate in READING if hasattr(gate, "threshold")]


@pytest.mark.parametrize(
    "gate", [*WITH_THRESHOLD, Magnitude(0.1, (1.0, 0.99, 1.01))], ids=lambda gate: f"{gate.name}-{gate.feedback}"
)
@pytest.mark.parametrize("still", [False, True], ids=["moving", "still"])
def test_a_threshold_of_0_computes_every_step(gate: Any, still: bool) -> None:
    signal, feedback = inputs(gate, (0, 1))
    if still:  # nothing changes at all
        signal = None if signal is None else np.repeat(signal[:1], STEPS, axis=0)
        feedback = None if feedback is None else np.repeat(feedback[:1], STEPS, axis=0)
    zero = type(gate)(**{**vars(gate), "threshold": 0})
    assert run(zero, signal, feedback, units=1 if gate.static else 2).all()


def test_the_neutral_schedules_compute_every_step() -> None:
    assert run(Interval(1), None).all() and run(Interval(1, phase=3), None).all()
    assert run(Mask((1,) * STEPS), None).all()
    assert run(Codebook(((1.0, 1),)), *inputs(Codebook(), (0,))).all()


@pytest.mark.parametrize("gate", READING, ids=NAMED)
def test_what_is_not_a_number_is_computed_and_for_that_unit_alone(gate: Gate) -> None:
    clean = run(gate, *inputs(gate, (0, 1)), units=2)
    signal, feedback = inputs(gate, (0, 1))
    for poisoned in (signal, feedback):
        if poisoned is not None:
            poisoned[STEPS // 2 :, 1] = np.nan
    found = run(gate, signal, feedback, units=2)
    first = next(step for step in range(STEPS // 2, STEPS) if found[step, 1])  # what is fed back is seen where computed
    assert found[first:, 1].all() and not clean[first:, 1].all()
    assert first == STEPS // 2 or gate.signal == "none"
    assert (found[:, 0] == clean[:, 0]).all()


@pytest.mark.parametrize("kind", [FirstBlock, ModulatedInput, Magnitude, Easy, ThirdDifference])
@pytest.mark.parametrize("threshold", [-0.1, math.inf, math.nan, True, "0.1", None])
def test_thresholds_out_of_range_are_refused(kind: Any, threshold: Any) -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number of at least 0"):
        kind(threshold=threshold)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FirstBlock, {"blocks": 0}, "blocks must be a whole number of at least 1"),
        (FirstBlock, {"blocks": 1.5}, "blocks must be a whole number"),
        (ModulatedInput, {"coefficients": ()}, "coefficients must hold at least one number"),
        (ModulatedInput, {"fitted_range": (0.2, 0.1)}, "fitted_range must be two rising numbers"),
        (Magnitude, {"ratios": ()}, "ratios must hold numbers above 0"),
        (Magnitude, {"ratios": (1.0, 0.0)}, "ratios must hold numbers above 0"),
        (Magnitude, {"ratios": (1.0, math.nan)}, "ratios must hold numbers above 0"),
        (Interval, {"interval": 0}, "interval must be a whole number of at least 1"),
        (Interval, {"interval": 2.0}, "interval must be a whole number"),
        (Interval, {"phase": 0.5}, "phase must be a whole number or None"),
        (Mask, {"mask": "quick"}, "mask must be one of slow, medium, fast, ultra"),
        (Mask, {"mask": (0, 0)}, "1 at least once"),
        (Mask, {"mask": ()}, "1 at least once"),
        (Mask, {"mask": (1, 2)}, "mask must hold 0 and 1"),
        (Codebook, {"codebook": "quick"}, "codebook must be one of fast, slow, fast-100"),
        (Codebook, {"codebook": ()}, "bounds of codebook must rise"),
        (Codebook, {"codebook": ((0.2, 2), (0.1, 1))}, "bounds of codebook must rise"),
        (Codebook, {"codebook": ((0.1, 0),)}, "steps of codebook must be at least 1"),
        (ThirdDifference, {"mode": "norm"}, "mode must be 'scalar' or 'vector'"),
    ],
)
def test_other_values_out_of_range_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_names_lead_to_their_gates() -> None:
    assert {kind().name for kind in GATES.values()} == set(GATES)
    assert {name for name, kind in GATES.items() if kind().static} == {"interval", "mask"}
    assert Magnitude(ratios=(1.0,)).static
