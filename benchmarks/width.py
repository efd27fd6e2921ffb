"""Dynamic width and tokens: what they do to quality on the digits model, and what they save at the width of SiT-XL/2.

    python benchmarks/width.py --stage train      # three trainings, about 45 minutes on two CPU cores; resumes
    python benchmarks/width.py --stage quality    # needs the first; about 15 minutes
    python benchmarks/width.py --stage layers     # one layer of SiT-XL/2, about 5 minutes
    python benchmarks/width.py --stage model      # the whole of SiT-XL/2 with random weights, about 10 minutes
    python benchmarks/width.py --stage layers model --device cuda --dtype bfloat16 --batches 1 8 32

`train` makes a network with dynamic width (TDW), one with dynamic width and tokens (TDW+SDT), and, as the control, the
stock network trained for as long on the same draws. `quality` compares these with the untouched pipeline and with fewer
steps; claims rest on paired differences. `layers` and `model` time random weights: the speed-up that is realised beside
the one that the multiply-adds promise. Whatever is recorded goes to benchmarks/results/ (--record).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _pairs import compared, pairs_table
from _speed import randomized, show, timed, write
from rich.console import Console
from torch import Tensor

from flowaccel import DynamicWidth, SiTTransformer2DModel, VelocityRefiner, zoo
from flowaccel.cli.common import progress
from flowaccel.data import digits
from flowaccel.evaluation import Classes, Protocol, console_table, evaluate, load_results, markdown_table
from flowaccel.evaluation.reporting.plots import pareto_png
from flowaccel.methods.dynamic_width.gathering import choose_gather
from flowaccel.methods.dynamic_width.networks import DynamicSiTTransformer2DModel, make_dynamic
from flowaccel.methods.dynamic_width.plan_command import draw
from flowaccel.methods.dynamic_width.train import MacsCosts, WidthObjective, call_arguments, layer_ratios
from flowaccel.pipelines import load_pipeline
from flowaccel.recipe import Recipe, accelerated, preset
from flowaccel.zoo_build.width import LOOP, RATIO, build_width, train_longer

RESULTS = Path(__file__).parent / "results"
STEPS, FEWER, OPERATING = 10, (1, 2, 3, 4, 5), 4
BATCH = 25
"""Images of a timed call."""
XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}
SHARES = (0.25, 0.5, 0.75)


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=("train", "quality", "layers", "model"))
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--batches", type=int, nargs="+", default=(1, 4), help="images of a call, guided: twice the rows"
    )
    parser.add_argument("--layers", type=int, default=XL["num_layers"], help="layers of the stage model")
    parser.add_argument("--out", type=Path, default=Path("runs/width"))
    parser.add_argument("--claims-only", action="store_true", help="quality: work on the results that --out holds")
    parser.add_argument("--record", action="store_true", help="copy the results to benchmarks/results/")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage:
        STAGES[stage](arguments)


# -- training


def base_network() -> SiTTransformer2DModel:
    return load_pipeline(zoo.folder("sit-digits")).transformer.float().eval().requires_grad_(False)


def train_stage(arguments: argparse.Namespace) -> None:
    """Three networks in --out/train."""
    with progress() as notify:
        for name, tokens in (("tdw", False), ("tdw+sdt", True)):
            for _, state, total in build_width(arguments.out / "train" / name, tokens=tokens):
                notify(name, state.step, total)
        network = base_network()
        for state in train_longer(network, arguments.out / "train" / "longer"):
            notify("longer", state.step, LOOP.steps)
        network.to(torch.bfloat16).save_pretrained(arguments.out / "train" / "longer" / "network")


# -- quality


def quality_stage(arguments: argparse.Namespace) -> None:
    """results.json, claims.json, table.md, figures and plans."""
    pipe = load_pipeline(zoo.folder("sit-digits"), torch_dtype=torch.float32)
    protocol = Protocol(
        conditions=Classes(tuple(range(10))),
        steps=STEPS,
        baseline_steps=FEWER,
        num_samples=arguments.num_samples,
        latency_batch=BATCH,
        seed=arguments.seed,
        metrics=("fid", "kid", "class_accuracy", "precision", "recall"),
        rounds=arguments.rounds,
    )
    networks = trained(arguments.out / "train")
    with progress() as notify:
        run = arguments.out / "quality"
        results = (
            load_results(run) if arguments.claims_only else evaluate(pipe, recipes(networks), protocol, run, notify)
        )
    claims = {
        "gathers": {name: gathering(network) for name, network in networks.items()},
        "ratios": {name: ratios(network) for name, network in networks.items() if name != "longer"},
        "pairs": [compared(arguments.out / "quality", results, a, b) for a, b in PAIRS],
    }
    (arguments.out / "quality" / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
    table = markdown_table(results) + "\n\n" + pairs_table(claims["pairs"]) + "\n"
    (arguments.out / "quality" / "table.md").write_text(table)
    Console(width=150).print(console_table(results))
    print(pairs_table(claims["pairs"]))
    for name in ("tdw", "tdw+sdt"):
        draw(plan_of(pipe, networks[name]), arguments.out / "quality" / f"plan-{name}.png")
    if arguments.record:
        RESULTS.mkdir(exist_ok=True)
        for source, suffix in (("results.json", "json"), ("claims.json", "claims.json"), ("table.md", "md")):
            shutil.copyfile(arguments.out / "quality" / source, RESULTS / f"width_sit-digits_cpu.{suffix}")
        pareto_png(results, Path("docs/images/width.png"), "fid")
        shutil.copyfile(arguments.out / "quality" / "plan-tdw.png", "docs/images/width_plan.png")


def trained(folder: Path) -> dict[str, Any]:
    """The networks of the stage train. The control has gates too, all of them on, so that it is a recipe like them."""
    found: dict[str, Any] = {
        name: DynamicSiTTransformer2DModel.from_pretrained(folder / name / "width") for name in ("tdw", "tdw+sdt")
    }
    longer = SiTTransformer2DModel.from_pretrained(folder / "longer" / "network")
    found["longer"] = make_dynamic(longer.eval(), {"tokens": False})
    return found


def recipes(networks: dict[str, Any]) -> list[Recipe]:
    """Every network with all steps and with few, and together with FlowTurbo."""
    rows = []
    for name, network in networks.items():
        part = DynamicWidth(network, gather=gathering(network) or None)
        for steps in (STEPS, OPERATING, OPERATING - 1):
            rows.append(Recipe([part], name=f"{name}@{steps}", num_inference_steps=steps))
    turbo = preset("flowturbo-H1P1R1-single")
    rows.append(turbo)
    refiner = VelocityRefiner(zoo.folder("sit-digits") / "refiner")
    parts = [turbo.accelerators[0], DynamicWidth(networks["tdw"]), refiner]
    rows.append(Recipe(parts, name="tdw+flowturbo-H1P1R1-single"))
    return rows


def gathering(network: Any) -> dict[str, bool]:
    """In which layers gathering tokens pays here, for a guided call of one batch, as `flowaccel plan` decides it."""
    if not network.dynamic.sites:
        return {}
    kept = ratios(network)["tokens"]
    choose_gather(network, rows=2 * BATCH, tokens=network.pos_embed.shape[1], kept=kept)
    return {site.path: site.module.gather for site in network.dynamic.sites}


def ratios(network: Any) -> dict[str, Any]:
    """The realised ratio with the gates of evaluation, over the times of training."""
    base = base_network()
    network = copy.deepcopy(network)
    data = digits("generator")
    example = WidthObjective.example(data, base.null_label, "cpu")
    costs = MacsCosts.of(network, call_arguments(network, *example), 1)
    objective = WidthObjective(data=data, null_label=base.null_label, costs=costs, batch_size=512)
    found = layer_ratios(objective, network, torch.Generator().manual_seed(0))
    return {"asked": RATIO, "ratio": found.ratio, "gates": found.gates, "tokens": found.tokens}


def plan_of(pipe: Any, network: Any) -> Any:
    """The plan of one image at the operating point."""
    pipe.set_progress_bar_config(disable=True)
    with accelerated(pipe, DynamicWidth(network)):
        pipe(class_labels=[0], num_inference_steps=STEPS, generator=[torch.Generator().manual_seed(0)])
        return pipe.transformer.dynamic.plan


PAIRS = (
    *((f"{name}@{steps}", f"baseline@{steps}") for name in ("tdw", "tdw+sdt", "longer") for steps in (4, 3)),
    *((f"{name}@{steps}", f"longer@{steps}") for name in ("tdw", "tdw+sdt") for steps in (STEPS, 4, 3)),
    *((f"{name}@{STEPS}", "baseline") for name in ("tdw", "tdw+sdt", "longer")),
    *((f"{name}@4", f"baseline@{steps}") for name in ("tdw", "tdw+sdt") for steps in (2, 3)),
    ("tdw+flowturbo-H1P1R1-single", "flowturbo-H1P1R1-single"),
)


# -- time


def random_network(layers: int, arguments: argparse.Namespace, *, tokens: bool) -> Any:
    """SiT of the width of XL/2 with random weights, dynamic in width and, if wanted, tokens."""
    network = randomized(SiTTransformer2DModel(**{**XL, "num_layers": layers}), arguments.seed)
    network.to(arguments.device, getattr(torch, arguments.dtype))
    network = make_dynamic(network, {"tokens": tokens})
    return network.requires_grad_(False)


def inputs(rows: int, arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, arguments.dtype)
    return (
        torch.randn(rows, 4, 32, 32, device=arguments.device, dtype=dtype),
        torch.full((rows,), 0.5, device=arguments.device),
        torch.arange(rows, device=arguments.device),
    )


def random_bits(network: Any, share: float, seed: int) -> tuple[str, ...]:
    """So many units of every gate, the first always among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for gated in network.dynamic.gated_layers:
        units = gated.gate.units
        chosen = {0, *(1 + torch.randperm(units - 1, generator=generator)[: round(share * units) - 1]).tolist()}
        rows.append("".join("1" if unit in chosen else "0" for unit in range(units)))
    return tuple(rows)


