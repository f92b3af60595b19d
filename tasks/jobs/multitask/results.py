"""The results of tasks that are trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...core.metrics import Metric
from ...reports.results import Run
from .config import MultitaskConfig

MEAN = "mean"


@dataclass
class Multitask:
    """A joint run: a `Run` for each task, and the figures of all tasks together.

    Attributes:
        config: the config of the joint run.
        folder: its run directory.
        runs: the run of each task, in the order of the config.
        steps: the optimiser steps of each task; their sum is `facts["steps"]`.
        history: transformers' `log_history`.
        facts: figures of the model (parameters, shared ones once) and of the training, JSON-ready.
        unreported: why a report could not be made; empty if all were.
    """

    config: MultitaskConfig
    folder: Path
    runs: dict[str, Run] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    unreported: str = ""

    @property
    def deciding(self) -> dict[str, Metric]:
        """The deciding metric of every task on its test split, or on validation without a test."""
        return {name: run.headline for name, run in self.runs.items()}

    @property
    def mean(self) -> float:
        """The mean of the deciding metrics; see `mean_of`."""
        return mean_of(list(self.deciding.values()))


def mean_of(metrics: Sequence[Metric]) -> float:
    """Returns the mean of metrics; a metric for which smaller is better counts negatively."""
    return sum(m.value if m.greater_is_better else -m.value for m in metrics) / len(metrics)


def history_of(history: Sequence[Mapping[str, Any]], task: str) -> list[dict[str, Any]]:
    """Returns the log entries of one task, under the names that a run of this task alone uses.

    Args:
        history: the `log_history` of the joint run.
        task: the name of the task.
    """
    entries = []
    for entry in history:
        of_task = {k: entry[k] for k in ("step", "epoch", "learning_rate") if k in entry}
        if f"loss/{task}" in entry:
            of_task["loss"] = entry[f"loss/{task}"]
        prefix = f"eval_{task}/"
        of_task |= {
            f"eval_{k.removeprefix(prefix)}": v for k, v in entry.items() if k.startswith(prefix)
        }
        entries.append(of_task)
    return entries
