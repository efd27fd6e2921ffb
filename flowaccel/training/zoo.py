"""How every entry of the zoo is made: `flowaccel zoo build NAME` calls the function of that name here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowaccel.data import digits
from flowaccel.models import SiTTransformer2DModel
from flowaccel.training.flow import FlowObjective, shift_augment
from flowaccel.training.loop import LoopConfig, Progress, train

SIT_DIGITS = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 1,
    "num_layers": 12,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_classes": 10,
    "learn_sigma": False,
}
SIT_DIGITS_LOOP = LoopConfig(
    steps=4500, learning_rate=1e-3, warmup=200, cosine=True, weight_decay=0.01, save_every=250, keep=(2250,), seed=0
)


def train_sit_digits(out: Path, loop: LoopConfig = SIT_DIGITS_LOOP) -> Iterator[Progress]:
    """Train the digits generator (64 tokens, 12 blocks of width 64); writes `out/transformer`."""
    import torch

    torch.manual_seed(loop.seed)
    model = SiTTransformer2DModel(**SIT_DIGITS)
    objective = FlowObjective(data=digits("generator"), null_label=model.null_label, augment=shift_augment)
    yield from train(model, objective, loop, out / "training")
    model.save_pretrained(out / "transformer")
