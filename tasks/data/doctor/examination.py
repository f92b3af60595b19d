"""Reads all of a data set before anything is trained on it, and collects its problems.

Worker processes read the rows and send what they saw in some dozens of them at a time. It is added
up here, so that memory does not grow with the number of files but for some 60 bytes a row.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from ...config.schema import SPLITS, Split
from ...core.capabilities import DataChecks, Tally, capability
from ...core.errors import BadRow
from ...core.findings import Finding, Places
from ...core.rows import Rows
from ...core.task import Task
from ..examples import seeded_example
from ..media.decode import stored
from ..stream import Stream
from ..workers import MOST
from .checks import RowFacts, RowNames, facts_of, findings_of
from .files import file_findings
from .repeats import Place, shared_findings
from .results import DataReport, Group, SplitReport

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5  # rows named for each reason
STREAMED = 1000  # rows of a stream that are read
FEW = 64  # so few rows are read without worker processes
READ_AT_ONCE = 32
EXAMPLES = 512  # of about so many rows examples are made, if a task can read rows without that


def examine(
    task: Task,
    data: Mapping[Split, Rows],
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> DataReport:
    """Reads every row of every split and reports the failures, grouped by reason.

    Each file is decoded. Examples are made of every row, or, if the task inspects rows by itself
    (see `DataChecks.tally`), of 512 to 1,024 rows of each split, spread over it.

    Of a stream only the first 1,000 rows are read. No row ends the examination: an error of
    `example` other than `BadRow` is a problem of its row too, named by its type.

    Args:
        task: the fitted task.
        workers: number of processes that read; by default one for each core, at most 8.
        console: where the progress bar is shown; by default on the terminal, if there is one.
    """
    if workers is None:
        workers = min(os.cpu_count() or 1, MOST)
    report = DataReport([])
    facts: dict[Split, RowFacts] = {}
    tallies: dict[Split, Tally] = {}
    readable: dict[Split, Rows] = {
        split: rows.head(STREAMED) if isinstance(rows, Stream) else rows
        for split, rows in data.items()
    }
    with _progress(console, sum(len(rows) for rows in readable.values())) as advance:
        for name in (split for split in SPLITS if split in readable):
            reading = _Reading(task, name, readable[name])
            reading.run(workers, advance)
            split, facts[name] = reading.report, reading.facts
            if reading.tally is not None and split.usable:
                tallies[name] = reading.tally
            split.partial = isinstance(data[name], Stream)
            report.splits.append(split)
    report.findings += file_findings(task)
    report.findings += _missing_splits(data)
    report.findings += shared_findings(
        {name: some.keys for name, some in facts.items()},
        {name: some.place for name, some in facts.items()},
    )
    for split in report.splits:
        report.findings += findings_of(task, split.name, readable[split.name], facts[split.name])
    _add_findings(task, readable, tallies, report)
    return report


def _missing_splits(data: Mapping[Split, Rows]) -> list[Finding]:
    if "train" not in data:
        return [Finding("there is no training split: name it in data.splits")]
    if "validation" not in data:
        return [
            Finding(
                "there is no validation split to choose the best checkpoint by: give its share in "
                "data.fractions"
            )
        ]
    return []


def _add_findings(
    task: Task,
    readable: Mapping[Split, Rows],
    tallies: Mapping[Split, Tally],
    report: DataReport,
) -> None:
    """Adds the findings of the task itself about the splits of which it can use a row."""
    splits = {split.name: readable[split.name] for split in report.splits if split.usable}
    whole = not any(split.partial for split in report.splits)
    checks = capability(task, DataChecks)
    try:
        if whole and tallies:
            report.findings += checks.conclusions(splits, tallies)
        else:
            report.findings += checks.findings(splits, whole=whole)
    except Exception as error:  # a fault of the task, perhaps caused by the data
        for split in report.splits[:1]:
            split.errors.append(
                f"the task's own check of it failed: {type(error).__name__}: {first_line(error)}"
            )


@dataclass(frozen=True)
class _Seen:
    """A row that was read: why it cannot be used (None if it can), a remark on it, whether an
    example was made of it, and what is seen in it."""

    index: int
    reason: str | None
    remark: str | None
    made: bool
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """Rows that a worker has read, and what the task has seen in them."""

    rows: list[_Seen]
    tally: Tally | None


class _Reader(torch.utils.data.Dataset):
    """Reads rows, some dozens at a time, and discards them; never raises."""

    def __init__(self, task: Task, rows: Rows, *, train: bool) -> None:
        self.task, self.rows, self.train = task, rows, train
        self.checks = capability(task, DataChecks)
        self.step = max(1, len(rows) // EXAMPLES)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / READ_AT_ONCE)

    def __getitem__(self, part: int) -> _Part:
        first = part * READ_AT_ONCE
        tally = self.checks.tally()
        rows = range(first, min(first + READ_AT_ONCE, len(self.rows)))
        return _Part([self._read(index, tally) for index in rows], tally)

    def _read(self, index: int, tally: Tally | None) -> _Seen:
        row: Mapping[str, Any] = {}
        decoded: dict[str, Any] = {}
        reason = remark = None
        made = tally is None or index % self.step == 0
        with ExitStack() as files:
            try:
                row = self.rows[index]
                if made:
                    seeded_example(self.task, row, index, train=self.train)
                if tally is not None:
                    decoded = self._decoded(row, files)
                    remark = self.checks.inspect(index, {**row, **decoded}, tally, train=self.train)
            except BadRow as error:
                reason = first_line(error)
            except Exception as error:  # a fault of the task, but no reason to stop
                reason = f"{type(error).__name__}: {first_line(error)}"
            facts = facts_of(self.task, row, decoded=decoded)
        return _Seen(index, reason, remark, made, facts)

    def _decoded(self, row: Mapping[str, Any], files: ExitStack) -> dict[str, Any]:
        """Returns by role the pictures of a row as PIL images, so that each is decoded once.

        Those of 16 bits a channel are left out, since PIL keeps 8 of them, and so are broken ones,
        which the task names.
        """
        decoded = {}
        for role, column in self.task.columns.items():
            value = row.get(role)
            if column.kind == "image" and value is not None and not isinstance(value, np.ndarray):
                try:
                    picture = files.enter_context(stored(value, "image", deep=True))
                except BadRow:
                    continue
                if picture.deep is None:
                    decoded[role] = picture.image
        return decoded


class _Groups:
    """Groups rows by reason, without its numbers and names. Rows come in rising order."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._groups: dict[str, tuple[str, Places]] = {}

    def add(self, index: int, reason: str) -> None:
        """Adds a row."""
        _, places = self._groups.setdefault(_pattern(reason), (reason, Places()))
        places.add(index, self._place)

    def result(self) -> list[Group]:
        """Returns the groups; the largest comes first."""
        groups = [
            Group(reason, len(places), tuple(places[:SHOWN]))
            for reason, places in self._groups.values()
        ]
        return sorted(groups, key=lambda group: -group.count)


