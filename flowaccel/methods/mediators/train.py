"""Training of networks with mediator attention (arXiv 2408.05710).

One network is trained with several numbers of mediators, from scratch or converted from a softmax network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel.methods.mediators.networks import set_mediators
from flowaccel.training.labelled import LabelledBatch, LabelledObjective


@dataclass(frozen=True, kw_only=True)
class MediatorObjective:
    """Objective of a stock network, adapted to one that runs with several numbers of mediators.

    Every batch is divided among all of them, so that a step costs what it costs with one.

    With a teacher, the softmax network that was made over, what every block returns is drawn to what the teacher's
    does.
    """

    objective: LabelledObjective
    counts: tuple[int, ...] | None
    """Numbers of mediators that are trained, in turn. None is for layers that have a number each."""
    teacher: nn.Module | None = None
    feature_weight: float = 0.5
    """Weight of the mean squared error to the teacher's blocks."""
    blocks: str = "transformer_blocks"

    def __post_init__(self) -> None:
        if not 0 < len(self._turns) <= self.objective.batch_size:
            raise ValueError(
                f"counts must hold at least one number and at most batch_size={self.objective.batch_size} of them, got "
                f"{list(self._turns)}"
            )
        if self.feature_weight < 0:
            raise ValueError(f"feature_weight must not be negative, got {self.feature_weight}")

    @property
    def _turns(self) -> tuple[int | None, ...]:
        """Numbers of mediators that the layers are set to in turn."""
        return (None,) if self.counts is None else self.counts

    def __call__(self, network: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar.

        Raises:
            ValueError: gradient checkpointing with several numbers, where backward would compute with the last one.
        """
        inner: Any = getattr(network, "module", network)
        turns = self._turns
        if len(turns) > 1 and inner.is_gradient_checkpointing:
            raise ValueError(
                f"gradient checkpointing computes again with the last number of mediators, and a step has "
                f"{list(turns)}; switch it off, or train one number"
            )
        batch = self.objective.draw(generator, next(network.parameters()).device)
        parts = [_part(batch, place, len(turns)) for place in range(len(turns))]
        total = batch.t.new_zeros((), dtype=torch.float32)
        for count, part in zip(turns, parts, strict=True):
            set_mediators(network, count)
            total = total + len(part.t) / len(batch.t) * self._loss(network, part)
        return total

    def _loss(self, network: nn.Module, batch: LabelledBatch) -> Tensor:
        arguments = self.objective.arguments(batch)
        if self.teacher is None or not self.feature_weight:
            return self.objective.loss(network(*arguments, return_dict=False)[0].float(), batch)
        with torch.no_grad(), features(self.teacher, self.blocks) as wanted:
            self.teacher(*arguments, return_dict=False)
        with features(network, self.blocks) as found:
            output = network(*arguments, return_dict=False)[0].float()
        errors = [(a.float() - b.float()).square().mean() for a, b in zip(found, wanted, strict=True)]
        return self.objective.loss(output, batch) + self.feature_weight * torch.stack(errors).mean()


def _part(batch: LabelledBatch, place: int, parts: int) -> LabelledBatch:
    """Return every `parts`-th row of a batch."""
    rows = slice(place, None, parts)
    return replace(
        batch, images=batch.images[rows], noise=batch.noise[rows], t=batch.t[rows], labels=batch.labels[rows]
    )


@contextmanager
def features(network: nn.Module, blocks: str) -> Iterator[list[Tensor]]:
    """Collect the outputs of the blocks of a list in the calls inside the context, in order."""
    found: list[Tensor] = []
    listed: Any = getattr(network, "module", network).get_submodule(blocks)

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)

    handles = [block.register_forward_hook(note) for block in listed]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
