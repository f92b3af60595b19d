"""A split of a data set whose passes start from cached trunk states: how it is filled and read."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from mmadapters import FrozenTrunk
from mmadapters.trunk.chunks import MemoryChunks
from mmadapters.trunk.frozen import States
from mmadapters.trunk.store import Entry, TrunkStore

from ...core.device import autocast, processes, to_device
from ...core.model import TaskModel
from ...core.rows import Batch, Rows
from ...core.task import Task
from ...data.workers import forks, loader_generator
from .examples import (
    STATES,
    CachedCollate,
    CachedExamples,
    FillBatch,
    FillCollate,
    FillExamples,
    Place,
)

WAIT = 0.5  # seconds between two looks at chunks that another process fills
Pass = Callable[[Batch], Any]


@dataclass
class CachedSplit:
    """A split whose passes start from cached trunk states.

    Attributes:
        trunk: the frozen part of the encoder that is computed once.
        store: the states.
        run: a pass of the model on a batch, as in training or in evaluation.
        train: whether the examples are those of training.
        size: rows of a batch with which the store is filled.
        reused: the share of the states (0 to 1) that an earlier run had stored.
        read: the number of examples that were read from the store.
        seconds: the time that filling took.
    """

    task: Task
    model: TaskModel
    rows: Rows
    trunk: FrozenTrunk
    store: TrunkStore
    run: Pass
    train: bool
    size: int
    reused: float = 0.0
    read: int = 0
    seconds: float = 0.0

    @property
    def examples(self) -> CachedExamples:
        """The data set that a loader reads."""
        return CachedExamples(self.task, self.store, len(self.rows), train=self.train)

    @property
    def collate(self) -> CachedCollate:
        """The function with which a loader makes batches of `examples`."""
        return CachedCollate(self.task, self.store, self.trunk.towers)

    @property
    def in_memory(self) -> bool:
        """Whether the states are in memory, and not on disk."""
        return isinstance(self.store.chunks, MemoryChunks)

    def workers(self, wanted: int) -> int:
        """Returns how many processes read the split: 0 if each would need a copy of the memory."""
        return wanted if forks() or not self.in_memory else 0

    @contextlib.contextmanager
    def resumed(self, batch: Batch) -> Iterator[None]:
        """Takes the states out of the batch; inside the block the model's pass starts from them."""
        with self.trunk.resume(batch.pop(STATES)):
            yield

    def states(self, batch: Batch) -> States:
        """Computes the trunk states of a batch on the model's device; returns them on the CPU."""
        precision = self.task.config.trainer.precision
        with torch.no_grad(), autocast(precision, self.model.device):
            states = self.trunk.capture(lambda: self.run(batch))
        return {place: value.cpu() for place, value in states.items()}

    def fill(self, *, workers: int, quiet: bool) -> None:
        """Computes and stores the missing states; every process of the group calls it.

        Args:
            workers: processes that read and decode data.
            quiet: no progress bar.

        Raises:
            ValueError: the states do not fit, or cannot be stored in the type of `cache_dtype`.
        """
        from tqdm.auto import tqdm

        started = time.perf_counter()
        rank, world = processes()
        if not self.in_memory:
            self.store.verify(range(rank, len(self.store), world))
        _barrier()
        missing = self.store.missing()
        rows = sum(len(self.store.places(chunk)) for chunk in missing)
        self.reused = 1 - rows / len(self.store.order)
        _barrier()  # every process has looked before the first one writes
        mine = missing[rank::world]
        total = sum(len(self.store.places(chunk)) for chunk in mine)
        name = "training" if self.train else "validation"
        with tqdm(
            total=total, desc=f"frozen trunk, {name}", unit="row", disable=quiet or not total
        ) as bar:
            self._make(mine, workers=workers, done=bar.update)
        if self.in_memory:
            self._exchange(missing)
        else:
            _barrier()
            # Another run may be filling chunks, and ranks on other machines write to other disks.
            while missing := self.store.missing():
                if not self._make(missing, workers=workers, done=lambda rows: None):
                    time.sleep(WAIT)
        _barrier()
        self.seconds = time.perf_counter() - started

    def _make(self, chunks: Sequence[int], *, workers: int, done: Callable[[int], object]) -> int:
        """Fills those of the chunks that no other process is filling; returns their number."""
        batches = _Claims(self.store, chunks, self.size)
        towers = list(self.model.encoder.sites.towers)
        loader: DataLoader = DataLoader(
            FillExamples(self.task, self.rows, train=self.train),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=FillCollate(self.task, towers),
            num_workers=min(workers, len(chunks)),
            generator=loader_generator(),
        )
        entries: list[Entry] = []
        made = 0
        try:
            for batch in loader:
                entries += self.entries(batch)
                done(len(batch.places))
                chunk = batches.claimed[0]
                if len(entries) == len(self.store.places(chunk)):
                    self.store.put(chunk, entries)
                    self.store.release(batches.claimed.popleft())
                    entries, made = [], made + 1
        finally:
            for chunk in batches.claimed:
                self.store.release(chunk)
        return made

    def entries(self, fill: FillBatch) -> list[Entry]:
        """Computes what the store keeps of each place of a batch."""
        states: States = {}
        if fill.batch is not None:
            states = self.states(to_device(fill.batch, self.model.device))
        return fill.entries(self.trunk.towers, states)

    def _exchange(self, chunks: Sequence[int]) -> None:
        """Gives every process the chunks that the others have filled."""
        _, world = processes()
        for place, chunk in enumerate(chunks) if world > 1 else ():
            data = self.store.chunks.read(chunk)
            held = [None if data is None else data.tobytes()]
            torch.distributed.broadcast_object_list(held, src=place % world)
            if data is None:
                self.store.chunks.write(chunk, held)

    def facts(self) -> dict[str, Any]:
        """Returns the figures of the split for `metrics.json`."""
        return {
            "rows": len(self.rows),
            "views": self.store.views,
            "bytes": self.store.nbytes,
            "seconds": round(self.seconds, 2),
            "found": round(self.reused, 4),
            "read": self.read,
        }


class _Claims:
    """Batches of places, chunk by chunk, of those chunks that this process could claim.

    A loader asks for batches ahead of time, so that several chunks may be claimed at once.
    """

    def __init__(self, store: TrunkStore, chunks: Sequence[int], size: int) -> None:
        self.store, self.chunks, self.size = store, chunks, size
        self.claimed: deque[int] = deque()

    def __iter__(self) -> Iterator[list[Place]]:
        for chunk in self.chunks:
            if not self.store.claim(chunk):
                continue
            self.claimed.append(chunk)
            places = self.store.places(chunk).tolist()
            for start in range(0, len(places), self.size):
                some = places[start : start + self.size]
                yield [divmod(place, self.store.views) for place in some]


def _barrier() -> None:
    if processes()[1] > 1:
        torch.distributed.barrier()
