"""One evaluation from start to finish: samples, features, cost, interleaved timing, metrics, result file, figures.

A run folder holds one folder per row (its samples, its manifest) and the results. Every part can be interrupted and is
resumed by the same call; batch size and timing settings may differ between calls, whatever the samples depend on may
not.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowaccel import Recipe, accelerated, is_accelerated

from .conditions import Conditions
from .cost import CallCounter, count_macs, peak_memory_mb, reset_peak_memory, timed_stages
from .environment import environment
from .features import FeatureNetwork, check_reference, fingerprint, load_features, load_reference
from .figures import PARETO_METRICS, pareto, pareto_png, sample_grid
from .latency import Timing, measure_latency
from .metrics import METRICS, RowSamples, find_metric, measure
from .processes import World, claimed, processes
from .report import html_report
from .schema import SCHEMA_VERSION, Results, Row, load_results, save_results
from .statistics import is_statistics
from .store import SampleStore, folder_name, generate, sample_generator
from .text import load_clip, text_match

BASELINE = "baseline"
DEFAULT_METRICS = ("fid", "kid", "class_accuracy", "rel_l2")
_GRID_SAMPLES = 10

Notify = Callable[[str, int, int], None]
"""`notify(stage, done, total)`, for progress bars."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is compared with what, and how."""

    conditions: Conditions
    """Classes or prompts to sample for."""
    steps: int
    """Steps of the untouched pipeline."""
    baseline_steps: tuple[int, ...] = ()
    """Also measure the untouched pipeline with these numbers of steps."""
    num_samples: int = 2000
    seed: int = 0
    batch_size: int = 100
    guidance_scale: float | None = None
    """None leaves the pipeline's default."""
    features: str = "zoo:digits-features"
    reference: str = "zoo:digits"
    metrics: tuple[str, ...] = DEFAULT_METRICS
    rounds: int = 10
    """Timed rounds of two calls per row."""
    clip: str | None = None
    """The CLIP network of clip_score; None takes the feature network."""
    latency_batch: int = 25
    """Images per timed call."""
    resamples: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "num_samples", "batch_size", "latency_batch", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 2:
            raise ValueError(f"rounds must be at least 2 (10 for an interval worth printing), got {self.rounds}")
        if self.num_samples < 2:
            raise ValueError("num_samples must be at least 2: a covariance needs two samples")
        for metric in self.metrics:
            find_metric(metric)


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row: a recipe at a number of steps."""

    name: str
    recipe: Recipe
    steps: int
    family: str


@dataclass
class _Run:
    """What the stages of one evaluation share."""

    pipe: Any
    protocol: Protocol
    rows: list[RowSpec]
    out: Path
    notify: Notify
    network: FeatureNetwork = field(init=False)
    clip: FeatureNetwork | None = None
    """Where clip_score is asked for."""
    weights: dict[str, str] = field(init=False)
    """Fingerprints of the pipeline's networks."""
    world: World = field(init=False)

    @property
    def ids(self) -> list[int]:
        return list(range(self.protocol.num_samples))

    def store(self, row: RowSpec) -> SampleStore:
        return SampleStore(self.out / "rows" / folder_name(row.name))


def plan_rows(recipes: Sequence[Recipe], protocol: Protocol) -> list[RowSpec]:
    """The rows of an evaluation in order: the untouched pipeline, fewer steps, the recipes.

    Raises:
        ValueError: two rows of one name.
    """
    rows = [RowSpec(name=BASELINE, recipe=Recipe(name=BASELINE), steps=protocol.steps, family=BASELINE)]
    rows += [
        RowSpec(name=f"{BASELINE}@{steps}", recipe=Recipe(name=BASELINE), steps=steps, family=BASELINE)
        for steps in protocol.baseline_steps
        if steps != protocol.steps
    ]
    rows += [
        RowSpec(
            name=r.name,
            recipe=r,
            steps=r.num_inference_steps or protocol.steps,
            family=r.name.split("@")[0].split("-")[0],
        )
        for r in recipes
    ]
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"rows need different names, got more than once: {', '.join(twice)}; give the recipes names")
    return rows