class _Reading:
    """Reads a split.

    Attributes:
        report: what is told of it.
        facts: what is seen in its rows.
        tally: what the task has seen in them; None for a task without tallies.
    """

    def __init__(self, task: Task, name: Split, rows: Rows) -> None:
        self._task, self._rows, self._train = task, rows, name == "train"
        self._checks = capability(task, DataChecks)
        self.report = SplitReport(name, len(rows))
        self.facts = RowFacts(len(rows), RowNames(task, rows))
        self.tally = self._checks.tally()
        self._failed = bytearray(len(rows))

    def run(self, workers: int, advance: Callable[[int], None]) -> None:
        """Reads all rows, and lets the task check them."""
        report = self.report
        if not len(self._rows):
            report.errors.append("it has no rows")
            return
        report.errors += _missing_columns(self._task, report.name, self._rows)
        if report.errors:
            return
        remarks = _Groups(self.facts.place)
        self._read(workers, advance, remarks)
        if not report.usable:
            return

        def add_notes() -> None:
            if self.tally is None:
                problems = self._checks.check(self._rows)
                for problem in sorted(problems, key=lambda problem: problem.index):
                    if not self._failed[problem.index]:
                        remarks.add(problem.index, problem.reason)
            report.notes = remarks.result()

        def add_tables() -> None:
            report.tables = self._checks.tables(self._rows, self.tally)

        for step in (add_notes, add_tables):
            try:
                step()
            except Exception as error:  # a fault of the task, perhaps caused by the data
                report.errors.append(
                    "the task's own check of it failed: "
                    f"{type(error).__name__}: {first_line(error)}"
                )

    def _read(self, workers: int, advance: Callable[[int], None], remarks: _Groups) -> None:
        report, bad = self.report, _Groups(self.facts.place)
        try:
            for part in _parts(_Reader(self._task, self._rows, train=self._train), workers):
                for seen in part.rows:
                    self.facts.add(seen.index, seen.facts)
                    report.made += seen.made
                    if seen.reason is None:
                        report.usable += 1
                    else:
                        self._failed[seen.index] = 1
                        bad.add(seen.index, seen.reason)
                    if seen.remark is not None:
                        remarks.add(seen.index, seen.remark)
                if self.tally is not None:
                    self.tally.merge(part.tally)
                advance(len(part.rows))
        except RuntimeError as error:
            # The loader raises this when a worker was killed: a decoder crashed, or memory ran out.
            report.errors.append(
                f"reading it ended at one of the rows from {self.facts.looked} on, and none after "
                f"was checked: {first_line(error)}"
            )
        report.problems = bad.result()


def _missing_columns(task: Task, name: Split, rows: Rows) -> list[str]:
    there = list(rows.column_names)
    errors = [
        f"it has no column {role!r}{nearest(role, there)}; it has {', '.join(there)}"
        for role, column in task.columns.items()
        if column.required and role not in there
    ]
    if name != "train":
        errors += [
            f"evaluation.groups names {group!r}, which it does not have{nearest(group, there)}; "
            f"it has {', '.join(there)}"
            for group in task.config.evaluation.groups
            if group not in there
        ]
    return errors


def _parts(reader: _Reader, workers: int) -> Iterator[_Part]:
    loader = DataLoader(
        reader,
        batch_size=None,
        num_workers=0 if len(reader.rows) <= FEW else workers,
        collate_fn=_same,
        worker_init_fn=_ignore_warnings,
    )
    with warnings.catch_warnings():
        _ignore_warnings()
        yield from loader


def _same(part: Any) -> Any:
    """Hands a part on as it is, where torch's loader would look for tensors in it."""
    return part


def _ignore_warnings(worker: int = 0) -> None:
    """Hides the warnings of decoders, which come once for each file."""
    warnings.simplefilter("ignore")


def _pattern(reason: str) -> str:
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason)
    reason = re.sub(r"\S*[/\\]\S*", "…", reason)
    return re.sub(r"\d+([.,]\d+)*", "#", reason)


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = console or Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        bar = progress.add_task("", total=total)
        yield lambda rows: progress.advance(bar, rows)
