"""What a task is: the seven things that training, evaluation, prediction and reports ask of it.

A task knows its data, its head and its metrics. It has no training loop, opens no data set and
writes no report: those are the same for all tasks and call what stands here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import nn

from mmadapters import AdapterModel

from ..config.schema import JobConfig, Split
from .errors import Problem
from .metrics import Metric

Example = dict[str, Any]
Batch = dict[str, Any]
Record = dict[str, Any]
C = TypeVar("C", bound=JobConfig)


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
class TowerRow:
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
        self.active_in_training: tuple[nn.Module, ...] = ()

    def train(self, mode: bool = True) -> TaskModel:
        """Puts adapter and head in train mode, and of the encoder only `active_in_training`.

        Those are the modules of LayerDrop and SpecAugment, where a config asks for them.
        """
        super().train(mode)
        for module in self.active_in_training:
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

    def calibrate(self, model: TaskModel, splits: Mapping[Split, Rows]) -> dict[str, Any]:
        """Sets what is chosen after training, on the same splits; gives what is worth telling of
        it, JSON-ready."""
        return {}

    cacheable_inputs: ClassVar[Mapping[str, str]] = {"pixels": "vision", "wave": "audio"}
    """What of an example nothing but the first layers of a tower reads: key -> tower. With that
    tower's states at hand its shape is enough."""

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        """The rows that an example gives to the batch of a tower, in which those of all examples
        follow each other; as `collate` makes it, heavy tensors may have no values."""
        return (TowerRow(),)

    def randomness(self, rows: Rows) -> str | None:
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
