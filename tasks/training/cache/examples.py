"""Examples of a split whose cacheable inputs the encoder has read once.

Filling: `FillExamples` and `FillCollate` make the batches that the frozen trunk runs on, and
`FillBatch.entries` makes from its states what a `TrunkStore` keeps of each row.
Reading: `CachedExamples` and `CachedCollate` make training and evaluation batches from a store.

Of a cacheable input (pixels, a waveform) only the shape is kept, with the trunk's states of it.
`collate` works on tensors without values as on any others. The batch then holds a `Blank` in place
of each of them, and the states of all its rows under `STATES`.
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

STATES = "states of the frozen trunk"  # no argument of a model's forward can have this name
_EXAMPLE, _PROBLEM = "example", "problem"
Place = tuple[int, int]  # the number of a row in the split, and of one of its views


def row_numbers(examples: Sequence[Sequence[TowerRow]]) -> list[list[int]]:
    """Returns, for each example, the numbers of its rows in the batch of a tower.

    Args:
        examples: the tower rows of each example. Rows with equal keys are one row of the batch.
    """
    known: dict[str, int] = {}
    count = 0
    numbers = []
    for tower_rows in examples:
        of_example = []
        for row in tower_rows:
            number = count if row.key is None else known.setdefault(row.key, count)
            count = max(count, number + 1)
            of_example.append(number)
        numbers.append(of_example)
    return numbers


@dataclass
class FillBatch:
    """A batch whose trunk states go into the cache.

    Attributes:
        places: the place of each row of the split that is in the batch.
        rests: for each place, packed, the example without cacheable inputs, or why the row cannot
            be used.
        good: the indices, into `places`, of the rows that can be used.
        tower_rows: by tower, the tower rows of each usable example.
        batch: the usable examples, collated; None if there are none.
    """

    places: list[Place]
    rests: list[bytes]
    good: list[int]
    tower_rows: dict[str, list[Sequence[TowerRow]]]
    batch: Batch | None

    def entries(self, towers: Sequence[TowerTrunk], states: States) -> list[Entry]:
        """Returns what the store keeps of each place.

        Args:
            towers: the cached part of each tower.
            states: the trunk states of `batch`, on the CPU; each (B, N, D).

        Raises:
            ValueError: a tower ran on another number of rows than the task says.
        """
        parts: list[dict[str, list[Part]]] = [{t.tower: [] for t in towers} for _ in self.rests]
        for tower in towers if self.good else ():
            layers = {layer: states[tower.tower, layer] for layer in tower.layers}
            tower_rows = self.tower_rows[tower.tower]
            numbers = row_numbers(tower_rows)
            count = len(next(iter(layers.values())))
            expected = len({number for of_example in numbers for number in of_example})
            if count != expected:
                raise ValueError(
                    f"tower {tower.tower!r} ran on {count} rows where the batch has {expected}"
                )
            for place, of_example, rows in zip(self.good, numbers, tower_rows, strict=True):
                parts[place][tower.tower] = [
                    Part({n: value[number][: row.tokens] for n, value in layers.items()}, row.key)
                    for number, row in zip(of_example, rows, strict=True)
                ]
        return [Entry(rest, of_towers) for rest, of_towers in zip(self.rests, parts, strict=True)]


class FillExamples(Dataset):
    """The examples of a split by place, as the cache is filled with them; bad rows as `Problem`."""

    def __init__(self, task: Task, rows: Rows, *, train: bool) -> None:
        self.task, self.rows, self.train = task, rows, train

    def __getitem__(self, place: Place) -> tuple[Place, Example | Problem]:
        row, view = place
        seed = view_seed(self.task.config.seed, row, view) if self.train else row
        try:
            return place, seeded_example(self.task, self.rows[row], seed, train=self.train)
        except BadRow as error:
            return place, Problem(row, str(error))


class FillCollate:
    """Gathers items of `FillExamples` into a `FillBatch`.

    Args:
        towers: the names of the encoder's towers.
    """

    def __init__(self, task: Task, towers: Sequence[str]) -> None:
        self.task, self.towers = task, towers

    def __call__(self, parts: Sequence[tuple[Place, Example | Problem]]) -> FillBatch:
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
        return FillBatch(
            [place for place, _ in parts],
            rests,
            good,
            {tower: [cacheable.tower_rows(tower, e) for e in examples] for tower in self.towers},
            self.task.collate(examples) if examples else None,
        )


def without_values(cacheable: Mapping[str, str], example: Example) -> Example:
    """Returns the example with its cacheable inputs on the meta device, where they have no values.

    Args:
        cacheable: as `Task.cacheable_inputs`, a key of the example -> its tower.
    """
    return {
        key: value.to("meta") if key in cacheable and isinstance(value, Tensor) else value
        for key, value in example.items()
    }


class CachedExamples(Examples):
    """The examples of a split as a store holds them; "view" names the view of each."""

    def __init__(self, task: Task, store: TrunkStore, rows: int, *, train: bool) -> None:
        super().__init__(task, range(rows), train=train)  # type: ignore[arg-type]
        self.store = store

    def read(self, row: int, seed: int) -> Example:
        view = seed % self.store.views
        rest = self.store.rest(row, view)
        if _PROBLEM in rest:
            raise BadRow(rest[_PROBLEM])
        return {**rest[_EXAMPLE], "view": view}


class CachedCollate(Collate):
    """Gathers `CachedExamples` into a `Loaded` whose batch holds the states of all its rows."""

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
        """Returns the states (B, N, D) of a batch of these examples, by tower and layer.

        They are on the CPU, in the type in which the store keeps them.
        """
        batch: States = {}
        cacheable = capability(self.task, CacheableInputs)
        for tower in self.towers:
            firsts: dict[int, tuple[int, int, int]] = {}
            tower_rows = [cacheable.tower_rows(tower.tower, example) for example in examples]
            for place, numbers in zip(places, row_numbers(tower_rows), strict=True):
                for part, number in enumerate(numbers):
                    firsts.setdefault(number, (*place, part))
            wanted = [firsts[number] for number in range(len(firsts))]
            for layer, states in self.store.states(tower.tower, tower.layers, wanted).items():
                batch[tower.tower, layer] = states
        return batch


def _blanks(value: Any) -> Any:
    """Returns a batch or an example with a `Blank` in place of each tensor without values."""
    if isinstance(value, Tensor) and value.device.type == "meta":
        return Blank(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _blanks(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_blanks, value))
    return value
