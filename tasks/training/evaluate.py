"""Evaluation of a split: one record for each row, gathered from all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmadapters.suggest import nearest

from ..config.schema import LOSS
from ..core.capabilities import BatchGrouping, SecondPass, capability
from ..core.device import autocast, processes, to_device
from ..core.errors import Problem, refuse
from ..core.metrics import Metric
from ..core.model import TaskModel
from ..core.results import Scores
from ..core.rows import Column, Example, Record, Rows
from ..core.task import Task
from ..data.batches import share_of
from ..data.columns import MEDIA
from ..data.examples import Collate, Examples
from ..data.workers import loader_generator, readers
from .cache.split import CachedSplit


@dataclass
class Evaluation:
    """The outcome of an evaluation.

    Attributes:
        records: a record for each good row, in the order of the rows.
        problems: the rows that could not be used, in their order.
    """

    records: list[Record]
    problems: list[Problem]


def evaluate(
    task: Task,
    model: TaskModel,
    rows: Rows,
    *,
    batch_size: int,
    workers: int = 0,
    precision: str = "fp32",
    cached: CachedSplit | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Runs every row through the model, in eval mode and without gradients.

    In a process group each process takes every n-th row, and every process returns all records.

    Args:
        batch_size: rows of a batch of one process.
        workers: processes that read and decode data.
        precision: as `trainer.precision`.
        cached: the cached trunk states of these rows; None runs the whole encoder.
        progress: is called after each batch with the number of rows that this process has done.

    Raises:
        DataError: a row cannot be used and `data.on_error` is "refuse"; names rows and reasons.
    """
    rank, world = processes()
    order = np.arange(len(rows))
    lengths = capability(task, BatchGrouping).lengths(rows)
    if lengths is not None:
        # Rows of similar length share a batch, so little of it is padding.
        order = np.argsort(np.asarray(lengths), kind="stable")
    mine = order[rank::world].tolist()
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    loader: DataLoader = DataLoader(
        Examples(task, rows, train=False) if cached is None else cached.examples,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=Collate(task) if cached is None else cached.collate,
        num_workers=min(workers if cached is None else cached.workers(workers), len(batches)),
        pin_memory=model.device.type == "cuda",
        generator=loader_generator(),
    )
    result = Evaluation([], [])
    was_training = model.training
    model.eval()
    try:
        for done, loaded in enumerate(loader, start=1):
            result.problems += loaded.problems
            if loaded.batch is not None:
                batch = to_device(loaded.batch, model.device)
                resumed = nullcontext() if cached is None else cached.resumed(batch)
                with torch.no_grad(), autocast(precision, model.device), resumed:
                    records = task.records(model, batch)
                for index, record in zip(loaded.indices, records, strict=True):
                    result.records.append({**record, "index": index})
            if cached is not None:
                cached.read += len(loaded.indices)
            progress(min(done * batch_size, len(mine)))
        result = _gathered(result, world)
        refuse(result.problems, on_error=task.config.data.on_error, rows=len(rows))
        with torch.no_grad(), autocast(precision, model.device):
            capability(task, SecondPass).refine(model, rows, result.records)
    finally:
        model.train(was_training)
    _add_rows(result.records, rows, task.columns)
    return result


def check_groups(task: Task, splits: Mapping[Any, Rows]) -> None:
    """Checks that the columns of `evaluation.groups` are in one of these splits.

    Raises:
        ValueError: one of them is not, or holds no text and no numbers.
    """
    known = [name for rows in splits.values() for name in _plain_columns(rows, task.columns)]
    for column in task.config.evaluation.groups:
        if column not in known:
            raise ValueError(
                f"evaluation.groups: the {' and '.join(splits)} rows have no column {column!r} of "
                f"text or numbers{nearest(column, known)}; they have "
                f"{', '.join(dict.fromkeys(known)) or 'none'}"
            )


def validated(
    task: Task, model: TaskModel, rows: Rows, *, cached: CachedSplit | None = None
) -> Scores:
    """Returns a task's scores on validation rows without intervals, evaluated as its config says.

    The loss is among them if it chooses the best checkpoint.

    Args:
        cached: the cached trunk states of these rows; None runs the whole encoder.
    """
    config = task.config.trainer
    _, world = processes()
    share = share_of(config.batch_size, config.accumulation, world)
    result = evaluate(
        task,
        model,
        rows,
        batch_size=config.eval_batch_size or share,
        workers=readers(config, decoded=cached is not None),
        precision=config.precision,
        cached=cached,
    )
    scores = task.score(result.records, bootstrap=0)
    if task.deciding == LOSS:
        scores.metrics.append(mean_loss(task, model, rows))
    return scores


@torch.no_grad()
def mean_loss(task: Task, model: TaskModel, rows: Rows) -> Metric:
    """Returns the mean training loss over those rows that have one, in eval mode.

    Random changes of an example that cannot be left out are the same each time. Every process runs
    all rows, so that the batches are those of one process.

    Raises:
        DataError: no row has a loss.
    """
    config = task.config.trainer
    loader: DataLoader = DataLoader(
        _LossExamples(task, rows),
        batch_size=config.eval_batch_size or config.batch_size,
        collate_fn=Collate(task),
        num_workers=readers(config),
        generator=loader_generator(),
    )
    total, count, problems = 0.0, 0, []
    was_training = model.training
    model.eval()
    try:
        for loaded in loader:
            problems += loaded.problems
            if loaded.batch is not None:
                batch = to_device(loaded.batch, model.device)
                with autocast(config.precision, model.device):
                    loss = float(model(**batch)["loss"])
                total += loss * len(loaded.indices)
                count += len(loaded.indices)
    finally:
        model.train(was_training)
    refuse(problems, on_error="skip", rows=len(rows))
    return Metric(LOSS, total / count, count=count, unit="", greater_is_better=False)


class _LossExamples(Examples):
    """The examples of rows as for training, without random changes where a task can leave them out.

    A bad row gives a `Problem`.
    """

    def __init__(self, task: Task, rows: Rows) -> None:
        super().__init__(task, rows, train=False)

    def example(self, row: Mapping[str, Any]) -> Example:
        return self.task.unchanging_example(row)


def _gathered(result: Evaluation, world: int) -> Evaluation:
    """Returns the records and problems of all processes, in the order of the rows."""
    if world > 1:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, result)
        result = Evaluation(
            [record for part in parts for record in part.records],
            [problem for part in parts for problem in part.problems],
        )
    result.records.sort(key=lambda record: record["index"])
    result.problems.sort(key=lambda problem: problem.index)
    return result


def _add_rows(records: list[Record], rows: Rows, roles: Mapping[str, Column]) -> None:
    """Adds to every record the plain columns of its row, read by column and without any media."""
    columns = {name: list(rows[name]) for name in _plain_columns(rows, roles)}
    for record in records:
        record["row"] = {name: values[record["index"]] for name, values in columns.items()}


def _plain_columns(rows: Rows, roles: Mapping[str, Column]) -> Iterator[str]:
    """Yields the names of the columns that hold text or numbers."""
    media = {role for role, column in roles.items() if column.kind in MEDIA}
    features = getattr(rows, "features", None)
    for name in rows.column_names:
        # Nested columns have no dtype.
        dtype = "string" if features is None else getattr(features.get(name), "dtype", None)
        if name not in media and dtype not in ("binary", "large_binary", "dict", None):
            yield name
