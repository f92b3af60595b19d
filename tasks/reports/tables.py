"""The metric tables of a report: their lines, and the scales of their bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.metrics import Metric
from ..core.results import Scores


def metric_named(scores: Scores | None, name: str) -> Metric | None:
    """Returns a metric by name, or None if it was not measured."""
    return _named([] if scores is None else scores.metrics, name)


def _named(metrics: Sequence[Metric], name: str) -> Metric | None:
    return next((metric for metric in metrics if metric.name == name), None)


@dataclass(frozen=True)
class MetricRow:
    """A line of the metric table; None stands for a metric that was not measured.

    Attributes:
        before: the metric before training, on the first split.
        splits: the metric on each split, in order.
    """

    name: str
    greater_is_better: bool
    before: Metric | None
    splits: list[Metric | None]


def metric_rows(
    deciding: str, scores: Mapping[str, Scores], before: Scores | None
) -> list[MetricRow]:
    """Returns a line for each metric of any split, the deciding metric first."""
    known = {metric.name: metric for split in scores.values() for metric in split.metrics}
    return [
        MetricRow(
            name,
            known[name].greater_is_better,
            metric_named(before, name),
            [metric_named(split, name) for split in scores.values()],
        )
        for name in dict.fromkeys([deciding, *known])
    ]


@dataclass(frozen=True)
class BarScale:
    """The span of a bar, from `start` to `end`, in the units of the metric."""

    start: float
    end: float

    def percent(self, value: float | None) -> float | None:
        """Returns the position of a value in percent of the width, or None if it has none."""
        if value is None or not math.isfinite(value):
            return None
        return round(100 * (value - self.start) / (self.end - self.start), 2)


def scale_of(metrics: Sequence[Metric]) -> BarScale:
    """Returns a scale with round ends that spans all values and intervals."""
    ends = [
        value
        for metric in metrics
        for value in (metric.value, metric.low, metric.high)
        if value is not None and math.isfinite(value)
    ] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1) if span <= 5 * step * part or part == 1)
    start, end = math.floor(low / step) * step, math.ceil(high / step) * step
    if start == end:
        start, end = start - step, end + step
    if all(metric.unit == "%" and 0 <= metric.value <= 1 for metric in metrics):
        start, end = max(start, 0.0), min(end, 1.0) if high <= 1 else end
    return BarScale(start, end)


@dataclass(frozen=True)
class GroupRow:
    """The line of one value of a column.

    Attributes:
        name: the value.
        metric: the deciding metric.
        before: the deciding metric before training; None if it was not measured.
        others: the other metrics, in the order of `GroupTable.others`.
    """

    name: str
    metric: Metric
    before: Metric | None
    others: list[Metric | None]


@dataclass(frozen=True)
class GroupTable:
    """The metrics by the values of a column, the worst first.

    Attributes:
        column: the name of the column.
        metric: the name of the deciding metric.
        others: the names of the other metrics.
        rows: a line for each value.
        total: the deciding metric of the whole split.
        scale: the scale of all bars.
    """

    column: str
    metric: str
    others: list[str]
    rows: list[GroupRow]
    total: Metric | None
    scale: BarScale

    @property
    def compared(self) -> bool:
        """Whether a value was also measured before training."""
        return any(row.before is not None for row in self.rows)

    @property
    def ends(self) -> tuple[Metric, Metric]:
        """The ends of the scale as values of the metric."""
        unit = self.rows[0].metric.unit
        start, end = self.scale.start, self.scale.end
        return Metric(self.metric, start, unit=unit), Metric(self.metric, end, unit=unit)


def group_table(column: str, scores: Scores, before: Scores | None) -> GroupTable:
    """Makes the table of one column of `scores.groups`, whose first metric is the deciding one."""
    groups = {str(value): metrics for value, metrics in scores.groups[column].items()}
    earlier = {} if before is None else before.groups.get(column, {})
    old = {str(value): metrics for value, metrics in earlier.items()}
    name = next(iter(groups.values()))[0].name
    others = dict.fromkeys(m.name for metrics in groups.values() for m in metrics if m.name != name)
    rows = [
        GroupRow(
            value,
            metrics[0],
            _named(old.get(value, ()), name),
            [_named(metrics, other) for other in others],
        )
        for value, metrics in groups.items()
    ]
    sign = 1 if rows[0].metric.greater_is_better else -1
    rows.sort(key=lambda row: sign * row.metric.value)
    total = metric_named(scores, name)
    shown = [m for row in rows for m in (row.metric, row.before)] + [total]
    scale = scale_of([metric for metric in shown if metric is not None])
    return GroupTable(column, name, list(others), rows, total, scale)
