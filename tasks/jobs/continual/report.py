"""What `mmadapters continual` shows: the matrices in `report.html` and on the console."""

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
from ..run import REPORT
from .router import Routing

if TYPE_CHECKING:
    from rich.console import Console

    from .run import Chain, Continual

ADAPTERS, FULL = "an adapter for each", "sequential full fine-tuning"


def chains(done: Continual) -> dict[str, Chain]:
    """The ways of learning that were measured, by title."""
    return {ADAPTERS: done.adapters, **({FULL: done.full} if done.full is not None else {})}


def write_continual_report(done: Continual, environment: Mapping[str, Any]) -> None:
    """Writes `report.html`, which refers to those of the jobs' own runs and to nothing else."""
    worst = {title: max(chain.forgetting.values()) for title, chain in chains(done).items()}
    page = template("continual.html.j2").render(
        title=done.config.name,
        headline=points(worst[ADAPTERS]),
        contrast=points(worst[FULL]) if FULL in worst else "",
        summary=_summary(done),
        picture=_picture(done),
        tables=[_ends(title, chain) for title, chain in chains(done).items()],
        routing=_routing(done.routing),
        reports=_reports(done),
        environment=environment,
        config=yaml.safe_dump(done.config.model_dump(mode="json"), sort_keys=False),
        created=datetime.now().astimezone(),
    )
    write_text(done.folder / REPORT, page)


def _summary(done: Continual) -> list[str]:
    names = ", ".join(done.adapters.jobs)
    kept = done.adapters
    told = [f"{done.jobs[0].backbone.name} learned {names}, in this order."]
    if all(kept.unchanged.values()):
        told.append(
            "With adapters, every output on earlier test splits is bit for bit what it was."
        )
    if kept.encoder_unchanged:
        told.append("So is every weight of the encoder.")
    return told


def _picture(done: Continual) -> Figure:
    maps = {
        title: [[None if c is None else c.metric for c in row] for row in chain.cells]
        for title, chain in chains(done).items()
    }
    figures = ", ".join(
        f"{name}: {metric.name}"
        for name, metric in zip(done.adapters.jobs, done.adapters.last, strict=True)
    )
    image = figure_png(heat_maps(maps, rows="after", columns=done.adapters.jobs))
    return Figure("Every job after every step", image, f"On test splits, in %. {figures}.")


def _ends(title: str, chain: Chain) -> Table:
    """What each job was worth at first and is worth at the end."""
    rows: list[tuple[Any, ...]] = []
    for place, name in enumerate(chain.jobs):
        first, last = chain.history(place)[0].metric, chain.history(place)[-1].metric
        forgotten = points(chain.forgetting[name]) if name in chain.forgetting else "—"
        same = chain.unchanged.get(name, "—")
        rows.append((name, first.name, first, last, forgotten, same))
    words = [f"Backward transfer {points(chain.backward_transfer)}"]
    if chain.average is not None:
        words.insert(0, f"Average after the last step {100 * chain.average:.1f} %")
    return Table(
        title,
        ("job", "metric", "after its own step", "after the last", "forgetting", "same bits"),
        rows,
        f"{'; '.join(words)}. Forgetting: the best score of earlier steps less the last one.",
    )


def _routing(found: Routing | str | None) -> list[Table] | str | None:
    if not isinstance(found, Routing):
        return found
    rows = [
        (
            name,
            *(f"{100 * share:.1f} %" for share in shares),
            f"{100 * told:.1f} %",
            f"{100 * end:.1f} %",
        )
        for name, shares, told, end in zip(
            found.jobs, found.shares, found.told, found.routed, strict=True
        )
    ]
    return [
        Table(
            "Where test pictures go",
            ("of", *(f"to {name}" for name in found.jobs), "job told", "job found"),
            rows,
            f"To the nearest of {sum(found.means)} class means in the space of the frozen encoder; "
            f"chance is {100 / len(found.jobs):.0f} %. A picture that goes astray earns nothing.",
        )
    ]


def _reports(done: Continual) -> list[str]:
    own = [f"{name}/{REPORT}" for name in done.adapters.jobs]
    return own + ([f"full/{name}/{REPORT}" for name in done.full.jobs] if done.full else [])


def points(difference: float) -> str:
    """A difference of scores, in points of a percentage where it is one of shares; exactly 0 alone
    is shown as 0.0."""
    text = f"{100 * difference:.1f}"
    if difference and text in ("0.0", "-0.0"):
        text = f"{100 * difference:.1g}"
    return text


def show(done: Continual, console: Console) -> None:
    """The matrices, forgetting and routing, and where the report is."""
    from rich.table import Table as Grid

    for title, chain in chains(done).items():
        grid = Grid("", title=f"Test splits, {title}", title_justify="left")
        for name, metric in zip(chain.jobs, chain.last, strict=True):
            grid.add_column(f"{plain(name)}\n{metric.name}", justify="right", no_wrap=True)
        for name, row in zip(chain.jobs, chain.cells, strict=True):
            cells = ["" if cell is None else value_text(cell.metric) for cell in row]
            grid.add_row(f"after {plain(name)}", *cells)
        grid.add_section()
        forgotten = chain.forgetting
        grid.add_row(
            "forgetting", *(points(forgotten[n]) if n in forgotten else "" for n in chain.jobs)
        )
        console.print(grid)
        same = sum(chain.unchanged.values())
        average = "" if chain.average is None else f"average {100 * chain.average:.1f} %, "
        console.print(
            f"{average}backward transfer {points(chain.backward_transfer)}; outputs bit for bit "
            f"the same for {same} of {len(chain.unchanged)} earlier jobs; {chain.seconds:.0f} s",
            soft_wrap=True,
        )
    _show_routing(done.routing, console)
    console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)


def _show_routing(found: Routing | str | None, console: Console) -> None:
    from rich.table import Table as Grid

    if isinstance(found, str):
        console.print(f"No routing: {plain(found)}", soft_wrap=True)
    if not isinstance(found, Routing):
        return
    columns = ("", "finds its job", "score, job told", "score, job found")
    grid = Grid(*columns, title="Without a task label", title_justify="left")
    for column in grid.columns[1:]:
        column.justify = "right"
    for name, told, end in zip(found.jobs, found.told, found.routed, strict=True):
        share = found.accuracy[name]
        grid.add_row(plain(name), *(f"{100 * value:.1f} %" for value in (share, told, end)))
    console.print(grid)