def evaluate(
    pipe: Any, recipes: Sequence[Recipe], protocol: Protocol, out: str | Path, notify: Notify = lambda *_: None
) -> Results:
    """Measure recipes against the untouched pipeline and against the same pipeline with fewer steps.

    Where `torch.distributed` is initialised, every process calls this with the same arguments. They share the making
    of the samples; the first one then does the rest alone, and all return the same.

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        recipes: what to compare; their learned parts are loaded once.
        protocol: how.
        out: the run folder; a started one is resumed.
        notify: called as work proceeds.

    Returns:
        What is also written to `out/results.json`, beside `pareto.png`, `samples.png` and `report.html`.

    Raises:
        ValueError: the pipeline is accelerated already or makes no images, names clash, or `out` holds samples made
            differently or is in use by another run.
        ConnectionError: another process of this run has ended.
        OSError: something could not be written; what was made so far stays, and the same call goes on from there.
    """
    if is_accelerated(pipe):
        raise ValueError("evaluate needs the untouched pipeline; call flowaccel.restore(pipe) first")
    if "num_frames" in inspect.signature(type(pipe).__call__).parameters:
        raise _no_images(pipe)
    loaded = [recipe.loaded(pipe) for recipe in recipes]
    run = _Run(pipe=pipe, protocol=protocol, rows=plan_rows(loaded, protocol), out=Path(out), notify=notify)
    run.network = load_features(protocol.features, "cpu" if pipe.device.type == "meta" else pipe.device)
    if "clip_score" in protocol.metrics:
        run.clip = load_clip(protocol.clip, run.network)
    _check_early(run)
    run.weights = {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    pipe.set_progress_bar_config(disable=True)
    with processes() as run.world, claimed(run.out, run.world):
        _make_samples(run)
        results = _measure(run) if run.world.first else None
        run.world.wait()
        return results or load_results(run.out)


def _measure(run: _Run) -> Results:
    """Everything after the samples, written to the run folder."""
    protocol = run.protocol
    samples = _read_samples(run)
    reference = load_reference(protocol.reference, run.network, tuple(samples[0].images.shape[1:]))
    run.notify("metrics", 0, 1)
    versus = [row.name for row in run.rows if row.family == BASELINE]
    metrics = measure(
        samples,
        reference,
        protocol.metrics,
        features_name=run.network.name,
        seed=protocol.seed,
        resamples=protocol.resamples,
        versus=versus,
    )
    run.notify("metrics", 1, 1)
    costs = [_cost(run, row) for row in run.rows]
    timings = _time(run)
    results: Results = {
        "schema": SCHEMA_VERSION,
        "protocol": _describe(run),
        "environment": environment(run.pipe.device) | {"world_size": run.world.size},
        "rows": [
            _row(run, row, cost, costs[0], timings, metrics[row.name])
            for row, cost in zip(run.rows, costs, strict=True)
        ],
    }
    _mark_pareto(results)
    protocol.conditions.save(run.out)
    save_results(results, run.out / "results.json")
    write_figures(results, {row.name: sample.images for row, sample in zip(run.rows, samples, strict=True)}, run.out)
    return results


def _check_early(run: _Run) -> None:
    """Refuse now what would otherwise fail once all samples are made."""
    reference = run.protocol.reference
    check_reference(reference)
    bare = is_statistics(reference) and load_reference(reference, run.network).features is None
    classless = run.protocol.conditions.labels([0]) is None or run.network.classify is None
    for name in run.protocol.metrics:
        if bare and "reference_features" in find_metric(name).needs:
            raise ValueError(
                f"metric {name!r} needs the features of the reference samples, and {reference} has only moments; make "
                "it with `flowaccel stats --with-features`, give the images, or leave the metric out"
            )
        if "prompts" in find_metric(name).needs and run.protocol.conditions.texts([0]) is None:
            raise ValueError(f"metric {name!r} needs prompts to sample for; leave it out for a pipeline with classes")
        if classless and "classes" in find_metric(name).needs:
            raise ValueError(
                f"metric {name!r} needs classes to sample for and a feature network with a classifier; "
                f"leave it out of the metrics ({', '.join(run.protocol.metrics)})"
            )


def _no_images(pipe: Any) -> ValueError:
    return ValueError(
        f"evaluate needs a pipeline that makes images, and {type(pipe).__name__} does not; "
        "`flowaccel generate` writes videos, comparing them is not in this version"
    )


def _make_samples(run: _Run) -> None:
    """This process's share of the samples that are missing; returns when all are made."""
    world = run.world
    if world.first:
        _open_stores(run)
    world.wait()
    if not world.first:
        _open_stores(run)  # compares this process's networks with those of the first
    missing = {row.name: run.store(row).missing(run.ids) for row in run.rows}
    world.wait()  # only now, with every process's list complete, may files appear
    shares = {name: world.share(ids) for name, ids in missing.items()}
    done = len(run.rows) * run.protocol.num_samples - sum(len(ids) for ids in missing.values())
    total = done + sum(len(ids) for ids in shares.values())
    run.notify("samples", done, total)
    for row in run.rows:
        with _row_pipeline(run, row) as make:
            for made in generate(run.store(row), shares[row.name], run.protocol.batch_size, make):
                done += made
                run.notify("samples", done, total)
    world.wait()


def _open_stores(run: _Run) -> None:
    for row in run.rows:
        run.store(row).open(_manifest(run, row))


def _manifest(run: _Run, row: RowSpec) -> dict[str, Any]:
    """Everything that a row's samples depend on, and nothing else."""
    return {
        "pipeline": type(run.pipe).__name__,
        "scheduler": _plain_config(run.pipe.scheduler),
        "dtype": str(_denoiser(run.pipe).dtype),
        "weights": run.weights | {name: fingerprint(module) for name, module in row.recipe.networks.items()},
        "recipe": [{"name": a.name, **a.to_dict()} for a in row.recipe.accelerators],
        "steps": row.steps,
        "guidance_scale": run.protocol.guidance_scale,
        "conditions": run.protocol.conditions.describe(),
        "seed": run.protocol.seed,
    }


def _plain_config(scheduler: Any) -> dict[str, Any]:
    return {"class": type(scheduler).__name__} | {
        key: value for key, value in scheduler.config.items() if not key.startswith("_")
    }


def _denoiser(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


@contextlib.contextmanager
def _row_pipeline(run: _Run, row: RowSpec) -> Iterator[Callable[[list[int]], Tensor]]:
    """A function ids -> uint8 images that samples with the row's recipe."""
    # An empty recipe is observed too, and what is untouched must not even be that.
    with accelerated(run.pipe, row.recipe) if row.recipe.accelerators else contextlib.nullcontext():
        yield lambda ids: call(run.pipe, run.protocol, ids, row.steps)


def call(pipe: Any, protocol: Protocol, ids: Sequence[int], steps: int) -> Tensor:
    """One pipeline call for sample ids: uint8 images (N, C, H, W), rounded."""
    arguments = protocol.conditions.arguments(ids)
    if protocol.guidance_scale is not None:
        arguments["guidance_scale"] = protocol.guidance_scale
    generators = [sample_generator(protocol.seed, sample_id) for sample_id in ids]
    output = pipe(**arguments, num_inference_steps=steps, generator=generators, output_type="np")
    images = getattr(output, "images", None)
    if images is None:
        raise _no_images(pipe)
    return (torch.from_numpy(images).permute(0, 3, 1, 2) * 255).round().clamp(0, 255).to(torch.uint8)


def _read_samples(run: _Run) -> list[RowSamples]:
    conditions = run.protocol.conditions
    return [row_samples(run.store(row), row.name, run.ids, conditions, run.network, run.clip) for row in run.rows]


def row_samples(
    store: SampleStore,
    name: str,
    ids: Sequence[int],
    conditions: Conditions,
    network: FeatureNetwork,
    clip: FeatureNetwork | None = None,
) -> RowSamples:
    """A row's images and what the feature network and, where prompts are asked for, the CLIP network see in them."""
    images = store.read(ids)
    features = network(images)
    texts = conditions.texts(ids)
    match = None
    if clip is not None and texts is not None:
        match = text_match(clip, features if clip is network else clip(images), texts)
    return RowSamples(
        name=name,
        features=features,
        labels=conditions.labels(ids),
        predicted=None if network.classify is None else network.classify(features),
        images=images,
        text_match=match,
    )


@dataclass(frozen=True, kw_only=True)
class _Cost:
    evaluations: int
    network_rows: float
    refiner_rows: float
    macs: float
    stages: dict[str, float]
    peak_memory_mb: float | None


def _cost(run: _Run, row: RowSpec) -> _Cost:
    """Counted on one call of its own, outside the timed rounds."""
    ids = run.ids[: run.protocol.latency_batch]
    with CallCounter({"network": _denoiser(run.pipe)}) as inner, _row_pipeline(run, row) as make:
        with CallCounter(row.recipe.networks) as extra:
            macs = count_macs(lambda: make(ids)) / len(ids)
        evaluations = len(run.pipe.scheduler.timesteps)
        reset_peak_memory(run.pipe.device)
        with timed_stages(_stages(run.pipe), device=run.pipe.device) as stages:
            make(ids)
        peak = peak_memory_mb(run.pipe.device) if run.pipe.device.type == "cuda" else None
    return _Cost(
        evaluations=evaluations,
        network_rows=inner.rows["network"] / len(ids) / 2,  # counted over the two calls above
        refiner_rows=sum(extra.rows.values()) / len(ids),
        macs=macs,
        stages=dict(stages),
        peak_memory_mb=peak,
    )


def _stages(pipe: Any) -> dict[str, tuple[object, str]]:
    found = {"network": (_denoiser(pipe), "forward")}
    if getattr(pipe, "vae", None) is not None:
        found["decode"] = (pipe.vae, "decode")
    encoders = [
        name for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None) is not None
    ]
    return found | {name: (getattr(pipe, name), "forward") for name in encoders}


def _time(run: _Run) -> dict[str, Timing]:
    ids = run.ids[: run.protocol.latency_batch]

    def variant(row: RowSpec) -> Callable[[], object]:
        def once() -> object:
            with _row_pipeline(run, row) as make:
                return make(ids)

        return once

    return measure_latency(
        {row.name: variant(row) for row in run.rows},
        rounds=run.protocol.rounds,
        device=run.pipe.device,
        on_round=lambda done, total: run.notify("timing", done, total),
    )


def _row(run: _Run, row: RowSpec, cost: _Cost, base: _Cost, timings: dict[str, Timing], metrics: dict[str, Any]) -> Row:
    timing, untouched = timings[row.name], timings[BASELINE]
    images = min(run.protocol.latency_batch, run.protocol.num_samples)
    ratio = untouched.ratio_to(timing)
    rows_per_evaluation = base.network_rows / base.evaluations
    to_ms = 1000 / images
    entry: Row = {
        "recipe": row.name,
        "family": row.family,
        "num_inference_steps": row.steps,
        "nfe": cost.network_rows / rows_per_evaluation,
        "network_rows": cost.network_rows,
        "refiner_rows": cost.refiner_rows,
        "macs_per_image": cost.macs,
        "latency_ms_per_image": {
            "median": timing.median * to_ms,
            "p10": timing.p10 * to_ms,
            "p90": timing.p90 * to_ms,
            "rounds": timing.rounds,
            "per_round": [seconds * to_ms for seconds in timing.seconds],
        },
        "stages": cost.stages,
        "first_call_s": timing.first_call_s,
        "throttled": timing.throttled,
        "speedup": {
            "wall_clock": {"value": ratio.value, "ci95": list(ratio.ci95)},
            "macs": base.macs / cost.macs,
        },
        "metrics": metrics,
    }
    if cost.peak_memory_mb is not None:
        entry["peak_memory_mb"] = cost.peak_memory_mb
    return entry


def _describe(run: _Run) -> Any:  # the schema's Protocol
    own = asdict(run.protocol) | {
        "conditions": run.protocol.conditions.describe(),
        "metrics": list(run.protocol.metrics),
        "baseline_steps": list(run.protocol.baseline_steps),
    }
    own["clip"] = run.clip and run.clip.name
    own["clip_fingerprint"] = run.clip and run.clip.fingerprint
    own = {key: value for key, value in own.items() if value is not None}
    return own | {
        "dataset": run.protocol.conditions.name,
        "feature_extractor": run.network.name,
        "fingerprint": run.network.fingerprint,
    }


def _mark_pareto(results: Results) -> None:
    metric = quality_axis(results)
    efficient = set() if metric is None else pareto(results["rows"], metric)
    for row in results["rows"]:
        row["pareto"] = row["recipe"] in efficient


def quality_axis(results: Results) -> str | None:
    """The metric that the plot shows: a usual one if there is a value, else any, else None."""
    shown = {name for row in results["rows"] for name, found in row["metrics"].items() if found["value"] is not None}
    return next((name for name in (*PARETO_METRICS, *METRICS) if name in shown), None)


def write_figures(results: Results, images: dict[str, Tensor], out: Path) -> None:
    """`pareto.png` (where a metric has a value), `samples.png` and the self-contained `report.html` beside a result
    file.
    """
    figures = {}
    metric = quality_axis(results)
    if metric is not None:
        figures["Quality against time"] = out / "pareto.png"
        pareto_png(results, out / "pareto.png", metric)
    figures["The first samples: the same noise in every column"] = out / "samples.png"
    shown = {name: rows[:_GRID_SAMPLES] for name, rows in images.items()}
    sample_grid(shown, out / "samples.png", columns=_GRID_SAMPLES)
    html_report(results, out / "report.html", figures)
