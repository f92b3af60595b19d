"""Prints the results of an examination."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ...core.findings import Finding
from ...core.results import Figure
from .results import DataReport, SplitReport

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN_LINES = 20  # lines shown of a task's own tables


def print_report(report: DataReport, console: Console) -> None:
    """Prints a table for each split: every reason with its first rows."""
    for split in report.splits:
        for part in _split_parts(split):
            console.print(part)
        console.print()
    print_findings(report.findings, console)
    console.print(_verdict(report))


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Prints each finding in a line of its own."""
    for finding in findings:
        kind = ("unusable: ", "red") if finding.severity == "unusable" else ("warning: ", "yellow")
        console.print(Text.assemble(kind, str(finding)), soft_wrap=True)


def _verdict(report: DataReport) -> Text:
    if report.verdict == "fine":
        return Text("Every row can be used. Verdict: fine.", style="green")
    lost = sum(split.rows - split.usable for split in report.splits)
    rows = f"{_counted(lost)} cannot be used." if lost else "Every row can be used."
    if not report.splits:
        rows = "There is no split at all."
    if report.verdict == "unusable":
        return Text(f"{rows} Verdict: unusable.", style="red")
    number = len(report.findings)
    told = "the warning above" if number == 1 else f"the {number} warnings above"
    return Text(f"{rows} Verdict: suspicious, see {told}.", style="yellow")


def _split_parts(split: SplitReport) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table as Grid

    rows = f"the first {_counted(split.rows)}" if split.partial else _counted(split.rows)
    title = f"{split.name}: {rows}, {split.usable:,} usable"
    yield Text(title, style="bold green" if split.ok else "bold red")
    if 0 < split.made < split.rows:
        yield Text(f"  all rows were read, and examples for training made of {split.made:,}")
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
