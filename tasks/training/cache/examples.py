"""Examples whose heavy tensors the encoder has read once: how they are kept, and read again.

Of a heavy tensor (pixels, a waveform) only the shape is kept, beside the states that the encoder
made of it; `collate` works on such shapes as on any tensors, and the batch holds a `Blank` in
place of each, and the states of all its rows under `STATES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from mmadapters.trunk.format import pack
from mmadapters.trunk.frozen import States, TowerTrunk
from mmadapters.trunk.store import Entry, Part, TrunkStore

from ...core.capabilities import CacheableInputs, TowerRow, capability
from ...core.device import Blank
from ...core.errors import BadRow, Problem
from ...core.rows import Batch, Example, Rows
from ...core.task import Task
from ...data.examples import Collate, Examples, Loaded, seeded_example, view_seed

STATES = "states of the prefix"  # no name that a model's forward could have
_EXAMPLE, _PROBLEM = "example", "problem"
Place = tuple[int, int]  # a row of the split, and the view of it


def row_numbers(units: Sequence[Sequence[TowerRow]]) -> list[list[int]]:
    """For the units of each example, which rows of a tower's batch they are."""
    known: dict[str, int] = {}
    count = 0
    found = []
    for some in units:
        own = []
        for unit in some:
            row = count if unit.key is None else known.setdefault(unit.key, count)
            count = max(count, row + 1)
            own.append(row)
        found.append(own)
    return found


@dataclass
class Probe:
    """A batch whose states are to be kept.

    Attributes:
        places: of its rows.
        rests: what else is kept of each row, or why it cannot be used.
        good: those of them that are examples, by their number here.
        units: by tower those of each example.
        batch: of the examples; None without any.
    """

    places: list[Place]
    rests: list[bytes]
    good: list[int]
    units: dict[str, list[Sequence[TowerRow]]]
    batch: Batch | None

    def entries(self, towers: Sequence[TowerTrunk], states: States) -> list[Entry]:
        """What is kept of each row.

        Args:
            states: of `batch`, on the CPU.

        Raises:
            ValueError: a tower ran on other rows than the task says.
        """
        parts: list[dict[str, list[Part]]] = [{t.tower: [] for t in towers} for _ in self.rests]
        for tower in towers if self.good else ():
            own = {layer: states[tower.tower, layer] for layer in tower.layers}
            units = self.units[tower.tower]
            rows = row_numbers(units)
            there = len(next(iter(own.values())))
            expected = len({row for some in rows for row in some})
            if there != expected:
                raise ValueError(
                    f"tower {tower.tower!r} ran on {there} rows where the batch has {expected}"
                )
            for place, some, of_example in zip(self.good, rows, units, strict=True):
                parts[place][tower.tower] = [
                    Part({n: value[row][: unit.tokens] for n, value in own.items()}, unit.key)
                    for row, unit in zip(some, of_example, strict=True)
                ]
        return [Entry(rest, own) for rest, own in zip(self.rests, parts, strict=True)]


class PlainExamples(Dataset):
    """Examples by place, bad rows as `Problem`s: what is kept."""

    def __init__(self, task: Task, rows: Rows, *, train: bool) -> None:
        self.task, self.rows, self.train = task, rows, train

    def __getitem__(self, place: Place) -> tuple[Place, Example | Problem]:
        row, view = place
        seed = view_seed(self.task.config.seed, row, view) if self.train else row
        try:
            return place, seeded_example(self.task, self.rows[row], seed, train=self.train)
        except BadRow as error:
            return place, Problem(row, str(error))


class ProbeCollate:
    """Gathers what `PlainExamples` gives; `towers` are the names of the encoder's."""

    def __init__(self, task: Task, towers: Sequence[str]) -> None:
        self.task, self.towers = task, towers

    def __call__(self, parts: Sequence[tuple[Place, Example | Problem]]) -> Probe:
        examples: list[Example] = []
        rests, good = [], []
        cacheable = capability(self.task, CacheableInputs)
        for number, (_, part) in enumerate(parts):
            if isinstance(part, Problem):
                rests.append(pack({_PROBLEM: part.reason}))
            else:
                rests.append(pack({_EXAMPLE: without_values(cacheable.cacheable_inputs, part)}))
                examples.append(part)
                good.append(number)
        return Probe(
            [place for place, _ in parts],
            rests,
            good,
            {tower: [cacheable.tower_rows(tower, e) for e in examples] for tower in self.towers},
            self.task.collate(examples) if examples else None,
        )


def without_values(heavy: Mapping[str, str], example: Example) -> Example:
    """The example with heavy tensors on the meta device, where they have no values."""
    return {
        key: value.to("meta") if key in heavy and isinstance(value, Tensor) else value
        for key, value in example.items()
    }


class KeptExamples(Examples):
    """Examples of a split as a store has them; "view" says which of a row's views each is."""

    def __init__(self, task: Task, store: TrunkStore, rows: int, *, train: bool) -> None:
        super().__init__(task, range(rows), train=train)  # type: ignore[arg-type]
        self.store = store

    def read(self, row: int, seed: int) -> Example:
        view = seed % self.store.views
        rest = self.store.rest(row, view)
        if _PROBLEM in rest:
            raise BadRow(rest[_PROBLEM])
        return {**rest[_EXAMPLE], "view": view}


class KeptCollate(Collate):
    """Gathers what `KeptExamples` gives, with the states of all rows."""

    def __init__(self, task: Task, store: TrunkStore, towers: Sequence[TowerTrunk]) -> None:
        super().__init__(task)
        self.store, self.towers = store, towers

    def __call__(self, parts: Sequence[Example | Problem]) -> Loaded:
        examples = [part for part in parts if not isinstance(part, Problem)]
        views = [example.pop("view") for example in examples]
        loaded = super().__call__(parts)
        if loaded.batch is None:
            return loaded
        places = list(zip(loaded.indices, views, strict=True))
        batch = {key: _blanks(value) for key, value in loaded.batch.items()}
        loaded.batch = {**batch, STATES: self.states(places, examples)}
        return loaded

    def states(self, places: Sequence[Place], examples: Sequence[Example]) -> States:
        """Those of the batch that examples make, on the CPU, in the type in which they are kept."""
        found: States = {}
        cacheable = capability(self.task, CacheableInputs)
        for tower in self.towers:
            firsts: dict[int, tuple[int, int, int]] = {}
            units = [cacheable.tower_rows(tower.tower, example) for example in examples]
            for place, rows in zip(places, row_numbers(units), strict=True):
                for part, row in enumerate(rows):
                    firsts.setdefault(row, (*place, part))
            wanted = [firsts[row] for row in range(len(firsts))]
            for layer, states in self.store.states(tower.tower, tower.layers, wanted).items():
                found[tower.tower, layer] = states
        return found


def _blanks(value: Any) -> Any:
    """A batch or an example with a `Blank` for each tensor without values."""
    if isinstance(value, Tensor) and value.device.type == "meta":
        return Blank(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _blanks(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_blanks, value))
    return value
