"""Evaluation of quality against measured seconds: samples, metrics with intervals, interleaved timing, reports."""

from flowaccel.evaluation.baselines.baselines import Baseline, parse_baseline
from flowaccel.evaluation.compare import compare_rows
from flowaccel.evaluation.features.extractors import load_features, load_reference
from flowaccel.evaluation.features.network import FeatureNetwork
from flowaccel.evaluation.features.statistics import load_statistics, save_statistics
from flowaccel.evaluation.metrics.frechet import Moments, frechet_distance, frechet_infinity
from flowaccel.evaluation.metrics.metric import AttributeMatch, ReferenceSet, RowSamples, TextMatch
from flowaccel.evaluation.metrics.table import difference, measure, not_worse
from flowaccel.evaluation.protocol import DEFAULT_METRICS, Protocol
from flowaccel.evaluation.reporting.export import export_npz
from flowaccel.evaluation.reporting.tables import console_table, markdown_table
from flowaccel.evaluation.results import Results, load_results, save_results
from flowaccel.evaluation.runner import evaluate
from flowaccel.evaluation.samples.prompts import Classes, Conditions, Prompts
from flowaccel.evaluation.samples.store import sample_generator
from flowaccel.evaluation.timing.attention import set_attention
from flowaccel.evaluation.timing.cost import CallCounter, count_macs
from flowaccel.evaluation.timing.environment import environment
from flowaccel.evaluation.timing.latency import Timing, measure_latency

__all__ = [
    "DEFAULT_METRICS",
    "AttributeMatch",
    "Baseline",
    "CallCounter",
    "Classes",
    "Conditions",
    "FeatureNetwork",
    "Moments",
    "Prompts",
    "Protocol",
    "ReferenceSet",
    "Results",
    "RowSamples",
    "TextMatch",
    "Timing",
    "compare_rows",
    "console_table",
    "count_macs",
    "difference",
    "environment",
    "evaluate",
    "export_npz",
    "frechet_distance",
    "frechet_infinity",
    "load_features",
    "load_reference",
    "load_results",
    "load_statistics",
    "markdown_table",
    "measure",
    "measure_latency",
    "not_worse",
    "parse_baseline",
    "sample_generator",
    "save_results",
    "save_statistics",
    "set_attention",
]
