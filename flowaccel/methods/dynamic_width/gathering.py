"""Gathering of tokens in practice: counts of kept tokens, static capacities, and whether gathering pays off."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowaccel.methods.dynamic_width.gated_layers import TokenSite
from flowaccel.methods.dynamic_width.tokens import TokenFeedForward, fitted_capacity

_ROUNDS = 7


class TokenCounts:
    """Numbers of tokens that every row of every site kept in the watched calls; see `watched_tokens`."""

    def __init__(self) -> None:
        self._gates: dict[str, list[Tensor]] = {}
        self.tokens: dict[str, int] = {}
        """Number of tokens, by the path of the site."""

    def add(self, site: TokenSite) -> None:
        """Count the tokens of the site's last call, without synchronising with the device."""
        if site.gates is not None:
            self._gates.setdefault(site.path, []).append(site.gates.detach().flatten(1).sum(1))
            self.tokens[site.path] = site.gates.shape[1]

    @property
    def paths(self) -> list[str]:
        """Paths of the sites that were seen."""
        return list(self._gates)

    def counts(self, path: str) -> Tensor:
        """Return the number of kept tokens (rows of all calls,) on the CPU."""
        return torch.cat(self._gates[path]).cpu().round().long()

    def share(self, path: str) -> float:
        """Return the mean share of the tokens that were kept."""
        return float(self.counts(path).double().mean()) / self.tokens[path]


@contextmanager
def watched_tokens(network: Any) -> Iterator[TokenCounts]:
    """Count the tokens of every call of a dynamic network inside the context.

    Args:
        network: a dynamic network; it is not changed.
    """
    seen = TokenCounts()

    def count(*_: Any) -> None:
        for site in network.dynamic.sites:
            seen.add(site)

    handle = network.register_forward_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def fit_capacities(network: Any, seen: TokenCounts, *, quantile: float = 1.0, margin: float = 0.05) -> dict[str, int]:
    """Set a capacity for every site, so that shapes are static and the host never waits for the device.

    With `quantile` 1 all that was seen fits. A smaller one saves more, and drops the least wanted tokens of rows that
    keep more than fit.

    Args:
        network: a dynamic network, whose sites are set.
        seen: counts of `watched_tokens`, at the resolution that is to be used.
        quantile: the share of rows that must fit, in (0, 1].
        margin: margin to add, as a share of all tokens, before rounding up to a quarter of them.

    Returns:
        The capacities by the path of the site.

    Raises:
        ValueError: an argument out of its range, or a site that was never seen.
    """
    sites = network.dynamic.sites
    missing = [site.path for site in sites if site.path not in seen.paths]
    if missing:
        raise ValueError(
            f"seen holds nothing of {missing[0]} and {len(missing) - 1} other sites: run the network first"
        )
    fitted = {
        site.path: fitted_capacity(seen.counts(site.path), seen.tokens[site.path], quantile=quantile, margin=margin)
        for site in sites
    }
    for site in sites:
        site.module.capacity = fitted[site.path]
    return fitted


def choose_gather(
    network: Any, *, rows: int, tokens: int, kept: float | Mapping[str, float], text_tokens: int = 0
) -> dict[str, float]:
    """Measure for every site whether gathering tokens is faster than computing all and clearing some.

    Sets `gather` of the site accordingly. Measured on the network's device; layers are whole and not compiled,
    capacities as they are.

    Args:
        network: a dynamic network, whose sites are set.
        rows: rows of a call, at least 1. A video network folds frames or places into them.
        tokens: image tokens of a row, at least 1.
        kept: the share of them that is kept, in [0, 1], or one for every path of a site.
        text_tokens: text tokens of a row, at least 0; fused blocks take them too.

    Returns:
        By the path of the site, the median time of gathering over that of computing all, of alternating calls.

    Raises:
        ValueError: an argument out of its range.
    """
    if rows < 1 or tokens < 1 or text_tokens < 0:
        raise ValueError(f"rows and tokens must be at least 1, text_tokens at least 0: {rows}, {tokens}, {text_tokens}")
    shares = {site.path: kept[site.path] if isinstance(kept, Mapping) else kept for site in network.dynamic.sites}
    wrong = {path: share for path, share in shares.items() if not 0 <= share <= 1}
    if wrong:
        raise ValueError(f"kept must be shares in [0, 1], got {wrong}")
    known: dict[tuple[Any, ...], float] = {}
    found = {}
    for site in network.dynamic.sites:
        module: Any = site.module
        count = round(shares[site.path] * tokens)
        alike = (count, module.capacity, *((name, value.shape) for name, value in module.named_parameters()))
        if alike not in known:
            known[alike] = _relative_time(module, rows, tokens, text_tokens, count)
        found[site.path] = known[alike]
        module.gather = found[site.path] < 1
    return found


@torch.no_grad()
def _relative_time(module: Any, rows: int, tokens: int, text_tokens: int, count: int) -> float:
    inputs = _noise(module, rows, tokens, text_tokens)
    keep = torch.zeros(rows, tokens, 1, dtype=torch.bool, device=inputs[0].device)
    if count:
        keep[:, torch.linspace(0, tokens - 1, count).round().long()] = True
    before = module.gather
    times: dict[bool, list[float]] = {True: [], False: []}
    module.keep, module.logits = keep, keep.float() - 0.5
    try:
        for turn in range(-2, _ROUNDS):
            for gather in (True, False) if turn % 2 else (False, True):
                module.gather = gather
                spent = _seconds(module, inputs)
                if turn >= 0:
                    times[gather].append(spent)
    finally:
        module.keep = module.logits = None
        module.gather = before
    return statistics.median(times[True]) / statistics.median(times[False])


def _noise(module: Any, rows: int, tokens: int, text_tokens: int) -> tuple[Any, ...]:
    """Return random inputs for the module."""
    weight = next(module.parameters())
    draw = functools.partial(torch.randn, device=weight.device, dtype=weight.dtype)
    if isinstance(module, TokenFeedForward):
        return (draw(rows, tokens, module.net[0].proj.in_features),)
    width, count = module.attn.to_q.in_features, text_tokens + tokens
    rotary = tuple(torch.randn(count, module.attn.head_dim, device=weight.device) for _ in range(2))
    return draw(rows, tokens, width), draw(rows, text_tokens, width), draw(rows, width), rotary


def _seconds(module: Any, inputs: tuple[Any, ...]) -> float:
    _wait(inputs[0].device)
    start = time.perf_counter()
    module.forward(*inputs)  # not the hooks: the router of a fused block is one
    _wait(inputs[0].device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
