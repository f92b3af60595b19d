"""Shows the matrices of continual learning in `report.html` and on the console."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import yaml

from mmadapters.files import write_text

from ...core.plots import figure_png, heat_maps
from ...core.results import Figure, Table
from ...reports.console import plain
from ...reports.page import template, value_text
from ..folder import REPORT
from .results import Continual, LearningSequence, Routing

if TYPE_CHECKING:
    from rich.console import Console

ADAPTERS, FULL = "an adapter for each", "sequential full fine-tuning"


def sequences(done: Continual) -> dict[str, LearningSequence]:
    """Returns the measured ways of learning, by title."""
    return {ADAPTERS: done.adapters, **({FULL: done.full} if done.full is not None else {})}


def write_continual_report(done: Continual, environment: Mapping[str, Any]) -> None:
    """Writes `report.html`, which links to the reports of the jobs and to nothing else.

    Args:
        environment: as in `metrics.json`.
    """
    worst = {title: max(s.forgetting.values()) for title, s in sequences(done).items()}
    page = template("continual.html.j2").render(
        title=done.config.name,
        headline=points(worst[ADAPTERS]),
        contrast=points(worst[FULL]) if FULL in worst else "",
        summary=_summary(done),
        picture=_picture(done),
        tables=[_ends(title, sequence) for title, sequence in sequences(done).items()],
        routing=_routing(done.routing),
        reports=_reports(done),
        environment=environment,
        config=yaml.safe_dump(done.config.to_save(), sort_keys=False),
        created=datetime.now().astimezone(),
    )
    write_text(done.folder / REPORT, page)


def _summary(done: Continual) -> list[str]:
    names = ", ".join(done.adapters.jobs)
    adapters = done.adapters
    sentences = [f"{done.jobs[0].backbone.name} learned {names}, in this order."]
    if all(adapters.unchanged.values()):
        sentences.append(
            "With adapters, every output on earlier test splits is bit for bit unchanged."
        )
    if adapters.encoder_unchanged:
        sentences.append("So is every weight of the encoder.")
    return sentences


def _picture(done: Continual) -> Figure:
    maps = {
        title: [[None if c is None else c.metric for c in row] for row in sequence.cells]
        for title, sequence in sequences(done).items()
    }
    figures = ", ".join(
        f"{name}: {metric.name}"
        for name, metric in zip(done.adapters.jobs, done.adapters.last, strict=True)
    )
    image = figure_png(heat_maps(maps, rows="after", columns=done.adapters.jobs))
    return Figure("Every job after every step", image, f"On test splits, in %. {figures}.")


def _ends(title: str, sequence: LearningSequence) -> Table:
    """Returns a table of the score of each job after its own step and after the last one."""
    rows: list[tuple[Any, ...]] = []
    for place, name in enumerate(sequence.jobs):
        first, last = sequence.history(place)[0].metric, sequence.history(place)[-1].metric
        forgotten = points(sequence.forgetting[name]) if name in sequence.forgetting else "—"
        same = sequence.unchanged.get(name, "—")
        rows.append((name, first.name, first, last, forgotten, same))
    words = [f"Backward transfer {points(sequence.backward_transfer)}"]
    if sequence.average is not None:
        words.insert(0, f"Average after the last step {100 * sequence.average:.1f} %")
    return Table(
        title,
        ("job", "metric", "after its own step", "after the last", "forgetting", "same bits"),
        rows,
        f"{'; '.join(words)}. Forgetting: the best score of earlier steps minus the last one.",
    )


def _routing(routing: Routing | str | None) -> list[Table] | str | None:
    if not isinstance(routing, Routing):
        return routing
    rows = [
        (
            name,
            *(f"{100 * share:.1f} %" for share in shares),
            f"{100 * told:.1f} %",
            f"{100 * routed:.1f} %",
        )
        for name, shares, told, routed in zip(
            routing.jobs, routing.shares, routing.told, routing.routed, strict=True
        )
    ]
    return [
        Table(
            "Where test pictures go",
            ("pictures of", *(f"to {name}" for name in routing.jobs), "job told", "job found"),
            rows,
            f"To the nearest of {sum(routing.means)} class means in the space of the frozen "
            f"encoder; chance is {100 / len(routing.jobs):.0f} %. A picture that goes to a wrong "
            "job counts as 0.",
        )
    ]


def _reports(done: Continual) -> list[str]:
    paths = [f"{name}/{REPORT}" for name in done.adapters.jobs]
    return paths + ([f"full/{name}/{REPORT}" for name in done.full.jobs] if done.full else [])


def points(difference: float) -> str:
    """Returns a difference of scores as text, times 100: percentage points for shares.

    Only a difference of exactly 0 is shown as 0.0.
    """
    text = f"{100 * difference:.1f}"
    if difference and text in ("0.0", "-0.0"):
        text = f"{100 * difference:.1g}"
    return text


def show(done: Continual, console: Console) -> None:
    """Prints the matrices, forgetting, routing and the path of the report."""
    from rich.table import Table as Grid

    for title, sequence in sequences(done).items():
        grid = Grid("", title=f"Test splits, {title}", title_justify="left")
        for name, metric in zip(sequence.jobs, sequence.last, strict=True):
            grid.add_column(f"{plain(name)}\n{metric.name}", justify="right", no_wrap=True)
        for name, row in zip(sequence.jobs, sequence.cells, strict=True):
            cells = ["" if cell is None else value_text(cell.metric) for cell in row]
            grid.add_row(f"after {plain(name)}", *cells)
        grid.add_section()
        forgotten = sequence.forgetting
        grid.add_row(
            "forgetting", *(points(forgotten[n]) if n in forgotten else "" for n in sequence.jobs)
        )
        console.print(grid)
        same = sum(sequence.unchanged.values())
        average = "" if sequence.average is None else f"average {100 * sequence.average:.1f} %, "
        console.print(
            f"{average}backward transfer {points(sequence.backward_transfer)}; outputs bit for bit "
            f"the same for {same} of {len(sequence.unchanged)} earlier jobs; "
            f"{sequence.seconds:.0f} s",
            soft_wrap=True,
        )
    _show_routing(done.routing, console)
    console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)


def _show_routing(routing: Routing | str | None, console: Console) -> None:
    from rich.table import Table as Grid

    if isinstance(routing, str):
        console.print(f"No routing: {plain(routing)}", soft_wrap=True)
    if not isinstance(routing, Routing):
        return
    columns = ("", "finds its job", "score, job told", "score, job found")
    grid = Grid(*columns, title="Without a task label", title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, told, routed in zip(routing.jobs, routing.told, routing.routed, strict=True):
        share = routing.accuracy[name]
        grid.add_row(plain(name), *(f"{100 * value:.1f} %" for value in (share, told, routed)))
    console.print(grid)
