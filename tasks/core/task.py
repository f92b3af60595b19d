"""The contract of a task: the seven methods that every task must have.

A task knows its data, its head and its metrics. The training loop, the data loading and the report
are the same for all tasks and live elsewhere; they call the methods below. A task that can do more
(fill a cache of the frozen trunk, calibrate a head, draw pictures, …) also inherits from classes in
`capabilities`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from mmadapters import AdapterModel

from ..config.schema import LOSS, JobConfig
from .errors import InputErrors
from .model import TaskModel
from .results import Scores
from .rows import Batch, Column, Example, Record, Rows

C = TypeVar("C", bound=JobConfig)


class Task(ABC, Generic[C]):
    """One kind of job.

    Attributes:
        name: the name of the task, as in `task: NAME` of a config.
        metric: the metric that stands first in reports. On the validation split it chooses the best
            checkpoint, unless `deciding` is the loss.
        greater_is_better: whether a higher value of that metric is better.
        columns: the columns that a row has, by role. The columns of a data set are renamed to
            these roles. Columns without a role keep their names, and groups are read from them.
        usage: the kind of inputs that `predict` takes, in words for a user.
        config: the config of the job.
        state: what `fit` learned from the training split and the backbone (label map, vocabulary,
            preprocessing). It is JSON-ready, is saved with the adapter, and is enough to build the
            task again.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True
    columns: ClassVar[Mapping[str, Column]]
    usage: ClassVar[str] = "image or audio files"

    def __init__(self, config: C, state: dict[str, Any] | None = None) -> None:
        self.config = config
        self.state: dict[str, Any] = state or {}
        if (name := config.evaluation.deciding) is not None and name != LOSS:
            self.metric = name  # type: ignore[misc]

    @property
    def deciding(self) -> str:
        """The figure on the validation split that chooses the best checkpoint: the metric, or
        `LOSS`."""
        return LOSS if self.config.evaluation.deciding == LOSS else self.metric

    def unchanging_example(self, row: Mapping[str, Any]) -> Example:
        """Returns one row as for training, without random changes where the task can leave them
        out, for the loss on the validation split.

        Raises:
            BadRow: as `example`.
        """
        return self.example(row, train=True)

    @abstractmethod
    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        """Fills `state` from the training rows and the backbone.

        Args:
            rows: the training rows; None if nothing is trained.
            backbone: the encoder, without adapters.

        Raises:
            ValueError: the rows cannot make a task (they have one class only, or no text at all).
        """

    @abstractmethod
    def build(self, encoder: AdapterModel) -> TaskModel:
        """Returns the encoder with a new head, initialised from torch's global random state."""

    @abstractmethod
    def example(self, row: Mapping[str, Any], *, train: bool) -> Example:
        """Returns one row as tensors, augmented if `train`.

        It runs in worker processes. The global random states of torch and `random` are seeded for
        each call.

        Raises:
            BadRow: the row cannot be used; the message says why. Bad data raises nothing else.
        """

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Returns examples of any sizes as the keyword arguments of the model's forward pass."""

    @abstractmethod
    def records(self, model: TaskModel, batch: Batch) -> list[Record]:
        """Returns a record of each example of a batch, in order, for `score`.

        A record holds numbers, text and small arrays on the CPU and can be pickled. It must not
        depend on the other examples of the batch. The batch lies on the model's device, the model
        is in eval mode, and no gradients are computed.
        """

    @abstractmethod
    def score(self, records: Sequence[Record], *, bootstrap: int) -> Scores:
        """Returns the scores of a split.

        Args:
            records: as `records` returned them, each with two more entries: "index" is the number
                of its row, and "row" has the row's columns of text and numbers, for groups.
            bootstrap: the number of resamples for the intervals of the metrics; 0 for no intervals.
        """

    @abstractmethod
    def predict(
        self,
        model: TaskModel,
        inputs: Sequence[str],
        *,
        out: Path | None,
        bad: InputErrors | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Returns a JSON-ready result for each input.

        Args:
            model: in eval mode.
            inputs: arguments of the command line; `usage` says what they are.
            out: the folder for results that are files (masks, overlays); None for no files.
            bad: collects the inputs that cannot be used.

        Raises:
            BadInputs: `bad` holds inputs that cannot be used; raised after the last result.
        """
