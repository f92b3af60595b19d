"""The rows of each training step, the same for any number of processes and after a resume."""

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
from .stream import Stream

SHUFFLED = 1000  # rows of a stream that wait together; each next one is drawn from them
_POOL = 50  # number of batches whose examples are sorted by length together


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (row, seed) for one process, in a new random order for each epoch.

    A step reads `batch_size` rows in total. They are cut into `accumulation` parts, and each part
    into one share for each process. An incomplete last batch is left out; its rows come in other
    epochs. If there are fewer rows than a batch holds, they are repeated.

    Args:
        rows: number of rows of the split.
        rank: number of this process, of `world` processes.
        lengths: with them, rows of similar lengths share a batch.
        groups: with them, whole groups come one after the other, so that a batch holds few groups.

    Raises:
        ValueError: the batch cannot be cut into equal shares, or there are no rows.
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
        """Sets the epoch whose batches come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        seeds = rng.integers(2**32, size=self.rows)  # torch's CPU generator reads 32 bits of a seed
        for batch in self._order(rng):
            for part in np.split(batch, self.accumulation):
                share = part[self.rank * self.share : (self.rank + 1) * self.share]
                yield list(zip(share.tolist(), seeds[share].tolist(), strict=True))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        """Returns (steps, batch_size) row numbers."""
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
    """Batches of (task, row, seed) of several tasks in turn, in a new random order for each epoch.

    All parts of a step are of one task. An epoch has as many steps as the epochs of all tasks
    together. A task whose epoch has n steps gets a share of them in proportion to n^(1/T) at
    temperature T (Raffel et al. 2020, section 3.5.2), but at least one step; at T = 1 every row
    comes once in an epoch. Each task goes through its own epochs in the order that it would have
    alone.
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
        """Sets the epoch whose batches come next."""
        self.epoch = epoch

    def order(self, epoch: int) -> np.ndarray:
        """Returns (steps,) the number of each step's task."""
        order = np.repeat(np.arange(len(self.tasks)), self.counts)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def steps_of_tasks(self, steps: int) -> list[int]:
        """Returns for each task how many of the first `steps` steps are its own."""
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
    """Returns the number of steps of each task: the largest remainders are rounded up, and every
    task gets at least one."""
    exact = shares * steps
    counts = np.floor(exact).astype(int)
    rest = np.argsort(counts - exact, kind="stable")[: steps - counts.sum()]
    counts[rest] += 1
    return np.maximum(counts, 1)


def _endless(batches: EpochBatches, step: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the parts of a task's batches from a step on, one epoch after the other."""
    epoch, done = divmod(step, batches.steps)
    while True:
        batches.set_epoch(epoch)
        yield from itertools.islice(batches, done * batches.accumulation, None)
        epoch, done = epoch + 1, 0


class StreamExamples(IterableDataset):
    """Examples of a stream of rows without an end; of n processes, each takes every n-th row.

    Every pass over the stream has an order of its own, by a buffer of `SHUFFLED` rows. At most one
    worker reads, since a stream has one order. The index of an example counts the rows that were
    read, over all passes.
    """

    def __init__(self, task: Task, stream: Stream, *, seed: int, rank: int, world: int) -> None:
        self.task, self.stream, self.seed = task, stream, seed
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Example | Problem]:
        for index, row in enumerate(self._rows()):
            if index % self.world != self.rank:
                continue
            seed = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
            try:
                example = seeded_example(self.task, row, seed, train=True)
            except BadRow as error:
                yield Problem(index, str(error))
            else:
                yield {**example, "index": index, "problems": []}

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            row = None
            for row in self.stream.shuffle(SHUFFLED, self.seed + number):
                yield row
            if row is None:
                raise ValueError("the training split has no rows")


def share_of(batch_size: int, accumulation: int, world: int) -> int:
    """Returns the number of examples that one process reads at a time.

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
