"""Mediator attention (arXiv 2408.05710) and Agent Attention (arXiv 2312.08874) in time, with random weights.

    python benchmarks/mediators_time.py --stage layers   # one layer of attention, about 5 minutes on two CPU cores
    python benchmarks/mediators_time.py --stage models   # the whole of SiT-S/2, about 6 minutes
    python benchmarks/mediators_time.py --stage agents   # pipelines of stock networks, half an hour
    python benchmarks/mediators_time.py --stage models --sides 128   # 16384 tokens, half an hour and 3 GB
    python benchmarks/mediators_time.py --device cuda --dtype bfloat16 --sides 16 32 64 128
    python benchmarks/mediators_time.py --quick          # seconds: whether it runs

`layers` and `models` set softmax attention against as many mediators as fit, over the number of tokens: the speed-up
that is realised beside the one that the multiply-adds promise, and the number of tokens from which on mediators are
faster. `agents` runs pipelines with AgentAttention, and with fewer steps: a UNet with the highest resolution of Stable
Diffusion 1.5 and PixArt with one block, both with 64 x 64 tokens. How far their results are from the untouched
pipeline's is printed as well; weights are random, so that this says nothing about models that were trained.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from _speed import Call, randomized, show, timed, write
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from flowaccel import AgentAttention
from flowaccel.methods.mediators.attention import MediatorAttention
from flowaccel.methods.mediators.networks import MediatorSiTTransformer2DModel, set_mediators
from flowaccel.models import SiTTransformer2DModel
from flowaccel.models.sit import SiTAttention
from flowaccel.recipe import accelerated

SIDES = {"layers": (16, 32, 64, 128), "models": (16, 32, 64)}
LAYER_COUNTS, MODEL_COUNTS = (16, 64, 256), (4, 16, 64)
SMALL = {"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}
"""SiT-S/2."""
STEPS, FEWER = 5, (4, 3)
AGENTS = ((2, 0.4), (4, 0.4), (8, 0.4), (4, 1.0))
"""Stride, and the share of the steps."""
UNTRAINED = "weights are random: errors say nothing about models that were trained"
QUICK = {"sides": (4, 8), "rounds": 2, "width": 32, "heads": 4}


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=tuple(STAGES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--width", type=int, default=384, help="layers")
    parser.add_argument("--heads", type=int, default=6, help="layers")
    parser.add_argument("--sides", type=int, nargs="+", help=f"layers, models: of square grids of tokens; {SIDES}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds; no numbers to quote")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    parser.add_argument("--out", type=Path, default=Path("runs/mediators"))
    arguments = parser.parse_args()
    if arguments.quick and arguments.record:
        parser.error("--quick has no numbers to --record")
    if arguments.quick:
        vars(arguments).update(QUICK)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage:
        STAGES[stage](arguments)


def placed(arguments: argparse.Namespace, *tensors: Any) -> Any:
    """On the device and in the type that were asked for."""
    moved = [tensor.to(arguments.device, getattr(torch, arguments.dtype)) for tensor in tensors]
    return moved[0] if len(moved) == 1 else moved


def without_gradients(function: Callable[..., Any], *args: Any) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return function(*args)

    return call


# -- mediators


def layers_stage(arguments: argparse.Namespace) -> None:
    """One layer of attention: softmax, and as many mediators as fit."""
    rows = []
    for side in arguments.sides or SIDES["layers"]:
        tokens, shape = side * side, (arguments.width, arguments.heads)
        torch.manual_seed(arguments.seed)
        hidden = placed(arguments, torch.randn(1, tokens, arguments.width))
        layers: dict[str, Any] = {"softmax": SiTAttention(*shape)}
        for count in (count for count in LAYER_COUNTS if count < tokens):
            layers[f"n={count}"] = MediatorAttention(*shape, (side, side), (count,))
        for count in (count for count in LAYER_COUNTS[:2] if count < tokens):
            bare = MediatorAttention(*shape, (side, side), (count,), use_bias=False, use_dwc=False)
            layers[f"n={count}, no biases, no convolution"] = bare
        calls = {name: without_gradients(placed(arguments, layer).eval(), hidden) for name, layer in layers.items()}
        rows.append({"tokens": tokens, "calls": timed(calls, arguments)})
        show(f"one layer, width {arguments.width}, {tokens} tokens", rows[-1]["calls"])
    finish(arguments, "layers", rows, width=arguments.width, heads=arguments.heads)


def models_stage(arguments: argparse.Namespace) -> None:
    """A whole network: stock SiT, and one with mediators at as many as fit."""
    rows = []
    for side in arguments.sides or SIDES["models"]:
        rows.append({"tokens": side * side, "calls": timed(model_calls(side, arguments), arguments)})
        show(f"SiT-S/2, {side * side} tokens", rows[-1]["calls"])
    finish(arguments, "models", rows, network=SMALL)


def model_calls(side: int, arguments: argparse.Namespace) -> dict[str, Call]:
    """Networks for one side, which live as long as these calls."""
    config = {**SMALL, **({"num_layers": 1} if arguments.quick else {}), "sample_size": 2 * side}
    counts = tuple(count for count in MODEL_COUNTS if count < side * side)
    stock = randomized(SiTTransformer2DModel(**config), arguments.seed)
    mediated = randomized(MediatorSiTTransformer2DModel(**config, mediator_config={"counts": counts}), arguments.seed)
    stock, mediated = placed(arguments, stock, mediated)
    latents = placed(arguments, torch.randn(1, 4, 2 * side, 2 * side))
    given = (latents, torch.full((1,), 0.5, device=latents.device), torch.zeros(1, dtype=torch.long).to(latents.device))

    def with_mediators(count: int) -> Tensor:
        set_mediators(mediated, count)
        output: Tensor = mediated(*given, return_dict=False)[0]
        return output

    calls = {"softmax": without_gradients(functools.partial(stock, *given, return_dict=False))}
    return calls | {f"n={count}": without_gradients(with_mediators, count) for count in counts}


def finish(arguments: argparse.Namespace, stage: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Say from how many tokens on each call is faster than softmax, and write all down."""
    names = dict.fromkeys(name for row in rows for name in row["calls"] if name != "softmax")
    speedups = {
        name: {row["tokens"]: row["calls"][name]["speedup"] for row in rows if name in row["calls"]} for name in names
    }
    found = {name: break_even(measured) for name, measured in speedups.items()}
    for name, tokens in found.items():
        print(f"  {name}: break-even, {said(tokens, speedups[name])}")
    write(arguments, "mediators", stage, rows=rows, break_even_tokens=found, **about)