def width_call(network: Any, data: tuple[Tensor, ...], bits: tuple[str, ...]) -> Callable[[], Tensor]:
    """Call the network at one width."""

    def call() -> Tensor:
        network.dynamic.chosen = bits
        with torch.no_grad():
            output: Tensor = network(*data, return_dict=False)[0]
        network.dynamic.chosen = None
        return output

    return call


def whole_call(network: Any, data: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The same of the whole."""

    def call() -> Tensor:
        with torch.no_grad(), network.dynamic.complete():
            output: Tensor = network(*data, return_dict=False)[0]
        return output

    return call


def layers_stage(arguments: argparse.Namespace) -> None:
    """One block, its width and its tokens at several shares; where gathering tokens begins to pay."""
    network = random_network(1, arguments, tokens=True)
    block, found = network.transformer_blocks[0], []
    for images in arguments.batches:
        rows = 2 * images
        hidden = torch.randn(rows, 256, 1152, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        temb = torch.randn(rows, 1152, device=arguments.device, dtype=hidden.dtype)
        calls: dict[str, Callable[[], Any]] = {"whole": block_call(network, block, hidden, temb, None, None)}
        for share in SHARES:
            bits = random_bits(network, share, arguments.seed)
            calls[f"width {share:g}"] = block_call(network, block, hidden, temb, bits, None)
            calls[f"tokens {share:g}"] = block_call(network, block, hidden, temb, None, share)
        calls["width 0.5, tokens 0.5"] = block_call(
            network, block, hidden, temb, random_bits(network, 0.5, arguments.seed), 0.5
        )
        found.append({"rows": rows, "tokens": rows * 256, "calls": timed(calls, arguments)})
        show(f"one block of SiT-XL/2, {rows} rows of 256 tokens", found[-1]["calls"])
    write(arguments, "width", "layers", rows=found)


def block_call(
    network: Any, block: Any, hidden: Tensor, temb: Tensor, bits: tuple[str, ...] | None, kept: float | None
) -> Callable[[], Tensor]:
    """Call the block alone, sliced and with random tokens."""
    site = network.dynamic.sites[0]
    keep = None
    if kept is not None:
        score = torch.rand(hidden.shape[:2], generator=torch.Generator().manual_seed(0))
        keep = (score <= score.quantile(kept)).unsqueeze(-1).to(hidden.device)

    def call() -> Tensor:
        dynamics = network.dynamic
        with torch.no_grad(), dynamics.complete():
            dynamics.clear()
            if bits is not None:
                dynamics.slice(bits)
            output = with_tokens(block, site, keep, hidden, temb)
            dynamics.clear()
        return output

    return call


def with_tokens(block: Any, site: Any, keep: Tensor | None, hidden: Tensor, temb: Tensor) -> Tensor:
    """The block with tokens given instead of routed; the router's own time is in the stage model."""
    handle = block.norm2.register_forward_pre_hook(lambda module, args: setattr(site.module, "keep", keep))
    try:
        return block(hidden, temb)
    finally:
        handle.remove()


def model_stage(arguments: argparse.Namespace) -> None:
    """The whole network at half of its heads and channels, with the default room for slices."""
    network = random_network(arguments.layers, arguments, tokens=False)
    found = []
    for images in arguments.batches:
        data = inputs(2 * images, arguments)
        half = random_bits(network, 0.5, arguments.seed)
        calls = {"whole": whole_call(network, data), "width 0.5": width_call(network, data, half)}
        entry = {"rows": 2 * images, "calls": timed(calls, arguments)}
        entry["slice_bytes"], entry["weight_bytes"] = network.dynamic.cache.held, network.dynamic.weight_bytes
        network.dynamic.cache.clear()
        found.append(entry)
        show(f"SiT-XL/2 with {arguments.layers} layers, {2 * images} rows", entry["calls"])
    write(arguments, "width", "model", rows=found)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": train_stage,
    "quality": quality_stage,
    "layers": layers_stage,
    "model": model_stage,
}

if __name__ == "__main__":
    main()
