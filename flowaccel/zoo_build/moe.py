"""Digits generator with experts: from scratch, upcycled, and the dense controls that are trained as long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flowaccel import zoo
from flowaccel.data import digits
from flowaccel.methods.moe.accelerator import MixtureOfExperts
from flowaccel.methods.moe.networks import MoESiTTransformer2DModel, upcycle_to_moe
from flowaccel.methods.moe.settings import MoESettings
from flowaccel.methods.moe.train import PREDICTOR, MoEObjective, expert_rates, prepare_training, settle
from flowaccel.models import SiTTransformer2DModel
from flowaccel.pipelines import load_pipeline
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, Progress, train
from flowaccel.zoo_build.width import save_variant

EXPERT_COUNT = 8
BATCH = 64
CALIBRATION_BATCHES = 50
FRESH_LOOP = LoopConfig(
    steps=1500,
    learning_rate=1e-3,
    warmup=100,
    cosine=True,
    weight_decay=0.01,
    clip_apart=(PREDICTOR,),
    ema_decay=0.995,
    save_every=100,
    seed=0,
)
UPCYCLE_LOOP = LoopConfig(
    steps=800,
    learning_rate=1e-3,
    warmup=20,
    cosine=True,
    rate_scales=expert_rates(0.25),
    clip_apart=(PREDICTOR,),
    ema_decay=0.99,
    save_every=100,
    seed=0,
)


@dataclass(frozen=True, kw_only=True)
class MoETraining:
    """Configuration of one network and its training."""

    moe: dict[str, Any] | None
    """Its experts; None for a dense one."""
    upcycled: bool
    """Whether it starts from the digits generator of the zoo, else from scratch."""

    @property
    def loop(self) -> LoopConfig:
        """Configuration of the training loop."""
        return UPCYCLE_LOOP if self.upcycled else FRESH_LOOP

    def network(self, seed: int) -> Any:
        """Return the network at its start, with all weights trainable."""
        torch.manual_seed(seed)
        base = load_pipeline(zoo.folder("sit-digits")).transformer.float()
        if self.upcycled:
            network = base if self.moe is None else upcycle_to_moe(base, self.moe)
        else:
            config = {name: value for name, value in base.config.items() if not name.startswith("_")}
            kind = SiTTransformer2DModel if self.moe is None else MoESiTTransformer2DModel
            network = kind(**config, **({} if self.moe is None else {"moe_config": self.moe}))
        prepare_training(network)
        return network


def experts(router: str) -> dict[str, Any]:
    """Return settings of experts in every second block, which compute as much as the dense feed-forward."""
    return {"router": router, "num_experts": EXPERT_COUNT, "capacity": 1.0}


TRAININGS = {
    "diffmoe": MoETraining(moe=experts("diffmoe"), upcycled=False),
    "dense": MoETraining(moe=None, upcycled=False),
    "token_choice": MoETraining(moe=experts("token_choice"), upcycled=False),
    "upcycled": MoETraining(moe=experts("diffmoe"), upcycled=True),
    "longer": MoETraining(moe=None, upcycled=True),
}
"""`dense` is trained like the first, `longer` like `upcycled`."""


def objective(network: Any, training: MoETraining) -> MoEObjective:
    """Return the flow-matching objective on digits; upcycled experts start with all of them."""
    inner = FlowObjective(
        data=digits("generator"), null_label=network.null_label, batch_size=BATCH, augment=shift_augment
    )
    annealed = training.upcycled and training.moe is not None
    return MoEObjective(objective=inner, full_steps=20 if annealed else 0, ramp=80 if annealed else 0)


def train_moe(network: Any, training: MoETraining, work: Path, loop: LoopConfig) -> Iterator[Progress]:
    """Train in place, and fit the thresholds to the averaged weights, where there are any."""
    goal = objective(network, training)
    settings = None if training.moe is None else asdict(MoESettings.of(training.moe))
    yield from train(network, goal, loop, work, settings)
    if training.moe is not None:
        settle(network, goal.objective, batches=CALIBRATION_BATCHES, seed=loop.seed)


def build_moe(out: Path) -> Iterator[tuple[str, Progress, int]]:
    """Build the recipe with experts for the digits pipeline of the zoo, upcycled from its weights."""
    training = TRAININGS["upcycled"]
    network = training.network(training.loop.seed)
    for progress in train_moe(network, training, out / "training", training.loop):
        yield "experts", progress, training.loop.steps
    save_variant(MixtureOfExperts, network, out, "sit-digits-moe")
