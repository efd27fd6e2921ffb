"""Runner of one evaluation: samples, features, cost, interleaved timing, metrics, result file, figures.

A run folder holds one folder per row (its samples, its manifest) and the results. Every part can be interrupted and is
resumed by the same call; batch size and timing settings may differ between calls, whatever the samples depend on may
not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowaccel import Recipe, is_accelerated
from flowaccel.data import AttributeSet
from flowaccel.evaluation.baselines.baselines import calibrated, calibrated_to
from flowaccel.evaluation.baselines.subprocess_worker import REMARK, OwnProcess, carried_over
from flowaccel.evaluation.candidates import BASELINE, Candidate
from flowaccel.evaluation.features.extractors import check_reference, fingerprint, load_features, load_reference
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.features.statistics import is_statistics
from flowaccel.evaluation.metrics.attribute_accuracy import attribute_match, load_attributes
from flowaccel.evaluation.metrics.clip_score import load_clip, text_match, warn_of_cut_prompts
from flowaccel.evaluation.metrics.metric import OF_PROMPTS, RowSamples
from flowaccel.evaluation.metrics.table import METRICS, find_metric, measure
from flowaccel.evaluation.protocol import (
    Protocol,
    call,
    no_images,
    plan_rows,
    row_manifest,
    row_store,
)
from flowaccel.evaluation.reporting.plots import PARETO_METRICS, pareto, pareto_png, sample_grid
from flowaccel.evaluation.reporting.report import html_report
from flowaccel.evaluation.results import SCHEMA_VERSION, Results, RowEntry, load_results, save_results
from flowaccel.evaluation.samples.call_arguments import check_arguments, parameters
from flowaccel.evaluation.samples.processes import World, claimed, processes
from flowaccel.evaluation.samples.prompt_lengths import check_prompt_lengths
from flowaccel.evaluation.samples.prompts import Conditions
from flowaccel.evaluation.samples.store import SampleStore, generate_batches, in_batches, write_atomically
from flowaccel.evaluation.timing.attention import chosen_attention
from flowaccel.evaluation.timing.cost import Cost, measure_cost
from flowaccel.evaluation.timing.environment import environment
from flowaccel.evaluation.timing.latency import Timing, measure_latency
from flowaccel.hooks import Pipeline

CALIBRATION = "calibration.json"
_GRID_SAMPLES = 10

Notify = Callable[[str, int, int], None]
"""`notify(stage, done, total)`, for progress bars."""


@dataclass
class _Evaluation:
    """Shared state of the stages of one evaluation."""

    pipe: Pipeline
    protocol: Protocol
    rows: list[Candidate]
    out: Path
    notify: Notify
    network: FeatureNetwork = field(init=False)
    clip: FeatureNetwork | None = None
    """CLIP network, where clip_score is asked for."""
    attributes: AttributeSet | None = None
    """Attribute set, where attribute_accuracy is asked for."""
    weights: dict[str, str] = field(init=False)
    """Fingerprints of the pipeline's networks."""
    world: World = field(init=False)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Calibrations of the baselines, by row."""
    own: dict[str, OwnProcess] = field(default_factory=dict)
    """The processes of the rows that need one."""

    @property
    def ids(self) -> list[int]:
        return list(range(self.protocol.num_samples))

    def store(self, row: Candidate) -> SampleStore:
        return row_store(self.out, row)


def evaluate(
    pipe: Pipeline, recipes: Sequence[Recipe], protocol: Protocol, out: str | Path, notify: Notify = lambda *_: None
) -> Results:
    """Measure recipes against the untouched pipeline and against the same pipeline with fewer steps.

    Where `torch.distributed` is initialised, every process calls this with the same arguments. They share the making
    of the samples; the first one then does the rest alone, and all return the same.

    Args:
        pipe: a diffusers pipeline that is not accelerated.
        recipes: recipes to compare; their learned parts are loaded once.
        protocol: how.
        out: the run folder; a started one is resumed.
        notify: called as work proceeds.

    Returns:
        What is also written to `out/results.json`, beside `pareto.png`, `samples.png` and `report.html`.

    Raises:
        ValueError: the pipeline is accelerated already or makes no images, names clash, or `out` holds samples made
            differently or is in use by another run.
        UnsupportedModelError: a baseline does not work with the pipeline; found before any sample is made.
        MissingExtraError: a baseline's package is missing.
        FloatingPointError: a sample holds NaN or infinity; none of its batch was kept.
        ConnectionError: another process of this run has ended.
        OSError: something could not be written; what was made so far stays, and the same call goes on from there.
    """
    if is_accelerated(pipe):
        raise ValueError("evaluate needs the untouched pipeline; call flowaccel.restore(pipe) first")
    if "num_frames" in parameters(pipe):
        raise no_images(pipe)
    check_arguments(pipe, protocol.arguments)
    loaded = [recipe.loaded(pipe) for recipe in recipes]
    run = _Evaluation(pipe=pipe, protocol=protocol, rows=plan_rows(loaded, protocol), out=Path(out), notify=notify)
    run.network = load_features(protocol.features, "cpu" if pipe.device.type == "meta" else pipe.device)
    if "clip_score" in protocol.metrics:
        run.clip = load_clip(protocol.clip, run.network)
    if "attribute_accuracy" in protocol.metrics:
        run.attributes = load_attributes(protocol.attributes, run.network)
    _check_early(run)
    run.weights = {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    pipe.set_progress_bar_config(disable=True)
    with processes() as run.world, claimed(run.out, run.world), contextlib.ExitStack() as stack:
        _try_baselines(run, stack)
        _make_samples(run)
        results = _measure(run) if run.world.first else None
        run.world.wait()
        return results or load_results(run.out)


def _measure(run: _Evaluation) -> Results:
    """Run everything after the samples, and write it to the run folder."""
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
    timings, apart = _time(run)
    results: Results = {
        "schema": SCHEMA_VERSION,
        "protocol": _describe(run),
        "environment": _environment(run),
        "rows": [
            _row(run, row, cost, costs[0], timings, metrics[row.name]) | _baseline_entry(run, row, apart)
            for row, cost in zip(run.rows, costs, strict=True)
        ],
    }
    _mark_pareto(results)
    protocol.conditions.save(run.out)
    save_results(results, run.out / "results.json")
    images = {row.name: sample.images for row, sample in zip(run.rows, samples, strict=True)}
    write_figures(results, images, run.out, protocol.conditions.texts(run.ids) or ())
    return results


def _check_early(run: _Evaluation) -> None:
    """Refuse early what would otherwise fail once all samples are made."""
    for row in run.rows:
        row.check_early(run.pipe)
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
        if OF_PROMPTS & set(find_metric(name).needs) and run.protocol.conditions.texts([0]) is None:
            raise ValueError(f"metric {name!r} needs prompts to sample for; leave it out for a pipeline with classes")
        if classless and "classes" in find_metric(name).needs:
            raise ValueError(
                f"metric {name!r} needs classes to sample for and a feature network with a classifier; "
                f"leave it out of the metrics ({', '.join(run.protocol.metrics)})"
            )
    prompts = run.protocol.conditions.texts(run.ids)
    if prompts is not None:
        _check_prompts(run, prompts)


def _check_prompts(run: _Evaluation, prompts: Sequence[str]) -> None:
    check_prompt_lengths(run.pipe, prompts, run.protocol.arguments)
    if run.attributes is not None:
        try:
            run.attributes.read(prompts)
        except ValueError as error:
            raise ValueError(
                f"attribute_accuracy cannot be measured for these prompts: {error}; or leave attribute_accuracy out"
            ) from error
    if run.clip is not None:
        warn_of_cut_prompts(run.clip, prompts)


def _try_baselines(run: _Evaluation, stack: contextlib.ExitStack) -> None:
    """Start the processes of the rows that need one, and refuse every baseline that does not work with the pipeline."""
    for row in run.rows:
        row.check(run.pipe, lambda steps: call(run.pipe, run.protocol, [0], steps))
    for row in run.rows:
        if row.baseline is not None and row.own_process:
            run.protocol.conditions.save(run.out)
            process = OwnProcess(run.pipe, row.baseline, run.protocol, run.out, run.store(row).folder)
            run.own[row.name] = stack.enter_context(process)
            process.check(json.loads(json.dumps(row_manifest(run.pipe, run.protocol, row, run.weights))))


def _make_samples(run: _Evaluation) -> None:
    """Generate this process's share of the missing samples, and return when all processes are done."""
    world = run.world
    if world.first:
        _open_stores(run)
        _calibrate(run)
    world.wait()
    if not world.first:
        _open_stores(run)  # compares this process's networks with those of the first
        _calibrate(run)
    todo = {row.name: _todo(run, row) for row in run.rows}
    world.wait()  # only now, with every process's list complete, may files appear
    shares = {row.name: _share(run, row, todo[row.name]) for row in run.rows}
    done = len(run.rows) * run.protocol.num_samples - sum(len(ids) for ids in todo.values())
    total = done + sum(len(batch) for batches in shares.values() for batch in batches)
    run.notify("samples", done, total)
    for row in run.rows:
        for made in _generated(run, row, shares[row.name]):
            done += made
            run.notify("samples", done, total)
    world.wait()


