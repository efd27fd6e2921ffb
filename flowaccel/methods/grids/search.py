"""Search for step grids, subsets of a fine run's steps, for Euler's method on flow models.

A fine run visits K + 1 noise levels (nodes 0 .. K). A grid of k steps is a path of k edges from node 0 to node K; an
edge is one Euler step between its nodes. BOSS prices every edge once, from the fine run's own states, and finds the
cheapest path; OSS walks forward with the states that a short run would really have, which costs network evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flowaccel.checks import is_whole

Metric = Literal["state", "x0"]
METRICS: tuple[str, ...] = get_args(Metric)
GRID_METHODS = ("boss", "oss")
Velocity = Callable[[Tensor, Sequence[int]], Tensor]
"""`velocity(states, nodes)`: (M, B, ...) states, the m-th at node `nodes[m]`, to velocities of that shape."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A run of Euler's method over a fine grid.

    Args:
        times: K + 1 noise levels, decreasing.
        states: (K + 1, B, ...) the state at each of them.
        velocities: (K, B, ...) the velocity (noise - data) at all but the last.

    Raises:
        ValueError: fewer than 2 levels, levels that do not decrease, or not as many states or velocities.
    """

    times: tuple[float, ...]
    states: Tensor
    velocities: Tensor

    def __post_init__(self) -> None:
        if len(self.times) < 2 or not all(a > b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times must be at least 2 levels that decrease, got {self.times}")
        if (len(self.states), len(self.velocities)) != (self.steps + 1, self.steps):
            raise ValueError(
                f"{self.steps + 1} times need {self.steps + 1} states and {self.steps} velocities, got "
                f"{len(self.states)} and {len(self.velocities)}"
            )

    @property
    def steps(self) -> int:
        """Number of steps K."""
        return len(self.times) - 1

    @property
    def images(self) -> int:
        """Number of images B."""
        return self.states.shape[1]

    def errors(self, node: int, state: Tensor, velocity: Tensor, metric: Metric = "state") -> np.ndarray:
        """Return the distance from the end of an Euler step from `node` to this run, for every later node.

        Args:
            node: node at which the step starts.
            state: (B, ...) there.
            velocity: (B, ...) there.
            metric: `state` compares states; `x0` the clean samples that state and velocity point at, whose errors do
                not shrink with the noise level.

        Returns:
            (K - node,) float64: the mean squared difference, over images and their numbers, to nodes node + 1 .. K.
        """
        clean = metric == "x0"
        found = []
        for end in range(node + 1, self.steps + 1):
            reach, target = (0.0 if clean else self.times[end]), self.states[end]
            if clean and end < self.steps:
                target = target - self.times[end] * self.velocities[end]
            ahead = state + (reach - self.times[node]) * velocity
            found.append(float((ahead - target).square().mean(dtype=torch.float64)))
        return np.array(found)


@dataclass(frozen=True, kw_only=True)
class SearchedGrid:
    """Grid with its cost.

    Args:
        nodes: nodes of the fine run, from 0 to K; its steps lie between them.
        cost: quantity that the search minimised: for BOSS the sum over the steps, for OSS the error at the end.
    """

    nodes: tuple[int, ...]
    cost: float


def cost_table(trajectory: Trajectory, metric: Metric = "state") -> np.ndarray:
    """Return BOSS's cost of every edge: the error of one Euler step that starts at the fine run's own state.

    BOSS (arXiv 2312.16414), stage 1. It takes no network evaluation beyond those of the fine run.

    Args:
        trajectory: the fine run.
        metric: see `Trajectory.errors`.

    Returns:
        (K + 1, K + 1) float64, infinite on and below the diagonal.
    """
    steps = trajectory.steps
    table = np.full((steps + 1, steps + 1), np.inf)
    for node in range(steps):
        table[node, node + 1 :] = trajectory.errors(node, trajectory.states[node], trajectory.velocities[node], metric)
    return table


def boss(cost: Any, k: int) -> tuple[SearchedGrid, ...]:
    """Return the cheapest paths of exactly 1, 2, ..., k edges through a cost table, in O(k K^2).

    The dynamic programme of BOSS (arXiv 2312.16414, stage 1): J[q, j] = min_i J[q - 1, i] + cost[i, j].

    Args:
        cost: (K + 1, K + 1); what lies above the diagonal counts.
        k: most edges, 1 .. K.

    Returns:
        The path of q edges at position q - 1; of equal ones the one whose nodes come first.

    Raises:
        ValueError: not a square table, a price that is not finite, or k out of range.
    """
    table = np.array(cost, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"cost must be a square table, got shape {table.shape}")
    last = len(table) - 1
    _check_count(k, last)
    above = np.triu(np.ones_like(table, dtype=bool), 1)
    if not np.isfinite(table[above]).all():
        raise ValueError("cost must be finite above the diagonal; did the fine run make NaN or infinite states?")
    table[~above] = np.inf
    total = np.full(last + 1, np.inf)
    total[0] = 0.0
    parents: list[np.ndarray] = []
    found = []
    for _ in range(k):
        candidates = total[:, None] + table
        parents.append(candidates.argmin(axis=0))
        total = candidates.min(axis=0)
        found.append(SearchedGrid(nodes=_traced(parents, last), cost=float(total[last])))
    return tuple(found)


def _traced(parents: Sequence[np.ndarray], last: int) -> tuple[int, ...]:
    nodes = [last]
    for step in reversed(parents):
        nodes.append(int(step[nodes[-1]]))
    return tuple(reversed(nodes))


def _check_count(k: int, last: int) -> None:
    if not is_whole(k, 1, last):
        raise ValueError(f"k, the number of steps, must be a whole number in 1 .. {last} (the fine steps), got {k!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class _PartialGrid:
    """Best path found to a node."""

    nodes: tuple[int, ...]
    state: Tensor
    error: float


def oss(
    velocity: Velocity,
    trajectory: Trajectory,
    k: int,
    metric: Metric = "state",
    *,
    pin_start: bool = True,
    notify: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[SearchedGrid, ...]:
    """Search grids of 1, 2, ..., k steps whose Euler runs end near the fine run's end.

    The forward dynamic programme of OSS (arXiv 2503.21774): at every stage each node keeps the one state, of those
    that a step from the stage before leads to, that lies nearest to the fine run. As it keeps one state a node, it is
    greedy, and may miss the best grid. The errors are means over all images, so that one grid serves all of them
    (the authors search per sample and take medians).

    Args:
        velocity: the network, at states of the search's own; called once per stage with at most K states, K (k - 1)
            in all.
        trajectory: the fine run.
        k: most steps, 1 .. K.
        metric: see `Trajectory.errors`.
        pin_start: begin at node 0. The authors' code begins anywhere, with the noise taken for a state of that level,
            so that its grids may start below the level of the noise; then `velocity` is called for K more states.
        notify: `notify(stages done, stages)`.

    Returns:
        The path of q steps at position q - 1; its cost is the error at node K.

    Raises:
        ValueError: k out of range, or no way to the end has a finite error.
    """
    _check_count(k, trajectory.steps)
    starts = [0] if pin_start else range(trajectory.steps)
    reached = {node: _PartialGrid(nodes=(node,), state=trajectory.states[0], error=0.0) for node in starts}
    found = []
    for stage in range(k):
        nodes = sorted(node for node in reached if node < trajectory.steps)
        known = stage == 0 and pin_start  # the fine run has been there
        velocities = (
            trajectory.velocities[:1] if known else velocity(torch.stack([reached[n].state for n in nodes]), nodes)
        )
        reached = _advanced(trajectory, {n: reached[n] for n in nodes}, velocities, metric)
        if trajectory.steps not in reached:
            raise ValueError("no grid has a finite error; did the network return NaN or infinite values?")
        end = reached[trajectory.steps]
        found.append(SearchedGrid(nodes=end.nodes, cost=end.error))
        notify(stage + 1, k)
    return tuple(found)


def _advanced(
    trajectory: Trajectory, reached: dict[int, _PartialGrid], velocities: Tensor, metric: Metric
) -> dict[int, _PartialGrid]:
    """Return the best path to every node that one step from `reached` leads to."""
    errors = np.full((len(reached), trajectory.steps + 1), np.inf)
    parents = list(reached)
    for row, (parent, velocity) in enumerate(zip(parents, velocities, strict=True)):
        errors[row, parent + 1 :] = trajectory.errors(parent, reached[parent].state, velocity, metric)
    errors[~np.isfinite(errors)] = np.inf
    best = {}
    for node in np.flatnonzero(np.isfinite(errors).any(axis=0)).tolist():
        row = int(errors[:, node].argmin())
        parent = parents[row]
        width = trajectory.times[node] - trajectory.times[parent]
        best[node] = _PartialGrid(
            nodes=(*reached[parent].nodes, node),
            state=reached[parent].state + width * velocities[row],
            error=float(errors[row, node]),
        )
    return best
