"""What a task is: the seven things that training, evaluation, prediction and reports ask of it.

A task knows its data, its head and its metrics. It has no training loop, opens no data set and
writes no report: those are the same for all tasks and call what stands here.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mmadapters import AdapterModel

from ..config.schema import JobConfig, Split
from .metrics import Metric

Example = dict[str, Any]
Batch = dict[str, Any]
Record = dict[str, Any]
C = TypeVar("C", bound=JobConfig)


class BadRow(ValueError):
    """A row that cannot be used; the message says what is wrong with it, not where it is."""


class Rows(Protocol):
    """A split of a data set: rows by number, columns by name. `datasets.Dataset` is one."""

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any) -> Any:
        """A row as a dict by number, a column as a list by name."""


@dataclass(frozen=True)
class Column:
    """A column that a task reads: `kind` says what `doctor` checks in it."""

    kind: str  # "image", "mask", "audio", "text", "label", "texts"
    required: bool = True
    description: str = ""


@dataclass(frozen=True)
class Problem:
    """A row that could not be used: its number in its split and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class Unit:
    """A row that an example gives to the batch of a tower.

    `key`: rows of a batch with equal keys are one, where the first of them stands; None: the row is
    always one of its own. `tokens`: how many of the states in the row are its own, and not padding;
    None: all.
    """

    key: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Figure:
    """A picture of the report: `image` is PNG data, shown with its caption."""

    title: str
    image: bytes
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the report. Cells are text or numbers, or a Figure for a small picture."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass
class Scores:
    """What a split's records amount to.

    `metrics`: the split's figures, the deciding one first; `groups`: the same by column and value;
    `tables`: what else the report shows (per class, worst utterances, …), without pictures.
    """

    metrics: list[Metric]
    groups: dict[str, dict[str, list[Metric]]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)

    def __getitem__(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.name == name)


class TaskModel(nn.Module):
    """A frozen encoder with adapters, and the head that is trained on it.

    `forward(**batch)` returns a dict whose "loss" is a scalar in float32 where the batch has
    targets. The head holds every trainable tensor that is not the adapter's: it alone is saved.
    No attribute may be called `config`: transformers' Trainer would take it for its own.
    """

    def __init__(self, encoder: AdapterModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.awake: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> TaskModel:
        """Adapter and head to train mode, and the modules of `awake` alone: what the encoder does
        in training only where asked for (LayerDrop, SpecAugment)."""
        super().train(mode)
        for module in self.awake:
            module.training = mode
        return self

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class Task(ABC, Generic[C]):
    """One kind of job.

    Class attributes:
        name: as in `task: NAME` of a config.
        metric: the metric by which the best checkpoint is chosen, on the validation split.
        greater_is_better: of that metric.
        columns: what a row must hold, by role. Rows come with their columns renamed to roles;
            columns without a role keep their names (groups are read from them).

    `state` is what was learned from the training split and the backbone (label map, vocabulary,
    preprocessing): JSON-ready, saved with the adapter, and enough to build the task again.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]]

    def __init__(self, config: C, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.state: dict[str, Any] = state or {}

    @abstractmethod
    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        """Fills `state` from the training rows (None: nothing is trained) and the backbone.

        Raises:
            ValueError: the rows cannot make a task (one class only, no text at all).
        """

    @abstractmethod
    def build(self, encoder: AdapterModel) -> TaskModel:
        """The encoder with a fresh head. Draws from torch's global random state."""

    @abstractmethod
    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        """One row as tensors, augmented if `train`. torch's and random's global states are seeded
        for this call; runs in worker processes.

        Raises:
            BadRow: the row cannot be used, with the reason: never anything else for bad data.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples of any sizes as the keyword arguments of the model's forward."""

    @abstractmethod
    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        """What evaluation keeps of each example of a batch (on the model's device), in order:
        numbers, text and small arrays on the CPU, picklable, for `score`. Must be the same for an
        example whatever else is in its batch. Runs without gradients, model in eval mode."""

    @abstractmethod
    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        """The metrics of a split. Records hold "index" and "row" (the row's plain columns: text
        and numbers, for groups) besides what `records` gave. `bootstrap`: resamples, 0 for none."""

    @abstractmethod
    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        """Pictures of the report: what went well, what went worst."""

    @abstractmethod
    def predict(
        self, model: TaskModel, inputs: Sequence[str], *, out: Path | None
    ) -> Iterator[dict[str, Any]]:
        """For each input of the command line (a file, a folder's files, or what the task says in
        its `usage`) a JSON-ready result; larger results (masks, overlays) go to the folder `out`.

        Raises:
            ValueError: an input cannot be read; says which.
        """

    usage: ClassVar[str] = "image or audio files"

    def refine(self, model: TaskModel, rows: Rows, records: list[Record]) -> None:
        """Adds to the records of a split what needs all of them at once and the model (a second
        look at the best candidates). Every process calls it, without gradients, model in eval
        mode, with the same records in the order of the rows, and must end with the same."""

    def choose(self, rows: Rows) -> Rows:
        """The training rows that are used."""
        return rows

    def prepare(self, model: TaskModel, splits: Mapping[Split, Rows]) -> None:
        """Gives the head what it takes from the training rows before it is trained. `splits` have
        the chosen training rows and no test. Every process calls it.

        Raises:
            ValueError: a split that it needs is not there.
        """

    def settle(self, model: TaskModel, splits: Mapping[Split, Rows]) -> dict[str, Any]:
        """Sets what is chosen after training, on the same splits; gives what is worth telling of
        it, JSON-ready."""
        return {}

    heavy: ClassVar[Mapping[str, str]] = {"pixels": "vision", "wave": "audio"}
    """What of an example nothing but the first layers of a tower reads: key -> tower. With that
    tower's states at hand its shape is enough."""

    def units(self, tower: str, example: Example) -> Sequence[Unit]:
        """The rows that an example gives to the batch of a tower, in which those of all examples
        follow each other; as `collate` makes it, heavy tensors may have no values."""
        return (Unit(),)

    def draws(self, rows: Rows) -> str | None:
        """What is drawn at random for a training example of these rows, as a setting or in words;
        None where an example is the same each time."""
        return "what the task draws"

    def one_pass(self, rows: Rows) -> str | None:
        """Why `records` does not let each tower run once on the whole batch, if so."""
        return None

    def lengths(self, rows: Rows) -> list[int] | None:
        """The size of each row where batches should be of similar sizes, None where not."""
        return None

    def groups(self, rows: Rows) -> list[int] | None:
        """The group of each row where rows of one group should share a training batch, as they
        share what is costly (questions about one image); None where nothing is shared."""
        return None

    def check(self, rows: Rows) -> list[Problem]:
        """What `doctor` reports beyond rows for which `example` fails, one at most for each row:
        what would train but should be known (an utterance too short for CTC, …)."""
        return []

    def survey(self, rows: Rows) -> list[Table]:
        """What `doctor` shows of a split as a whole (how often each class is there)."""
        return []


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
