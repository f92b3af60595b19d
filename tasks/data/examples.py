"""Examples of a split and their batches, the same for training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadRow, Problem
from ..core.rows import Batch, Example, Rows
from ..core.task import Task


class Examples(torch.utils.data.Dataset):
    """The examples of a split. Keys are row numbers, or (row number, seed) in training.

    The seed decides all that is drawn for an example, so that a run gives the same whatever the
    number of workers and processes, and after it was resumed. With `views` it chooses one of so
    many that are drawn for each row once and for all. A bad row gives a `Problem`; in training the
    next good row stands in for it, and the example names it under "problems".
    """

    def __init__(self, task: Task, rows: Rows, *, train: bool, views: int | None = None) -> None:
        self.task, self.rows, self.train = task, rows, train
        self.views = views if train else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> Example | Problem:
        index, seed = key if isinstance(key, tuple) else (key, key)
        problems: list[Problem] = []
        for step in range(len(self.rows) if self.train else 1):
            found = (index + step) % len(self.rows)
            try:
                example = self.read(found, seed)
            except BadRow as error:
                problems.append(Problem(found, str(error)))
            else:
                return {**example, "index": found, "problems": problems}
        return problems[0]

    def read(self, row: int, seed: int) -> Example:
        """One row as it is.

        Raises:
            BadRow: it cannot be used.
        """
        if self.views is not None:
            seed = view_seed(self.task.config.seed, row, seed % self.views)
        return seeded_example(self.task, self.rows[row], seed, train=self.train)


def view_seed(seed: int, row: int, view: int) -> int:
    """What draws one of a row's views in a run of a seed."""
    return int(np.random.SeedSequence((seed, row, view)).generate_state(1)[0])


def seeded_example(task: Task, row: Mapping[str, Any], seed: int, *, train: bool) -> Example:
    """`task.example` with the global random states of torch and random seeded, then put back."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            return task.example(row, train=train)
    finally:
        random.setstate(state)


@dataclass
class Loaded:
    """A batch as it comes from a loader. `batch` is None when no example of it could be used;
    `task` names one of several that are trained together."""

    indices: list[int]
    batch: Batch | None
    problems: list[Problem]
    task: str = ""

    def pin_memory(self) -> Loaded:
        if self.batch is not None:
            self.batch = {
                key: pinned(value) if isinstance(value, Tensor | dict) else value
                for key, value in self.batch.items()
            }
        return self


def pinned(value: Any) -> Any:
    """A tensor, or the tensors of a dict, in memory that copies to a GPU are fast from."""
    if isinstance(value, dict):
        return {key: pinned(part) for key, part in value.items()}
    return value.pin_memory() if isinstance(value, Tensor) else value


class Collate:
    """Gathers what `Examples` gives into a `Loaded`; picklable, for worker processes."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, parts: Sequence[Example | Problem]) -> Loaded:
        problems = [part for part in parts if isinstance(part, Problem)]
        examples = [part for part in parts if not isinstance(part, Problem)]
        for example in examples:
            problems += example.pop("problems")
        indices = [example.pop("index") for example in examples]
        batch = self.task.collate(examples) if examples else None
        return Loaded(indices, batch, problems)
