"""Optional capabilities of a task. A task that has one inherits from its class here.

Each class answers for a task without the capability, so a caller need not ask whether the task has
it: `capability(task, BatchGrouping).lengths(rows)` is None for a task that groups nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config.schema import Split
from .errors import BadRow, Problem
from .findings import Finding
from .model import TaskModel
from .results import Figure, Table
from .rows import Example, Record, Rows
from .task import Task

K = TypeVar("K")


def capability(task: Task, kind: type[K]) -> K:
    """Returns the task if it has the capability, else the answers of a task without it."""
    return task if isinstance(task, kind) else kind()


@dataclass(frozen=True)
class TowerRow:
    """A row that an example gives to the batch of a tower.

    Attributes:
        key: rows of a batch with equal keys are one row, which stands where the first of them
            stood. A row without a key (None) is never shared.
        tokens: the number of states in the row that belong to the example and not to padding; None
            if all do.
    """

    key: str | None = None
    tokens: int | None = None


class CacheableInputs:
    """States of the frozen trunk can be computed once and kept, in place of the inputs."""

    @property
    def cacheable_inputs(self) -> Mapping[str, str]:
        """The entries of an example that only the first layers of a tower read: name -> tower.

        If the states of that tower are kept, only the shape of the entry is needed.
        """
        return {"pixels": "vision", "wave": "audio"}

    def tower_rows(self, tower: str, example: Example) -> Sequence[TowerRow]:
        """Returns the rows that an example gives to the batch of a tower.

        The rows of all examples follow each other in the batch, as in `Task.collate`. Entries named
        in `cacheable_inputs` may have a shape only, and no values.
        """
        return (TowerRow(),)

    def randomness(self, rows: Rows) -> str | None:
        """Returns the setting (or words) by which training examples of these rows are random.

        Returns:
            None if a row gives the same example each time.
        """
        return "what the task draws"

    def one_pass(self, rows: Rows) -> str | None:
        """Returns why `Task.records` does not run each tower once on a whole batch, or None."""
        return None


class BatchGrouping:
    """Rows that are alike go into the same batch."""

    def lengths(self, rows: Rows) -> list[int] | None:
        """Returns the size of each row if batches should hold rows of similar sizes, else None."""
        return None

    def groups(self, rows: Rows) -> list[int] | None:
        """Returns the number of each row's group, or None if there are no groups.

        Rows of one group go into the same training batch, since they share costly work (questions
        about one image, for example).
        """
        return None


class Calibration:
    """The head takes values from the data before training or after it (few-shot heads)."""

    def choose(self, rows: Rows) -> Rows:
        """Returns the training rows that are used."""
        return rows

    def prepare(self, model: TaskModel, splits: Mapping[Split, Rows]) -> None:
        """Gives the head its values from the training rows, before training.

        Every process calls it.

        Args:
            splits: with the chosen training rows, and without the test split.

        Raises:
            ValueError: a split that the head needs is missing.
        """

    def calibrate(self, model: TaskModel, splits: Mapping[Split, Rows]) -> dict[str, Any]:
        """Sets the values that are chosen after training, on the same splits as in `prepare`.

        Returns:
            Facts for the report, JSON-ready.
        """
        return {}


class SecondPass:
    """Evaluation ends with a second pass over all records of a split."""

    def refine(self, model: TaskModel, rows: Rows, records: list[Record]) -> None:
        """Adds to the records what needs all of them at once and the model (a reranking).

        Every process calls it with the same records, in the order of the rows, and must end with
        the same records. The model is in eval mode, and no gradients are computed.
        """


class Tally:
    """Adds up what a task sees in rows of a split. Its size does not depend on their number."""

    def merge(self, later: Any) -> None:
        """Adds a tally of rows that come after those of this one."""


class DataChecks:
    """`mmadapters doctor` tells more of the data than whether its rows can be read.

    A task whose checks decode files gives a `tally`. Then `inspect` is called once for each row, in
    several processes, and what it adds to the tally is all that `tables` and `conclusions` need.
    """

    def tally(self) -> Tally | None:
        """Returns an empty tally for `inspect`, which can be pickled; None if the task has none.

        Without one `Task.example` is called for each row, and `check` for all.
        """
        return None

    def inspect(self, index: int, row: Mapping[str, Any], tally: Any, *, train: bool) -> str | None:
        """Reads a row as `Task.example` does, without making an example, and adds it to the tally.

        Pictures of the row may be decoded already, to PIL images.

        Returns:
            A remark on a row that can be used, as `check` returns it in a `Problem`, or None.

        Raises:
            BadRow: the row cannot be used. Nothing is added to the tally.
        """
        return None

    def tables(self, rows: Rows, tally: Any) -> list[Table]:
        """Returns tables about the split as a whole from its tally, None if there is none."""
        return self.survey(rows)

    def conclusions(
        self, splits: Mapping[Split, Rows], tallies: Mapping[Split, Any]
    ) -> list[Finding]:
        """Returns what `findings` returns for all rows of the splits, from their tallies."""
        return self.findings(splits, whole=True)

    def check(self, rows: Rows) -> list[Problem]:
        """Returns problems of rows that can be used (a caption that will be cut, for example).

        Rows for which `Task.example` raises `BadRow` need no problem here. A row has one at most.
        """
        return []

    def survey(self, rows: Rows) -> list[Table]:
        """Returns tables about the split as a whole (how often each class is there)."""
        return []

    def findings(self, splits: Mapping[Split, Rows], *, whole: bool) -> list[Finding]:
        """Returns what is suspicious about the splits, or makes them unusable (a class that never
        occurs).

        Training asks it before the first step, with a sample of each split that is small enough to
        be read in a second.

        Args:
            splits: the rows of each split.
            whole: whether they are all rows, and not a sample.
        """
        return []


def inspected(task: DataChecks, rows: Rows) -> tuple[list[Problem], Any]:
    """Inspects rows in this process; returns the remarks on those that can be used, and the tally.

    The task has tallies.
    """
    tally, problems = task.tally(), []
    for index in range(len(rows)):
        try:
            remark = task.inspect(index, rows[index], tally, train=False)
        except BadRow:
            continue
        if remark is not None:
            problems.append(Problem(index, remark))
    return problems, tally


class ReportPictures:
    """The report of a run shows examples of the task's predictions."""

    def illustrate(
        self, model: TaskModel, rows: Rows, records: Sequence[Record], *, count: int
    ) -> list[Figure | Table]:
        """Returns figures and tables of what went well and of what went worst.

        Args:
            records: of the rows, as `Task.score` reads them.
            count: about how many examples are shown.
        """
        return []