def break_even(speedups: Mapping[int, float]) -> float | None:
    """The number of tokens from which on everything measured is at least as fast: where the speed-up, by numbers of
    tokens, last crosses 1, interpolated in the logarithms of both; the fewest tokens if nothing is slower; None if the
    most tokens are.
    """
    tokens = sorted(speedups)
    slower = [index for index, count in enumerate(tokens) if speedups[count] < 1]
    if not slower:
        return float(tokens[0])
    if slower[-1] == len(tokens) - 1:
        return None
    below, above = tokens[slower[-1]], tokens[slower[-1] + 1]
    share = math.log(speedups[below]) / (math.log(speedups[below]) - math.log(speedups[above]))
    return math.exp((1 - share) * math.log(below) + share * math.log(above))


def said(tokens: float | None, measured: Mapping[int, float]) -> str:
    if tokens is None:
        return f"none measured, up to {max(measured)} tokens"
    return f"{'at most ' if tokens <= min(measured) else ''}{tokens:.0f} tokens"


# -- agents


def unet_pipeline(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion 1.5 down to its second resolution, and what to call it with."""
    side, channels, heads, context = (8, (32, 64), 4, 16) if arguments.quick else (64, (320, 640), 8, 768)
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=heads,
    )
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt_embeds": placed(arguments, torch.randn(1, 77, context))}


def pixart_pipeline(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """One block of PixArt-alpha, and what to call it with."""
    side, heads, width, captions = (8, 2, 8, 16) if arguments.quick else (64, 16, 72, 4096)
    network = PixArtTransformer2DModel(
        sample_size=2 * side,
        num_layers=1,
        num_attention_heads=heads,
        attention_head_dim=width,
        cross_attention_dim=heads * width,
        caption_channels=captions,
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder(),
        transformer=network.eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    embeds = placed(arguments, torch.randn(1, 120, captions))
    mask = torch.ones(1, 120, device=embeds.device)
    return pipe, {
        "prompt_embeds": embeds,
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def autoencoder() -> AutoencoderKL:
    """A small one that makes latents an eighth as large as images, and never runs."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**kinds, block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4)


def agents_stage(arguments: argparse.Namespace) -> None:
    """Pipelines with agents at several strides and shares of the steps, beside fewer steps."""
    rows = []
    for title, make in PIPELINES.items():
        torch.manual_seed(arguments.seed)
        pipe, given = make(arguments)
        pipe.to(arguments.device, getattr(torch, arguments.dtype))
        pipe.set_progress_bar_config(disable=True)
        rows.append({"pipeline": title, "calls": agents_measured(pipe, given, arguments)})
        show(f"{title}, {STEPS} steps unless it says fewer; {UNTRAINED}", rows[-1]["calls"])
        for name, call in rows[-1]["calls"].items():
            output = "" if call["output_error"] is None else f", of the first network call {call['output_error']:.3g}"
            print(f"  {name:<24} relative L2 error of the latents {call['latents_error']:.3g}{output}")
    write(arguments, "mediators", "agents", steps=STEPS, weights="random", about_errors=UNTRAINED, rows=rows)


PIPELINES = {
    "UNet of Stable Diffusion 1.5, two resolutions": unet_pipeline,
    "PixArt-alpha, one block": pixart_pipeline,
}


def agents_measured(pipe: Any, given: dict[str, Any], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    def sampled(steps: int) -> Tensor:
        generator = torch.Generator().manual_seed(arguments.seed)
        options = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        latents: Tensor = pipe(**given, **options, generator=generator).images
        return latents

    fewest = min_tokens(pipe)
    calls: dict[str, Call] = {"untouched": functools.partial(sampled, STEPS)}
    within: dict[str, Any] = {}
    for stride, share in AGENTS:
        name = f"stride {stride}, first {share:g}"
        calls[name] = calls["untouched"]
        within[name] = functools.partial(
            accelerated, pipe, AgentAttention(stride=stride, first=share, min_tokens=fewest)
        )
    calls |= {f"{steps} steps": functools.partial(sampled, steps) for steps in FEWER}
    found = timed(calls, arguments, within, max_warmup=0)  # the first calls are enough for what takes seconds
    expected, first = first_output(pipe, calls["untouched"])
    for name, call in calls.items():
        with within.get(name, nullcontext)():
            latents, output = first_output(pipe, call)
        found[name]["latents_error"] = relative(latents, expected)
        found[name]["output_error"] = relative(output, first) if name in within else None
    return found


def network_of(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def min_tokens(pipe: Any) -> int:
    """Those of the highest resolution."""
    config = network_of(pipe).config
    side = config.sample_size // getattr(config, "patch_size", 1)
    return int(side * side)


def first_output(pipe: Any, call: Call) -> tuple[Tensor, Tensor]:
    """The latents of a call, and what the network returned first."""
    outputs: list[Tensor] = []
    handle = network_of(pipe).register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    try:
        return call(), outputs[0]
    finally:
        handle.remove()


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 distance."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "layers": layers_stage,
    "models": models_stage,
    "agents": agents_stage,
}

if __name__ == "__main__":
    main()
