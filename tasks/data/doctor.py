"""Finds the problems of a data set by reading all of it before anything is trained on it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text
from torch.utils.data import DataLoader

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from ..config.schema import SPLITS, Split
from ..core.capabilities import DataChecks, capability
from ..core.errors import BadRow, Problem
from ..core.results import Figure, Table
from ..core.rows import Rows
from ..core.task import Task
from .examples import seeded_example
from .media import media_digest, media_name
from .stream import Stream
from .workers import MOST

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN = 5  # rows named for each reason
SHOWN_LINES = 20  # lines shown of a task's own tables
STREAMED = 1000  # rows of a stream that are read
FEW = 64  # so few rows are read without worker processes
READ_AT_ONCE = 16


@dataclass(frozen=True)
class RowPlace:
    """A row: its number in its split and the name of its file, or None."""

    index: int
    name: str | None

    def __str__(self) -> str:
        return f"{self.index}" if self.name is None else f"{self.index} ({self.name})"


@dataclass(frozen=True)
class Group:
    """Rows with the same problem.

    Attributes:
        reason: the reason of the first row, with its numbers and names.
        count: number of rows.
        places: the first few rows.
    """

    reason: str
    count: int
    places: tuple[RowPlace, ...]


@dataclass
class SplitReport:
    """The result for one split.

    Attributes:
        rows: number of rows.
        usable: number of rows that can be used.
        problems: rows that cannot be used.
        notes: rows that can be used but that the task remarks on.
        errors: problems of the split as a whole.
        tables: the task's own tables about the split.
        partial: whether only the first rows of a stream were read.
    """

    name: Split
    rows: int
    usable: int = 0
    problems: list[Group] = field(default_factory=list)
    notes: list[Group] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    partial: bool = False

    @property
    def ok(self) -> bool:
        """Whether every row of the split can be used."""
        return not self.errors and not self.problems


@dataclass
class DataReport:
    """The results for all splits, and warnings about the data set as a whole."""

    splits: list[SplitReport]
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row of every split can be used; warnings and notes are ignored."""
        return bool(self.splits) and all(split.ok for split in self.splits)


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
    digests: dict[Split, _Digests] = {}
    readable: dict[Split, Rows] = {
        split: rows.head(STREAMED) if isinstance(rows, Stream) else rows
        for split, rows in data.items()
    }
    with _progress(console, sum(len(rows) for rows in readable.values())) as advance:
        for name in (split for split in SPLITS if split in readable):
            split, digests[name] = _split(task, name, readable[name], workers, advance)
            split.partial = isinstance(data[name], Stream)
            report.splits.append(split)
    if "train" not in data:
        report.warnings.append("there is no training split: name it in data.splits")
    elif "validation" not in data:
        report.warnings.append(
            "there is no validation split to choose the best checkpoint by: give its share in "
            "data.fractions"
        )
    report.warnings += _leaks(digests)
    return report


@dataclass(frozen=True)
class _Seen:
    """A row that was read: why it cannot be used (None if it can), and a hash of each of its
    pictures and recordings by role."""

    place: RowPlace
    reason: str | None
    digests: dict[str, str]


# By role: the hash of every picture or recording of a split, and its row.
_Digests = dict[str, list[tuple[str, RowPlace]]]


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
        values = {role: row.get(role) for role in self.media}
        hashes = {role: media_digest(value) for role, value in values.items()}
        name = next((n for value in values.values() if (n := media_name(value))), None)
        digests = {role: digest for role, digest in hashes.items() if digest is not None}
        return _Seen(RowPlace(index, name), reason, digests)


def _split(
    task: Task, name: Split, rows: Rows, workers: int, advance: Callable[[int], None]
) -> tuple[SplitReport, _Digests]:
    report = SplitReport(name, len(rows))
    digests: _Digests = {}
    if not len(rows):
        report.errors.append("it has no rows")
        return report, digests
    report.errors += _missing_columns(task, name, rows)
    if report.errors:
        return report, digests
    bad: list[tuple[RowPlace, str]] = []
    places: dict[int, RowPlace] = {}
    try:
        for seen in _read(_Reader(task, rows, train=name == "train"), workers):
            advance(1)
            places[seen.place.index] = seen.place
            if seen.reason is not None:
                bad.append((seen.place, seen.reason))
            for role, digest in seen.digests.items():
                digests.setdefault(role, []).append((digest, seen.place))
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
    return report, digests


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


def _leaks(digests: Mapping[Split, _Digests]) -> list[str]:
    """Returns a warning for each two splits that share pictures or recordings: figures on them are
    too good."""
    leaks = []
    names = list(digests)
    for i, later in enumerate(names):
        for earlier in names[:i]:
            for role in digests[later]:
                known = dict(reversed(digests[earlier].get(role, ())))
                hits = [(p, known[d]) for d, p in digests[later][role] if d in known]
                if not hits:
                    continue
                some = "; ".join(f"{place} = {other}" for place, other in hits[:SHOWN])
                leaks.append(
                    f"{len(hits)} of {len(digests[later][role])} rows of {later} have the same "
                    f"{role} as a row of {earlier}: {some}" + ("; …" if len(hits) > SHOWN else "")
                )
    return leaks


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


def print_report(report: DataReport, console: Console) -> None:
    """Prints a table for each split: every reason with its first rows."""
    for split in report.splits:
        for part in _split_parts(split):
            console.print(part)
        console.print()
    for warning in report.warnings:
        console.print(Text.assemble(("warning: ", "yellow"), warning))
    if report.ok:
        verdict = Text("Every row can be used.", style="green")
    elif not report.splits:
        verdict = Text("There is no split at all.", style="red")
    else:
        lost = sum(split.rows - split.usable for split in report.splits)
        verdict = Text(f"{_counted(lost)} cannot be used.", style="red")
    console.print(verdict)


def _split_parts(split: SplitReport) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table as Grid

    rows = f"the first {_counted(split.rows)}" if split.partial else _counted(split.rows)
    title = f"{split.name}: {rows}, {split.usable:,} usable"
    yield Text(title, style="bold green" if split.ok else "bold red")
    for error in split.errors:
        yield Text.assemble(("  error: ", "red"), error)
    if split.problems or split.notes:
        grid = Grid("", "what", "rows", "which (first is 0)", box=box.SIMPLE_HEAD)
        for kind, groups in (("[red]bad[/]", split.problems), ("[yellow]note[/]", split.notes)):
            for group in groups:
                places = ", ".join(map(str, group.places))
                places += ", …" if group.count > len(group.places) else ""
                grid.add_row(kind, Text(group.reason), f"{group.count:,}", Text(places))
        yield grid
    for table in split.tables:
        grid = Grid(title=Text(table.title), box=box.SIMPLE_HEAD)
        for name in table.columns:
            grid.add_column(Text(name))
        for cells in table.rows[:SHOWN_LINES]:
            grid.add_row(*(Text(_cell(cell)) for cell in cells))
        yield grid
        if (more := len(table.rows) - SHOWN_LINES) > 0:
            yield Text(f"  and {more:,} more lines")


def _cell(value: Any) -> str:
    if isinstance(value, Figure):
        return value.title
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _counted(rows: int) -> str:
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"
