"""The examples of a split and their batches, for training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import BadRow, Problem
from ..core.rows import Batch, Example, Rows
from ..core.task import Task


class Examples(torch.utils.data.Dataset):
    """The examples of a split. A key is a row number, or (row number, seed) in training.

    The seed decides every random choice of an example. So a run gives the same result with any
    number of workers and processes, and after it was resumed. A bad row gives a `Problem`. In
    training the next good row takes its place, and the example lists the problems under "problems".

    Args:
        task: makes the examples.
        rows: of the split.
        train: whether examples are augmented.
        views: the number of fixed augmentations of each row, from which the seed chooses one; None
            augments anew for each seed.
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
            row = (index + step) % len(self.rows)
            try:
                example = self.read(row, seed)
            except BadRow as error:
                problems.append(Problem(row, str(error)))
            else:
                return {**example, "index": row, "problems": problems}
        return problems[0]

    def read(self, row: int, seed: int) -> Example:
        """Returns the example of one row.

        Raises:
            BadRow: the row cannot be used.
        """
        if self.views is not None:
            seed = view_seed(self.task.config.seed, row, seed % self.views)
        with seeded(seed):
            return self.example(self.rows[row])

    def example(self, row: Mapping[str, Any]) -> Example:
        """Returns the task's example of a row.

        Raises:
            BadRow: the row cannot be used.
        """
        return self.task.example(row, train=self.train)


def view_seed(seed: int, row: int, view: int) -> int:
    """Returns the seed of one of a row's views, in a run with this seed."""
    return int(np.random.SeedSequence((seed, row, view)).generate_state(1)[0])


def seeded_example(task: Task, row: Mapping[str, Any], seed: int, *, train: bool) -> Example:
    """Returns `task.example(row)` with the global random states of torch and `random` seeded.

    Both states are restored afterwards.
    """
    with seeded(seed):
        return task.example(row, train=train)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global random states of torch on the CPU and of `random`, and restores both after
    the block."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            # Not `torch.manual_seed`: in a process that has not used CUDA it keeps the call, with
            # its stack as text, for later; that takes longer than an example, and 20 kB for each.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


@dataclass
class Loaded:
    """A batch as it comes from a loader.

    Attributes:
        indices: the row number of each example.
        batch: None if no example could be used.
        problems: of rows that could not be used.
        task: the name of the batch's task, where several tasks are trained together.
    """

    indices: list[int]
    batch: Batch | None
    problems: list[Problem]
    task: str = ""

    def pin_memory(self) -> Loaded:
        """Pins the memory of the batch; torch's loader calls it."""
        if self.batch is not None:
            self.batch = {
                key: pinned(value) if isinstance(value, Tensor | dict) else value
                for key, value in self.batch.items()
            }
        return self


def pinned(value: Any) -> Any:
    """Returns a tensor, or the tensors of a dict, in pinned memory, for fast copies to a GPU."""
    if isinstance(value, dict):
        return {key: pinned(part) for key, part in value.items()}
    return value.pin_memory() if isinstance(value, Tensor) else value


class Collate:
    """Collates items of `Examples` into a `Loaded`. It can be pickled, for worker processes."""

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
