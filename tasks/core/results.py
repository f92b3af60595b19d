"""Results of an evaluated split: its scores, and the figures and tables of its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .metrics import Metric


@dataclass(frozen=True)
class Figure:
    """A picture of the report: `image` is PNG data, shown with its caption."""

    title: str
    image: bytes
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the report. A cell is a text, a number, or a `Figure` for a small picture."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass
class Scores:
    """The scores of a split.

    Attributes:
        metrics: the metrics of the whole split. The one that decides stands first.
        groups: the same metrics for parts of the split, by column and by value of that column.
        tables: more for the report, without pictures (metrics by class, worst utterances, …).
    """

    metrics: list[Metric]
    groups: dict[str, dict[str, list[Metric]]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    def __getitem__(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)
