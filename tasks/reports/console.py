"""Tables and progress bars that the commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..core.metrics import Metric
    from ..core.results import Scores


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a progress bar if the output is a terminal.

    Yields a function that takes how much is done, and the new total if it has changed.
    """
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task(title, total=total)
        yield lambda done, total=total: bars.update(bar, completed=done, total=total)


def print_scores(console: Console, scores: Scores, title: str) -> None:
    """Prints a table of metrics and their intervals, in total and by group."""
    table = Table("", "value", "95 % interval", "n", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for metric in scores.metrics:
        table.add_row(*_cells(metric.name, metric))
    for column_name, values in scores.groups.items():
        table.add_section()
        for value, metrics in values.items():
            table.add_row(*_cells(f"{column_name} {value}: {metrics[0].name}", metrics[0]))
    console.print(table)


def _cells(name: str, metric: Metric) -> tuple[str, str, str, str]:
    value, _, interval = str(metric).removesuffix(" %").partition(" [")
    unit = " %" if metric.unit == "%" else ""
    interval = f"{interval.removesuffix(']')}{unit}".replace(", ", " – ") if interval else ""
    return plain(name), f"{value}{unit}", interval, f"{metric.count:,}"


def print_facts(console: Console, facts: dict[str, Any]) -> None:
    """Prints a line with the trained parameters, the time and the size of a run.

    Args:
        facts: as `Run.facts`.
    """
    words = [
        f"trained {100 * facts['trained_share']:.2f} % of the encoder"
        f" ({facts['adapter_parameters']:,} in the adapter,"
        f" {facts['head_parameters']:,} in the head)"
    ]
    if "train_seconds" in facts:
        words.append(f"{facts['steps']} steps in {facts['train_seconds']:.0f} s")
    if "adapter_bytes" in facts:
        words.append(f"adapter directory of {facts['adapter_bytes'] / 1024:,.0f} kB")
    console.print(", ".join(words) + ".")


def plain(cell: object) -> str:
    """Returns the text of a cell so that rich shows it unchanged."""
    from rich.markup import escape

    return escape(str(cell))
