"""Is zoo:sit-digits a sound reference model? Class accuracy, Frechet distance against a half-trained model,
memorisation.

    flowaccel zoo build sit-digits --out build/sit-digits
    python benchmarks/digits_quality.py --half build/sit-digits/training/state-2250.safetensors --record

Memorisation: the pixel distance of every sample to its nearest training image, beside the same distance of real digits
that were held out. Samples of a model that copies lie much closer to the training set than real digits do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowaccel import FlowRungeKuttaScheduler, SiTPipeline, SiTTransformer2DModel, zoo
from flowaccel.data import digits
from flowaccel.evaluation import (
    Classes,
    Moments,
    Protocol,
    RowSamples,
    difference,
    environment,
    frechet_distance,
    load_features,
    load_reference,
)
from flowaccel.evaluation.features.extractors import quantise
from flowaccel.evaluation.reporting.plots import sample_grid
from flowaccel.evaluation.runner import call
from flowaccel.training.loop import load_average

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print, and with --record write benchmarks/results/digits_quality_cpu.json and the sample grid of the
    docs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", type=Path, help="state of the half-trained model")
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()

    network = load_features("zoo:digits-features")
    reference = load_reference("zoo:digits", network)
    protocol = Protocol(conditions=Classes(tuple(range(10))), steps=arguments.steps)
    pipe = SiTPipeline.from_pretrained(zoo.folder("sit-digits"), dtype=torch.float32)
    images = sample(pipe, protocol, arguments.num_samples)
    whole = row("trained", images, protocol, network)
    held_out = digits("reference")
    found: dict[str, Any] = {
        "samples": arguments.num_samples,
        "steps": arguments.steps,
        "class_accuracy": accuracy(whole),
        "class_accuracy_of_held_out_digits": float(
            (network.classify(network(quantise(held_out))) == held_out.labels).float().mean()  # type: ignore[misc]
        ),
        "frechet": frechet_distance(Moments.of(whole.features), reference.moments),
        "frechet_of_training_digits": frechet_distance(
            Moments.of(network(quantise(digits("generator")))), reference.moments
        ),
        "nearest_training_image": memorisation(images),
    }
    if arguments.half is not None:
        found["half_trained"] = against_half(arguments, protocol, whole, reference, network)
    found["environment"] = environment()
    print(json.dumps(found, indent=1))
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "digits_quality_cpu.json").write_text(json.dumps(found, indent=1) + "\n")
        by_class = [digits("reference").labels == label for label in range(10)]
        real = torch.stack([quantise(held_out)[mask][0] for mask in by_class])
        rows = {"real, held out": real} | {
            f"samples {10 * k}-{10 * k + 9}": images[10 * k : 10 * k + 10] for k in range(5)
        }
        sample_grid(rows, Path("docs/images/digits.png"))


def sample(pipe: SiTPipeline, protocol: Protocol, count: int) -> Tensor:
    """uint8 (N, 1, 8, 8)."""
    pipe.set_progress_bar_config(disable=True)
    batches = torch.arange(count).split(protocol.batch_size)
    return torch.cat([call(pipe, protocol, ids.tolist(), protocol.steps) for ids in batches])


def row(name: str, images: Tensor, protocol: Protocol, network: Any) -> RowSamples:
    """What the feature network sees in `images`."""
    features = network(images)
    labels = protocol.conditions.labels(range(len(images)))
    return RowSamples(name=name, features=features, labels=labels, predicted=network.classify(features), images=images)


def accuracy(samples: RowSamples) -> float:
    """Share of samples that show the class asked for."""
    return float((samples.predicted == samples.labels).float().mean())  # type: ignore[union-attr, attr-defined]


def memorisation(images: Tensor) -> dict[str, Any]:
    """Distances to the nearest training image (8-bit pixels, Euclidean) of samples and of held-out digits."""
    training = quantise(digits("generator")).float().flatten(1)

    def quantiles(batch: Tensor) -> dict[str, float]:
        nearest = torch.cdist(batch.float().flatten(1), training).min(dim=1).values
        levels = torch.quantile(nearest, torch.tensor([0.01, 0.05, 0.5, 0.95]))
        return dict(zip(("p01", "p05", "median", "p95"), levels.tolist(), strict=True))

    held_out = quantise(digits("reference"))
    nearest = torch.cdist(images.float().flatten(1), training).min(dim=1).values
    threshold = quantiles(held_out)["p01"]
    return {
        "samples": quantiles(images),
        "held_out_digits": quantiles(held_out),
        "share_of_samples_closer_than_the_held_out_p01": float((nearest < threshold).float().mean()),
    }


def against_half(arguments: Any, protocol: Protocol, whole: RowSamples, reference: Any, network: Any) -> dict[str, Any]:
    """Frechet distances of the trained and of the half-trained model on the same sample ids, and their paired
    difference.
    """
    config = SiTTransformer2DModel.load_config(zoo.folder("sit-digits") / "transformer")
    model = SiTTransformer2DModel.from_config(config)
    load_average(model, arguments.half)
    count = arguments.num_samples
    images = sample(SiTPipeline(model.eval(), FlowRungeKuttaScheduler("heun")), protocol, count)
    half = row("half", images, protocol, network)
    compared = difference(half, whole, "fid", reference)
    return {
        "samples": count,
        "frechet_half": frechet_distance(Moments.of(half.features), reference.moments),
        "frechet_trained": frechet_distance(Moments.of(whole.features), reference.moments),
        "difference": compared["difference"],
        "difference_ci95": compared["ci95"],
        "class_accuracy_half": accuracy(half),
    }


if __name__ == "__main__":
    main()
