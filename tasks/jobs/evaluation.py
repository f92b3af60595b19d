"""A saved adapter measured on a split, and a job's data examined."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .. import artifact
from ..config.environment import unread
from ..config.schema import SPLITS, JobConfig, Split
from ..core.errors import Problem
from ..core.results import Scores
from ..core.rows import Rows
from ..core.task import Task
from ..data.doctor import DataReport, examine
from ..data.load import load_splits
from ..registry import task_class
from ..training.evaluate import check_groups
from .ending import evaluate_split
from .metrics import figures
from .model import rows_to_fit


@dataclass(frozen=True)
class SplitResult:
    """The figures of a split.

    Attributes:
        scores: the metrics with their intervals and groups.
        problems: the rows that could not be used.
    """

    scores: Scores
    problems: list[Problem]

    @property
    def figures(self) -> dict[str, Any]:
        """The metrics by name, in total and by group, as plain data."""
        return figures(self.scores)


def evaluate_directory(
    path: str | os.PathLike,
    split: str,
    *,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SplitResult:
    """Measures the adapter of a run or adapter directory on a split.

    Args:
        split: train, validation or test.
        overrides: changes to the job that is saved there ("data.source=elsewhere").
        progress: is told after each batch how many rows of this process are done, and of how many.

    Raises:
        FileNotFoundError, ValueError: the directory cannot be opened, or the data has no such
            split.
    """
    opened = artifact.open_directory(path, overrides=overrides)
    task = opened.task
    wanted: Any = split
    splits: Any = load_saved(task, (wanted,))
    if split not in splits:
        raise ValueError(f"the data has no split {split!r}: name it in data.splits")
    rows = splits[split]
    check_groups(task, splits)
    evaluation = evaluate_split(
        task, opened.model, rows, progress=lambda done: progress(done, len(rows))
    )
    scores = task.score(evaluation.records, bootstrap=task.config.evaluation.bootstrap)
    return SplitResult(scores, evaluation.problems)


def load_saved(task: Task, splits: Sequence[Split]) -> dict[Split, Rows]:
    """Loads the data of a task whose config was saved.

    Raises:
        ValueError: the config names an environment variable that has another value here, or none;
            or the data cannot be loaded.
    """
    data = task.config.data
    if (text := unread(data.model_dump(mode="json"))) is not None:
        raise ValueError(
            f"the saved config says {text}, and this variable is not set here, or not as it was: "
            f"give the value as a change, for instance 'data.source={text}' to read the variable "
            "of this machine"
        )
    return load_splits(data, task.columns, splits)


def examine_data(config: JobConfig) -> DataReport:
    """Reads every row of a job's data and reports which cannot be used, see `data.doctor`.

    Raises:
        ValueError: the source cannot be read, or its rows make no task.
    """
    task = task_class(config.task)(config)
    splits = load_splits(config.data, task.columns, SPLITS)
    task.fit(rows_to_fit(splits.get("train")), artifact.make_backbone(config.backbone))
    return examine(task, splits)
