"""The results of a run, as the run directory, the report and the console show them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import Problem
from ..core.findings import Finding
from ..core.metrics import Metric
from ..core.model import TaskModel
from ..core.results import Scores
from ..core.task import Task


@dataclass
class Run:
    """A run and its results.

    Attributes:
        folder: the run directory.
        task: the task, fitted to its training rows.
        model: the model, trained.
        scores: the scores by split.
        before: the scores before training of the split that `headline` is of; None if they were
            not measured.
        problems: by split, the rows that could not be used.
        history: transformers' `log_history`.
        facts: figures of the model and of the training, JSON-ready.
        findings: what is suspicious about the data, as seen at the start.
        attention: by fusion and site, the mean weight (0 to 1) of each member on the split that
            was measured last.
        unreported: why the report could not be made; empty if it was.
    """

    folder: Path
    task: Task
    model: TaskModel
    scores: dict[str, Scores] = field(default_factory=dict)
    before: Scores | None = None
    problems: dict[str, list[Problem]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    attention: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    unreported: str = ""

    @property
    def headline(self) -> Metric:
        """The deciding metric on the test split, or on the validation split without a test."""
        return self.scores["test" if "test" in self.scores else "validation"][self.task.metric]
