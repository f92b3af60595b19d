"""Which rows a training step reads: the same for any number of processes and after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from .task import BadRow, Example, Problem, Task, seeded_example

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
