"""Share of images that are of the class that was asked for, as a classifier judges."""

from __future__ import annotations

from flowaccel.evaluation.metrics.metric import Case, Estimate, Metric, mean


def _class_accuracy(case: Case) -> Estimate:
    assert case.row.labels is not None  # declared in `needs`
    assert case.row.predicted is not None
    return mean(case.row.labels.eq(case.row.predicted), case)


METRICS = {
    "class_accuracy": Metric(
        title="Class accuracy, {features}",
        higher_is_better=True,
        estimate=_class_accuracy,
        needs=("classes",),
        against=None,
    ),
}
