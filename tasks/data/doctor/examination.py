"""Reads all of a data set before anything is trained on it, and collects its problems."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from ...config.schema import SPLITS, Split
from ...core.capabilities import DataChecks, capability
from ...core.errors import BadRow, Problem
from ...core.findings import Finding
from ...core.rows import Rows
from ...core.task import Task
from ..examples import seeded_example
from ..media import media_name
from ..stream import Stream
from ..workers import MOST
from .checks import RowFacts, facts_of, findings_of
from .files import file_findings
from .repeats import shared_findings
from .results import DataReport, Group, RowPlace, SplitReport

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 5  # rows named for each reason
STREAMED = 1000  # rows of a stream that are read
FEW = 64  # so few rows are read without worker processes
READ_AT_ONCE = 16


def examine(
    task: Task,
    data: Mapping[Split, Rows],
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> DataReport:
    """Makes every example of every split once and reports the failures, grouped by reason.

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
    readable: dict[Split, Rows] = {
        split: rows.head(STREAMED) if isinstance(rows, Stream) else rows
        for split, rows in data.items()
    }
    with _progress(console, sum(len(rows) for rows in readable.values())) as advance:
        for name in (split for split in SPLITS if split in readable):
            split, facts[name] = _split(task, name, readable[name], workers, advance)
            split.partial = isinstance(data[name], Stream)
            report.splits.append(split)
    report.findings += file_findings(task)
    report.findings += _missing_splits(data)
    report.findings += shared_findings({name: some.keys for name, some in facts.items()})
    for split in report.splits:
        report.findings += findings_of(task, split.name, readable[split.name], facts[split.name])
    _add_findings(task, readable, report)
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


def _add_findings(task: Task, readable: Mapping[Split, Rows], report: DataReport) -> None:
    """Adds the findings of the task itself about the splits of which it can use a row."""
    splits = {split.name: readable[split.name] for split in report.splits if split.usable}
    whole = not any(split.partial for split in report.splits)
    try:
        report.findings += capability(task, DataChecks).findings(splits, whole=whole)
    except Exception as error:  # a fault of the task, perhaps caused by the data
        for split in report.splits[:1]:
            split.errors.append(
                f"the task's own check of it failed: {type(error).__name__}: {first_line(error)}"
            )


@dataclass(frozen=True)
class _Seen:
    """A row that was read: why it cannot be used (None if it can), and what is seen in it."""

    place: RowPlace
    reason: str | None
    facts: dict[str, Any] = field(default_factory=dict)


class _Reader(torch.utils.data.Dataset):
    """Makes examples and discards them; never raises."""

    def __init__(self, task: Task, rows: Rows, *, train: bool) -> None:
        self.task, self.rows, self.train = task, rows, train
        kinds = {role: column.kind for role, column in task.columns.items()}
        names = rows.column_names
        self.media = [r for r, kind in kinds.items() if kind in ("image", "audio") and r in names]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> _Seen:
        row: Mapping[str, Any] = {}
        reason = None
        try:
            row = self.rows[index]
            seeded_example(self.task, row, index, train=self.train)
        except BadRow as error:
            reason = first_line(error)
        except Exception as error:  # a fault of the task, but no reason to stop
            reason = f"{type(error).__name__}: {first_line(error)}"
        values = [row.get(role) for role in self.media]
        name = next((n for value in values if (n := media_name(value))), None)
        return _Seen(RowPlace(index, name), reason, facts_of(self.task, row))


def _split(
    task: Task, name: Split, rows: Rows, workers: int, advance: Callable[[int], None]
) -> tuple[SplitReport, RowFacts]:
    report = SplitReport(name, len(rows))
    facts = RowFacts(rows=len(rows))
    if not len(rows):
        report.errors.append("it has no rows")
        return report, facts
    report.errors += _missing_columns(task, name, rows)
    if report.errors:
        return report, facts
    bad: list[tuple[RowPlace, str]] = []
    places: dict[int, RowPlace] = {}
    try:
        for seen in _read(_Reader(task, rows, train=name == "train"), workers):
            advance(1)
            places[seen.place.index] = seen.place
            if seen.reason is not None:
                bad.append((seen.place, seen.reason))
            facts.add(seen.place, seen.facts)
    except RuntimeError as error:
        # The loader raises this when a worker was killed: a decoder crashed, or memory ran out.
        first = len(places)
        report.errors.append(
            f"reading it ended at one of the rows from {first} on, and none after was checked: "
            f"{first_line(error)}"
        )
    report.usable = len(places) - len(bad)
    report.problems = _grouped(bad)
    failed = {place.index for place, _ in bad}

    checks = capability(task, DataChecks)

    def add_notes() -> None:
        notes = [problem for problem in checks.check(rows) if problem.index not in failed]
        report.notes = _grouped([(_place(places, p), p.reason) for p in notes])

    def add_tables() -> None:
        report.tables = checks.survey(rows)

    for step in (add_notes, add_tables) if report.usable else ():
        try:
            step()
        except Exception as error:  # a fault of the task, perhaps caused by the data
            report.errors.append(
                f"the task's own check of it failed: {type(error).__name__}: {first_line(error)}"
            )
    return report, facts


def _place(places: Mapping[int, RowPlace], problem: Problem) -> RowPlace:
    return places.get(problem.index, RowPlace(problem.index, None))


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


def _read(reader: _Reader, workers: int) -> Iterator[_Seen]:
    loader = DataLoader(
        reader,
        batch_size=READ_AT_ONCE,
        num_workers=0 if len(reader) <= FEW else workers,
        collate_fn=list,
        worker_init_fn=_ignore_warnings,
    )
    with warnings.catch_warnings():
        _ignore_warnings()
        for batch in loader:
            yield from batch


def _ignore_warnings(worker: int = 0) -> None:
    """Hides the warnings of decoders, which come once for each file."""
    warnings.simplefilter("ignore")


def _grouped(problems: Sequence[tuple[RowPlace, str]]) -> list[Group]:
    """Groups rows by reason, without its numbers and names; the largest group comes first."""
    groups: dict[str, list[tuple[RowPlace, str]]] = {}
    for place, reason in sorted(problems, key=lambda problem: problem[0].index):
        groups.setdefault(_pattern(reason), []).append((place, reason))
    by_reason = [
        Group(some[0][1], len(some), tuple(place for place, _ in some[:SHOWN]))
        for some in groups.values()
    ]
    return sorted(by_reason, key=lambda group: -group.count)


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
