"""A split through a model: one record for each row, gathered from all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..core.capabilities import BatchGrouping, SecondPass, capability
from ..core.device import autocast, processes, to_device
from ..core.errors import Problem, refuse
from ..core.model import TaskModel
from ..core.rows import Record, Rows
from ..core.task import Task
from ..data.examples import Collate, Examples
from ..data.workers import loader_generator

if TYPE_CHECKING:
    from .cache.split import KeptSplit

MEDIA = ("image", "mask", "audio")


@dataclass
class Evaluation:
    """Records in the order of the rows, and the rows that could not be used."""

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
    kept: KeptSplit | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Runs every row through the model, in eval mode and without gradients.

    In a process group each process takes every n-th row, and all of them return everything.

    Args:
        kept: the states of these rows to start from.
        progress: is told after each batch how many rows of this process are done.

    Raises:
        DataError: a row cannot be used and `data.on_error` is "refuse"; names rows and reasons.
    """
    rank, world = processes()
    order = np.arange(len(rows))
    lengths = capability(task, BatchGrouping).lengths(rows)
    if lengths is not None:
        # Neighbours in length share a batch, so little of it is padding.
        order = np.argsort(np.asarray(lengths), kind="stable")
    own = order[rank::world].tolist()
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    loader: DataLoader = DataLoader(
        Examples(task, rows, train=False) if kept is None else kept.examples,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=Collate(task) if kept is None else kept.collate,
        num_workers=min(workers if kept is None else kept.workers(workers), len(batches)),
        pin_memory=model.device.type == "cuda",
        generator=loader_generator(),
    )
    found = Evaluation([], [])
    was_training = model.training
    model.eval()
    try:
        for done, loaded in enumerate(loader, start=1):
            found.problems += loaded.problems
            if loaded.batch is not None:
                batch = to_device(loaded.batch, model.device)
                resumed = nullcontext() if kept is None else kept.resumed(batch)
                with torch.no_grad(), autocast(precision, model.device), resumed:
                    records = task.records(model, batch)
                for index, record in zip(loaded.indices, records, strict=True):
                    found.records.append({**record, "index": index})
            if kept is not None:
                kept.read += len(loaded.indices)
            progress(min(done * batch_size, len(own)))
        found = _gathered(found, world)
        refuse(found.problems, on_error=task.config.data.on_error, rows=len(rows))
        with torch.no_grad(), autocast(precision, model.device):
            capability(task, SecondPass).refine(model, rows, found.records)
    finally:
        model.train(was_training)
    _add_rows(task, found.records, rows)
    return found


def _gathered(found: Evaluation, world: int) -> Evaluation:
    if world > 1:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, found)
        found = Evaluation(
            [record for part in parts for record in part.records],
            [problem for part in parts for problem in part.problems],
        )
    found.records.sort(key=lambda record: record["index"])
    found.problems.sort(key=lambda problem: problem.index)
    return found


def _add_rows(task: Task, records: list[Record], rows: Rows) -> None:
    """Gives every record its row's plain columns, read column by column without any media."""
    columns = {name: list(rows[name]) for name in plain_columns(task, rows)}
    for record in records:
        record["row"] = {name: values[record["index"]] for name, values in columns.items()}


def plain_columns(task: Task, rows: Rows) -> Iterator[str]:
    """The columns that hold text or numbers."""
    media = {role for role, column in task.columns.items() if column.kind in MEDIA}
    features = getattr(rows, "features", None)
    for name in rows.column_names:
        # Nested columns have no dtype.
        dtype = "string" if features is None else getattr(features.get(name), "dtype", None)
        if name not in media and dtype not in ("binary", "large_binary", "dict", None):
            yield name
