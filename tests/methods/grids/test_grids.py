"""The two searches for step grids, against brute force, on random tables and on a flow in closed form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowaccel.methods.grids.search import METRICS, SearchedGrid, Trajectory, boss, cost_table, oss

FINE, IMAGES, SIZE = 10, 6, 5


def mixture_velocity(state: Tensor, time: float) -> Tensor:
    """Noise - data of the linear path, for data at two points that are widened a little: exact, by the posterior."""
    centres = torch.stack([torch.linspace(-1.0, 2.0, SIZE), torch.linspace(1.5, -0.5, SIZE)]).double()
    spread = 0.3
    variance = time**2 + ((1 - time) * spread) ** 2
    offsets = state[:, None] - (1 - time) * centres
    weights = torch.softmax(-offsets.square().sum(-1) / (2 * variance), dim=1)
    noise = time / variance * offsets
    data = centres + (1 - time) * spread**2 / variance * offsets
    return (weights[..., None] * (noise - data)).sum(1)


def fine_run(steps: int) -> Trajectory:
    """Euler's method on the mixture; the levels are not evenly spread."""
    times = tuple(((steps - i) / steps) ** 1.3 for i in range(steps + 1))
    states = [torch.randn(IMAGES, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)]
    velocities = []
    for start, end in itertools.pairwise(times):
        velocities.append(mixture_velocity(states[-1], start))
        states.append(states[-1] + (end - start) * velocities[-1])
    return Trajectory(times=times, states=torch.stack(states), velocities=torch.stack(velocities))


RUN = fine_run(FINE)


def network(states: Tensor, nodes: Sequence[int]) -> Tensor:
    return torch.stack([mixture_velocity(state, RUN.times[node]) for state, node in zip(states, nodes, strict=True)])


def end_error(nodes: Sequence[int]) -> float:
    """Of a short run over these nodes."""
    state = RUN.states[0]
    for start, end in itertools.pairwise(nodes):
        state = state + (RUN.times[end] - RUN.times[start]) * mixture_velocity(state, RUN.times[start])
    return float((state - RUN.states[-1]).square().mean())


def paths_of(edges: int, last: int = FINE) -> list[tuple[int, ...]]:
    return [(0, *inner, last) for inner in itertools.combinations(range(1, last), edges - 1)]


def price(table: np.ndarray, nodes: Sequence[int]) -> float:
    return sum(table[edge] for edge in itertools.pairwise(nodes))


# -- BOSS


@pytest.mark.parametrize("seed", range(20))
def test_boss_is_the_cheapest_path_of_random_tables(seed: int) -> None:
    random = np.random.default_rng(seed)
    last = int(random.integers(4, 13))
    table = random.random((last + 1, last + 1))
    for edges, found in enumerate(boss(table, 4), start=1):
        cheapest = min(paths_of(edges, last), key=lambda nodes: price(table, nodes))
        assert found.nodes == cheapest
        assert found.cost == pytest.approx(price(table, cheapest))


@pytest.mark.parametrize("metric", METRICS)
def test_boss_is_the_cheapest_path_of_a_flow(metric: Any) -> None:
    table = cost_table(RUN, metric)
    for edges, found in enumerate(boss(table, 4), start=1):
        cheapest = min(paths_of(edges), key=lambda nodes: price(table, nodes))
        assert (found.nodes, found.cost) == (cheapest, pytest.approx(price(table, cheapest)))


def test_a_table_prices_one_step_from_the_state_of_the_fine_run() -> None:
    table = cost_table(RUN)
    for start, end in itertools.combinations(range(FINE + 1), 2):
        jump = RUN.states[start] + (RUN.times[end] - RUN.times[start]) * RUN.velocities[start]
        assert table[start, end] == pytest.approx(float((jump - RUN.states[end]).square().mean()), abs=1e-12)
    assert np.isinf(table[np.tril_indices(FINE + 1)]).all()
    assert np.diag(table, 1) == pytest.approx(0)


def test_clean_samples_are_priced_alike_at_every_level() -> None:
    table = cost_table(RUN, "x0")
    clean = [RUN.states[i] - RUN.times[i] * RUN.velocities[i] for i in range(FINE)] + [RUN.states[-1]]
    for start, end in itertools.combinations(range(FINE + 1), 2):
        expected = float((clean[start] - clean[end]).square().mean())
        assert table[start, end] == pytest.approx(expected, abs=1e-12)


