"""Which rows a training step reads: the same for any number of processes and after a resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from ..core.errors import BadRow, Problem
from ..core.rows import Example
from ..core.task import Task
from .examples import seeded_example

_POOL = 50  # batches among which examples are sorted by length


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (row, seed) for one process, in an order drawn anew for each epoch.

    A step reads `batch_size` rows in all: cut into `accumulation` parts, and each part into one
    share for each process. A last incomplete batch is left out, as every row has its turn in
    another epoch; fewer rows than a batch are repeated to fill one. With `lengths`, rows of similar
    lengths share a batch. With `groups`, whole groups are drawn one after the other, so that a
    batch holds few of them.

    Raises:
        ValueError: the batch cannot be cut so, or there are no rows.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        lengths: list[int] | None = None,
        groups: list[int] | None = None,
    ) -> None:
        share = share_of(batch_size, accumulation, world)
        if rows < 1:
            raise ValueError("the training split has no rows")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.accumulation, self.rank, self.share = accumulation, rank, share
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.groups = None if groups is None else np.asarray(groups)
        self.steps = max(rows // batch_size, 1)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        seeds = rng.integers(2**32, size=self.rows)  # torch's CPU generator reads 32 bits of a seed
        for batch in self._order(rng):
            for part in np.split(batch, self.accumulation):
                own = part[self.rank * self.share : (self.rank + 1) * self.share]
                yield list(zip(own.tolist(), seeds[own].tolist(), strict=True))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """(steps, batch_size) row numbers."""
        order = rng.permutation(self.rows)
        if self.groups is not None:
            turn = rng.permutation(self.groups.max() + 1)[self.groups]
            order = order[np.argsort(turn[order], kind="stable")]
        order = np.resize(order, self.steps * self.batch_size)
        if self.lengths is None:
            return order.reshape(self.steps, self.batch_size)
        pool = _POOL * self.batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        by_length = [part[np.argsort(self.lengths[part], kind="stable")] for part in pools]
        batches = np.concatenate(by_length).reshape(self.steps, self.batch_size)
        return batches[rng.permutation(self.steps)]


class MixedBatches(Sampler[list[tuple[int, int, int]]]):
    """Batches of (task, row, seed) of several tasks in turn, in an order drawn anew each epoch.

    All parts of a step are of one task. An epoch has as many steps as the tasks have in theirs
    together, of which a task of n steps has a share of n^(1/T), T the temperature (Raffel et al.
    2020, section 3.5.2), and at least one: at T = 1 every row has one turn in an epoch. Each task
    goes through its own epochs in the order that it would have alone.
    """

    def __init__(
        self, tasks: Sequence[EpochBatches], *, seed: int, temperature: float = 1.0
    ) -> None:
        self.tasks, self.seed, self.epoch = list(tasks), seed, 0
        self.accumulation = self.tasks[0].accumulation
        sizes = np.array([batches.steps for batches in self.tasks], dtype=float)
        weights = sizes ** (1 / temperature)
        self.counts = _quotas(weights / weights.sum(), int(sizes.sum()))
        self.steps = int(self.counts.sum())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """(steps,) the number of each step's task."""
        order = np.repeat(np.arange(len(self.tasks)), self.counts)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def steps_of_tasks(self, steps: int) -> list[int]:
        """How many of the first steps are each task's."""
        epochs, rest = divmod(steps, self.steps)
        begun = np.bincount(self.order(epochs)[:rest], minlength=len(self.tasks))
        return (epochs * self.counts + begun).tolist()

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        streams = [
            _endless(batches, self.epoch * int(count))
            for batches, count in zip(self.tasks, self.counts, strict=True)
        ]
        for number in self.order(self.epoch).tolist():
            for part in itertools.islice(streams[number], self.accumulation):
                yield [(number, row, seed) for row, seed in part]


def _quotas(shares: np.ndarray, steps: int) -> np.ndarray:
    """How many of the steps are each task's: the largest remainders are rounded up, and nobody has
    none."""
    exact = shares * steps
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: steps - counts.sum()]
    counts[rest] += 1
    return np.maximum(counts, 1)


def _endless(batches: EpochBatches, step: int) -> Iterator[list[tuple[int, int]]]:
    """The parts of a task's batches from a step on, one epoch after the other."""
    epoch, done = divmod(step, batches.steps)
    while True:
        batches.set_epoch(epoch)
        yield from itertools.islice(batches, done * batches.accumulation, None)
        epoch, done = epoch + 1, 0


class StreamExamples(IterableDataset):
    """Examples of a stream of rows, in its order; each process takes every n-th good one.

    Rows are read by one worker at most: a stream has one order.
    """

    def __init__(self, task: Task, stream: Any, *, seed: int, rank: int, world: int) -> None:
        self.task, self.stream, self.seed = task, stream, seed
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Example | Problem]:
        for index, row in enumerate(self.stream):
            if index % self.world != self.rank:
                continue
            seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
            try:
                example = seeded_example(self.task, row, seed, train=True)
            except BadRow as error:
                yield Problem(index, str(error))
            else:
                yield {**example, "index": index, "problems": []}


def share_of(batch_size: int, accumulation: int, world: int) -> int:
    """The examples that one process reads at a time.

    Raises:
        ValueError: the batch cannot be cut into equal shares.
    """
    share, rest = divmod(batch_size, accumulation * world)
    if rest:
        raise ValueError(
            f"trainer.batch_size {batch_size} cannot be cut into {accumulation} parts "
            f"(trainer.accumulation) for {world} processes: make it a multiple of "
            f"{accumulation * world}"
        )
    return share
