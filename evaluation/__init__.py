"""Evaluation of quality against measured seconds: samples, metrics with intervals, interleaved timing, reports."""

from flowaccel.evaluation.baselines.baselines import Baseline as Baseline
from flowaccel.evaluation.baselines.baselines import parse_baseline as parse_baseline
from flowaccel.evaluation.compare import compare_rows as compare_rows
from flowaccel.evaluation.features.extractors import load_features as load_features
from flowaccel.evaluation.features.extractors import load_reference as load_reference
from flowaccel.evaluation.features.network import FeatureNetwork as FeatureNetwork
from flowaccel.evaluation.features.statistics import load_statistics as load_statistics
from flowaccel.evaluation.features.statistics import save_statistics as save_statistics
from flowaccel.evaluation.metrics.frechet import Moments as Moments
from flowaccel.evaluation.metrics.frechet import frechet_distance as frechet_distance
from flowaccel.evaluation.metrics.frechet import frechet_infinity as frechet_infinity
from flowaccel.evaluation.metrics.metric import AttributeMatch as AttributeMatch
from flowaccel.evaluation.metrics.metric import ReferenceSet as ReferenceSet
from flowaccel.evaluation.metrics.metric import RowSamples as RowSamples
from flowaccel.evaluation.metrics.metric import TextMatch as TextMatch
from flowaccel.evaluation.metrics.table import difference as difference
from flowaccel.evaluation.metrics.table import measure as measure
from flowaccel.evaluation.metrics.table import not_worse as not_worse
from flowaccel.evaluation.protocol import DEFAULT_METRICS as DEFAULT_METRICS
from flowaccel.evaluation.protocol import Protocol as Protocol
from flowaccel.evaluation.reporting.export import export_npz as export_npz
from flowaccel.evaluation.reporting.tables import console_table as console_table
from flowaccel.evaluation.reporting.tables import markdown_table as markdown_table
from flowaccel.evaluation.results import Results as Results
from flowaccel.evaluation.results import load_results as load_results
from flowaccel.evaluation.results import save_results as save_results
from flowaccel.evaluation.runner import evaluate as evaluate
from flowaccel.evaluation.samples.prompts import Classes as Classes
from flowaccel.evaluation.samples.prompts import Conditions as Conditions
from flowaccel.evaluation.samples.prompts import Prompts as Prompts
from flowaccel.evaluation.samples.store import sample_generator as sample_generator
from flowaccel.evaluation.timing.attention import set_attention as set_attention
from flowaccel.evaluation.timing.cost import CallCounter as CallCounter
from flowaccel.evaluation.timing.cost import count_macs as count_macs
from flowaccel.evaluation.timing.environment import environment as environment
from flowaccel.evaluation.timing.latency import Timing as Timing
from flowaccel.evaluation.timing.latency import measure_latency as measure_latency

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
