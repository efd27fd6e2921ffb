"""Quality against measured seconds: samples, metrics with intervals, interleaved timing, reports."""

from flowaccel.evaluation.attention import set_attention as set_attention
from flowaccel.evaluation.baselines import Baseline as Baseline
from flowaccel.evaluation.baselines import parse_baseline as parse_baseline
from flowaccel.evaluation.compare import compare_rows as compare_rows
from flowaccel.evaluation.conditions import Classes as Classes
from flowaccel.evaluation.conditions import Conditions as Conditions
from flowaccel.evaluation.conditions import Prompts as Prompts
from flowaccel.evaluation.cost import CallCounter as CallCounter
from flowaccel.evaluation.cost import count_macs as count_macs
from flowaccel.evaluation.environment import environment as environment
from flowaccel.evaluation.export import export_npz as export_npz
from flowaccel.evaluation.features import FeatureNetwork as FeatureNetwork
from flowaccel.evaluation.features import load_features as load_features
from flowaccel.evaluation.features import load_reference as load_reference
from flowaccel.evaluation.latency import Timing as Timing
from flowaccel.evaluation.latency import measure_latency as measure_latency
from flowaccel.evaluation.metrics import AttributeMatch as AttributeMatch
from flowaccel.evaluation.metrics import ReferenceSet as ReferenceSet
from flowaccel.evaluation.metrics import RowSamples as RowSamples
from flowaccel.evaluation.metrics import TextMatch as TextMatch
from flowaccel.evaluation.metrics import difference as difference
from flowaccel.evaluation.metrics import measure as measure
from flowaccel.evaluation.metrics import not_worse as not_worse
from flowaccel.evaluation.moments import Moments as Moments
from flowaccel.evaluation.moments import frechet_distance as frechet_distance
from flowaccel.evaluation.moments import frechet_infinity as frechet_infinity
from flowaccel.evaluation.protocol import DEFAULT_METRICS as DEFAULT_METRICS
from flowaccel.evaluation.protocol import Protocol as Protocol
from flowaccel.evaluation.runner import evaluate as evaluate
from flowaccel.evaluation.schema import Results as Results
from flowaccel.evaluation.schema import load_results as load_results
from flowaccel.evaluation.schema import save_results as save_results
from flowaccel.evaluation.statistics import load_statistics as load_statistics
from flowaccel.evaluation.statistics import save_statistics as save_statistics
from flowaccel.evaluation.store import sample_generator as sample_generator
from flowaccel.evaluation.tables import console_table as console_table
from flowaccel.evaluation.tables import markdown_table as markdown_table

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
