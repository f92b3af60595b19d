"""A split of a data set whose examples start from kept states: how it is filled and read."""

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
from .examples import STATES, KeptCollate, KeptExamples, Place, PlainExamples, Probe, ProbeCollate

WAIT = 0.5  # seconds between looks at what another process fills
Run = Callable[[Batch], Any]


@dataclass
class KeptSplit:
    """A split whose passes start from kept states.

    Attributes:
        size: rows of the batches in which it is filled.
        found: the share of it that was there before.
        read: examples that were read from it.
        seconds: that filling it took.
    """

    task: Task
    model: TaskModel
    rows: Rows
    prefix: FrozenTrunk
    store: TrunkStore
    run: Run
    train: bool
    size: int
    found: float = 0.0
    read: int = 0
    seconds: float = 0.0

    @property
    def examples(self) -> KeptExamples:
        return KeptExamples(self.task, self.store, len(self.rows), train=self.train)

    @property
    def collate(self) -> KeptCollate:
        return KeptCollate(self.task, self.store, self.prefix.towers)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.store.chunks, MemoryChunks)

    def workers(self, asked: int) -> int:
        """How many processes read it: none where each would get a copy of the memory."""
        return asked if forks() or not self.in_memory else 0

    @contextlib.contextmanager
    def resumed(self, batch: Batch) -> Iterator[None]:
        """Inside, the model's pass starts from the states in the batch, which leave it."""
        with self.prefix.resume(batch.pop(STATES)):
            yield

    def states(self, batch: Batch) -> States:
        """Those of a batch on the model's device, on the CPU."""
        precision = self.task.config.trainer.precision
        with torch.no_grad(), autocast(precision, self.model.device):
            found = self.prefix.capture(lambda: self.run(batch))
        return {place: value.cpu() for place, value in found.items()}

    def fill(self, *, workers: int, quiet: bool) -> None:
        """Computes and keeps what is missing; every process of the group calls it.

        Raises:
            ValueError: states cannot be kept in the type that is asked for, or do not fit.
        """
        from tqdm.auto import tqdm

        started = time.perf_counter()
        rank, world = processes()
        if not self.in_memory:
            self.store.verify(range(rank, len(self.store), world))
        _barrier()
        missing = self.store.missing()
        rows = sum(len(self.store.places(chunk)) for chunk in missing)
        self.found = 1 - rows / len(self.store.order)
        _barrier()  # all have looked before the first one writes
        own = missing[rank::world]
        total = sum(len(self.store.places(chunk)) for chunk in own)
        name = "training" if self.train else "validation"
        with tqdm(
            total=total, desc=f"frozen part, {name}", unit="row", disable=quiet or not total
        ) as bar:
            self._make(own, workers=workers, done=bar.update)
        if self.in_memory:
            self._exchange(missing)
        else:
            _barrier()
            # What another run is about, and, on a disk of this machine's own, other ranks' parts.
            while missing := self.store.missing():
                if not self._make(missing, workers=workers, done=lambda rows: None):
                    time.sleep(WAIT)
        _barrier()
        self.seconds = time.perf_counter() - started

    def _make(self, chunks: Sequence[int], *, workers: int, done: Callable[[int], object]) -> int:
        """Fills those of the chunks that nobody else is filling; gives how many that were."""
        batches = _Claims(self.store, chunks, self.size)
        towers = list(self.model.encoder.sites.towers)
        loader: DataLoader = DataLoader(
            PlainExamples(self.task, self.rows, train=self.train),
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=ProbeCollate(self.task, towers),
            num_workers=min(workers, len(chunks)),
            generator=loader_generator(),
        )
        entries: list[Entry] = []
        made = 0
        try:
            for probe in loader:
                entries += self.entries(probe)
                done(len(probe.places))
                chunk = batches.claimed[0]
                if len(entries) == len(self.store.places(chunk)):
                    self.store.put(chunk, entries)
                    self.store.release(batches.claimed.popleft())
                    entries, made = [], made + 1
        finally:
            for chunk in batches.claimed:
                self.store.release(chunk)
        return made

    def entries(self, probe: Probe) -> list[Entry]:
        states: States = {}
        if probe.batch is not None:
            states = self.states(to_device(probe.batch, self.model.device))
        return probe.entries(self.prefix.towers, states)

    def _exchange(self, chunks: Sequence[int]) -> None:
        """Gives every process what each has filled."""
        _, world = processes()
        for place, chunk in enumerate(chunks) if world > 1 else ():
            data = self.store.chunks.read(chunk)
            held = [None if data is None else data.tobytes()]
            torch.distributed.broadcast_object_list(held, src=place % world)
            if data is None:
                self.store.chunks.write(chunk, held)

    def facts(self) -> dict[str, Any]:
        """For a run's figures, JSON-ready."""
        return {
            "rows": len(self.rows),
            "views": self.store.views,
            "bytes": self.store.nbytes,
            "seconds": round(self.seconds, 2),
            "found": round(self.found, 4),
            "read": self.read,
        }


class _Claims:
    """Batches of places, chunk by chunk of those that could be claimed; as a loader asks for them
    some batches ahead, several may be in hand (`claimed`)."""

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