def test_prices_are_means_over_images() -> None:
    halves = [
        Trajectory(times=RUN.times, states=RUN.states[:, part], velocities=RUN.velocities[:, part])
        for part in (slice(0, 2), slice(2, None))
    ]
    weighted = sum(half.images / IMAGES * cost_table(half) for half in halves)
    np.testing.assert_allclose(np.triu(weighted, 1), np.triu(cost_table(RUN), 1), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("search", ["boss", "oss"])
def test_the_ends_of_the_range(search: str) -> None:
    found = boss(cost_table(RUN), FINE) if search == "boss" else oss(network, RUN, FINE)
    assert [len(path.nodes) - 1 for path in found] == list(range(1, FINE + 1))
    assert found[0].nodes == (0, FINE)
    assert found[0].cost == pytest.approx(end_error((0, FINE)))
    assert found[-1].nodes == tuple(range(FINE + 1))
    assert found[-1].cost == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    ("table", "k", "message"),
    [
        (np.ones((3, 4)), 1, r"square table, got shape \(3, 4\)"),
        (np.full((4, 4), np.nan), 1, "finite above the diagonal"),
        (np.ones((4, 4)), 4, r"whole number in 1 \.\. 3 \(the fine steps\), got 4"),
        (np.ones((4, 4)), 0, "got 0"),
        (np.ones((4, 4)), True, "got True"),
    ],
)
def test_boss_refuses(table: Any, k: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        boss(table, k)


# -- OSS


@pytest.mark.parametrize("metric", METRICS)
def test_what_oss_reports_is_what_a_run_gives(metric: Any) -> None:
    for path in oss(network, RUN, FINE, metric):
        assert path.cost == pytest.approx(end_error(path.nodes), rel=1e-9, abs=1e-20)


def test_oss_against_all_grids() -> None:
    """It is greedy, so it need not be the best; on this flow it is within a tenth of the best error, and BOSS, whose
    prices are not the error at the end, within a factor of two."""
    by_boss = boss(cost_table(RUN), 3)
    for edges, found in enumerate(oss(network, RUN, 3), start=1):
        best = min(map(end_error, paths_of(edges)))
        assert best <= found.cost * (1 + 1e-9)
        assert found.cost <= 1.1 * best
        assert end_error(by_boss[edges - 1].nodes) <= 2 * best


def test_oss_asks_for_one_batch_a_stage() -> None:
    """The first stage is the fine run's first evaluation, and the rest as many as there are nodes left."""
    asked: list[list[int]] = []

    def watched(states: Tensor, nodes: Sequence[int]) -> Tensor:
        assert states.shape == (len(nodes), IMAGES, SIZE)
        asked.append(list(nodes))
        return network(states, nodes)

    done: list[tuple[int, int]] = []
    oss(watched, RUN, 4, notify=lambda *now: done.append(now))
    assert asked == [list(range(stage, FINE)) for stage in (1, 2, 3)]
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_start_that_is_not_pinned() -> None:
    """A single step from the noise, taken for a state of any level."""
    (found,) = oss(network, RUN, 1, pin_start=False)
    errors = []
    for start in range(FINE):
        noise = RUN.states[0]
        end = noise - RUN.times[start] * mixture_velocity(noise, RUN.times[start])
        errors.append(float((end - RUN.states[-1]).square().mean()))
    assert found == SearchedGrid(nodes=(int(np.argmin(errors)), FINE), cost=pytest.approx(min(errors)))


def test_oss_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="no grid has a finite error"):
        oss(lambda states, nodes: states * torch.nan, RUN, 1, pin_start=False)
    with pytest.raises(ValueError, match="whole number in 1"):
        oss(network, RUN, FINE + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": (1.0,)}, "at least 2 levels that decrease"),
        ({"times": (1.0, 0.5, 0.5, 0.0)}, "at least 2 levels that decrease"),
        ({"times": (1.0, 0.0)}, f"2 times need 2 states and 1 velocities, got {FINE + 1} and {FINE}"),
    ],
)
def test_a_trajectory_fits_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trajectory(**{"times": RUN.times, "states": RUN.states, "velocities": RUN.velocities, **changes})