def _todo(run: _Evaluation, row: Candidate) -> list[int]:
    """Return the samples to be made, in whole batches for a baseline that decides for the whole batch."""
    missing = run.store(row).missing(run.ids)
    if not row.by_batch:
        return missing
    begun = {sample_id // run.protocol.batch_size for sample_id in missing}
    return [sample_id for sample_id in run.ids if sample_id // run.protocol.batch_size in begun]


def _share(run: _Evaluation, row: Candidate, todo: list[int]) -> list[list[int]]:
    """Return this process's batches of the samples to be made."""
    size = run.protocol.batch_size
    if not row.by_batch:
        return in_batches(run.world.share(todo), size)
    batches = [list(batch) for _, batch in itertools.groupby(todo, key=lambda sample_id: sample_id // size)]
    return [batches[index] for index in run.world.share(range(len(batches)))]


def _generated(run: _Evaluation, row: Candidate, batches: list[list[int]]) -> Iterator[int]:
    if row.name in run.own:
        yield from run.own[row.name].samples(batches)
        return
    with _row_pipeline(run, row) as make:
        yield from generate_batches(run.store(row), batches, make)


def _calibrate(run: _Evaluation) -> None:
    """Load the calibrations of the baselines, or calibrate them: once in a run, for all processes alike."""
    for row in run.rows:
        if row.baseline is None or not row.baseline.calibrates:
            continue
        path = run.store(row).folder / CALIBRATION
        if not path.exists():
            make = functools.partial(call, run.pipe, run.protocol, steps=row.steps)
            found = calibrated(run.pipe, row.baseline, make)
            write_atomically(path, json.dumps(found).encode())
        run.settings[row.name] = calibrated_to(path)


def _open_stores(run: _Evaluation) -> None:
    for row in run.rows:
        run.store(row).open(row_manifest(run.pipe, run.protocol, row, run.weights))


def _switched_on(run: _Evaluation, row: Candidate) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the pipeline is that of the row."""
    return row.switched_on(run.pipe, **run.settings.get(row.name, {}))


@contextlib.contextmanager
def _row_pipeline(run: _Evaluation, row: Candidate) -> Iterator[Callable[[list[int]], Tensor]]:
    """Yield a function ids -> uint8 images that samples with the row's recipe or baseline."""

    def make(ids: list[int]) -> Tensor:
        return call(run.pipe, run.protocol, ids, row.steps)

    def make_afresh(ids: list[int]) -> Tensor:
        with _switched_on(run, row):
            return make(ids)

    if row.afresh:
        yield make_afresh
        return
    with _switched_on(run, row):
        yield make


def _read_samples(run: _Evaluation) -> list[RowSamples]:
    networks = run.network, run.clip, run.attributes
    return [row_samples(run.store(row), row.name, run.ids, run.protocol.conditions, *networks) for row in run.rows]


def row_samples(
    store: SampleStore,
    name: str,
    ids: Sequence[int],
    conditions: Conditions,
    network: FeatureNetwork,
    clip: FeatureNetwork | None = None,
    attributes: AttributeSet | None = None,
) -> RowSamples:
    """Load the stored images of a row and compute their features; see `judged`."""
    return judged(store.read(ids), name, ids, conditions, network, clip, attributes)


def judged(
    images: Tensor,
    name: str,
    ids: Sequence[int],
    conditions: Conditions,
    network: FeatureNetwork,
    clip: FeatureNetwork | None = None,
    attributes: AttributeSet | None = None,
) -> RowSamples:
    """Compute the features of a row's images.

    With prompts, their CLIP match too; and the attributes that prompts state, where these are given.
    """
    features = network(images)
    texts = conditions.texts(ids)
    match, stated = None, None
    if clip is not None and texts is not None:
        match = text_match(clip, features if clip is network else clip(images), texts)
    if attributes is not None and texts is not None:
        stated = attribute_match(attributes, network, features, texts)
    return RowSamples(
        name=name,
        features=features,
        labels=conditions.labels(ids),
        predicted=None if network.classify is None else network.classify(features),
        images=images,
        text_match=match,
        attributes=stated,
    )


def _cost(run: _Evaluation, row: Candidate) -> Cost:
    if row.name in run.own:
        return run.own[row.name].cost()
    ids = run.ids[: run.protocol.latency_batch]

    @contextlib.contextmanager
    def switched() -> Iterator[Callable[[], object]]:
        with _row_pipeline(run, row) as make:
            yield lambda: make(ids)

    return measure_cost(run.pipe, len(ids), switched, row.networks, row.stand_ins(run.pipe))


def _time(run: _Evaluation) -> tuple[dict[str, Timing], dict[str, tuple[Timing, Timing]]]:
    """Time all rows, and return what was timed apart, too.

    That is the untouched pipeline and the row, in the row's own process.
    """
    ids = run.ids[: run.protocol.latency_batch]
    here = [row for row in run.rows if row.name not in run.own]
    timings = measure_latency(
        {row.name: functools.partial(call, run.pipe, run.protocol, ids, row.steps) for row in here},
        rounds=run.protocol.rounds,
        device=run.pipe.device,
        on_round=lambda done, total: run.notify("timing", done, total),
        within={row.name: functools.partial(_switched_on, run, row) for row in here},
    )
    apart: dict[str, tuple[Timing, Timing]] = {}
    for name, process in run.own.items():
        run.notify("own timing", len(apart), len(run.own))
        apart[name] = process.time()
        run.notify("own timing", len(apart), len(run.own))
    return timings | {name: carried_over(timings[BASELINE], *pair) for name, pair in apart.items()}, apart


def _row(
    run: _Evaluation, row: Candidate, cost: Cost, base: Cost, timings: dict[str, Timing], metrics: dict[str, Any]
) -> RowEntry:
    timing, untouched = timings[row.name], timings[BASELINE]
    images = min(run.protocol.latency_batch, run.protocol.num_samples)
    ratio = untouched.ratio_to(timing)
    rows_per_evaluation = base.network_rows / base.evaluations
    to_ms = 1000 / images
    entry: RowEntry = {
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


def _baseline_entry(run: _Evaluation, row: Candidate, apart: dict[str, tuple[Timing, Timing]]) -> Any:
    """Return the result file's remarks on a baseline of another library."""
    if row.baseline is None:
        return {}
    entry: dict[str, Any] = {"baseline": row.baseline.describe() | run.settings.get(row.name, {})}
    remarks = []
    protocol = run.protocol
    if row.name in apart:
        to_ms = 1000 / min(protocol.latency_batch, protocol.num_samples)
        there, own = apart[row.name]
        entry["own_process"] = {
            "untouched_per_round": [seconds * to_ms for seconds in there.seconds],
            "per_round": [seconds * to_ms for seconds in own.seconds],
        }
        entry["throttled"] = own.throttled
        remarks.append(REMARK)
    if row.by_batch and protocol.batch_size != protocol.latency_batch:
        remarks.append(
            f"It decides for the whole batch: its samples were made in batches of {protocol.batch_size}, its time and "
            f"cost measured in batches of {protocol.latency_batch}."
        )
    return entry | ({"remark": " ".join(remarks)} if remarks else {})


def _environment(run: _Evaluation) -> dict[str, Any]:
    chosen = chosen_attention(run.pipe)
    own = {"world_size": run.world.size} | ({} if chosen is None else {"attention": chosen})
    return environment(run.pipe.device) | own


def _describe(run: _Evaluation) -> Any:  # the schema's Protocol
    own = asdict(run.protocol) | {
        "conditions": run.protocol.conditions.describe(),
        "metrics": list(run.protocol.metrics),
        "baseline_steps": list(run.protocol.baseline_steps),
        "baselines": list(run.protocol.baselines),
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
    """Return the metric that the plot shows: a usual one if there is a value, else any, else None."""
    shown = {name for row in results["rows"] for name, found in row["metrics"].items() if found["value"] is not None}
    return next((name for name in (*PARETO_METRICS, *METRICS) if name in shown), None)


def write_figures(results: Results, images: dict[str, Tensor], out: Path, prompts: Sequence[str] = ()) -> None:
    """Write the figures and the self-contained `report.html` beside a result file.

    The figures are `pareto.png` (where a metric has a value) and `samples.png`, captioned where there are prompts.

    What cannot be drawn is left out with a warning: the results are there, and a picture can be made of them later.
    """
    metric = quality_axis(results)
    shown = {name: rows[:_GRID_SAMPLES] for name, rows in images.items()}
    figures: dict[str, Path] = {}
    if metric is not None and _drawn(out / "pareto.png", lambda path: pareto_png(results, path, metric)):
        figures["Quality against time"] = out / "pareto.png"
    if _drawn(out / "samples.png", lambda path: sample_grid(shown, path, columns=_GRID_SAMPLES, captions=prompts)):
        figures["The first samples: the same noise in every column"] = out / "samples.png"
    _drawn(out / "report.html", lambda path: html_report(results, path, figures))


def _drawn(path: Path, draw: Callable[[Path], None]) -> bool:
    """Whether `draw` wrote the file. If not, a warning says why, and no file of an earlier call stays in its place."""
    try:
        draw(path)
    except Exception as error:  # whatever a drawing library does with these numbers, it must not cost the results
        path.unlink(missing_ok=True)
        warnings.warn(
            f"{path} could not be drawn ({type(error).__name__}: {error}); results.json beside it is complete",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True
