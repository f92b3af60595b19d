"""The report of a run: one HTML file without scripts and without anything from elsewhere.

`Report` says what is in it, `write_report` makes the page. All text is escaped; pictures stand in
the page as data. The page says by a Content-Security-Policy that it loads and runs nothing.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.files import write_text

from ..core.errors import Problem
from ..core.metrics import Metric
from ..core.results import Figure, Scores, Table
from .charts import learning_curves
from .tables import group_table, metric_named, metric_rows

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
REASONS = 12  # kinds of skipped rows that are listed for a split


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows.

    Attributes:
        title: the run's name.
        task: as in `task: NAME`.
        metric: the name of the deciding metric; in `history` it is `eval_` and this name.
        scores: by split, the one that counts first ("test").
        before: the scores of that split before training.
        summary: sentences below the title.
        facts: label -> text of what is good to know at a glance (trained share, size, time).
        figures: pictures and tables of the task, in order.
        history: transformers' `log_history`: step, loss, learning_rate, eval_….
        best_step: the step whose checkpoint was kept.
        problems: by split, the rows that could not be used.
        environment: what the run ran on; a mapping in it is shown as a list.
        config: the resolved config as YAML.
        created: when; now by default.
    """

    title: str
    task: str
    metric: str
    scores: Mapping[str, Scores]
    before: Scores | None = None
    summary: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Sequence[Figure | Table] = ()
    history: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    problems: Mapping[str, Sequence[Problem]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    created: datetime | None = None


def write_report(path: Path, report: Report) -> None:
    """Writes the page, whole or not at all.

    Raises:
        ValueError: there are no scores, or none of the deciding metric.
    """
    write_text(path, render(report))


def render(report: Report) -> str:
    """The page as text; raises as `write_report`."""
    split, scores = next(iter(report.scores.items()), ("", Scores([])))
    headline = metric_named(scores, report.metric)
    if headline is None:
        raise ValueError(f"a report needs the deciding metric, {report.metric}, on a split")
    return template("report.html.j2").render(
        report=report,
        split=split,
        headline=headline,
        before=metric_named(report.before, report.metric),
        rows=metric_rows(report.metric, report.scores, report.before),
        groups=[group_table(column, scores, report.before) for column in scores.groups],
        charts=learning_curves(report.history, headline, report.best_step),
        extras=[*report.figures, *scores.tables],
        problems={name: reasons(found) for name, found in report.problems.items() if found},
        created=report.created or datetime.now().astimezone(),
    )


def template(name: str) -> Template:
    """A page of `templates/`, whose filters show metrics, cells and pictures."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        value=value_text, interval=interval_text, cell=cell_text, image=picture, end=end_text
    )
    environment.tests.update(
        numeric=lambda value: isinstance(value, (int, float, Metric)),
        picture=lambda value: isinstance(value, Figure),
    )
    return environment.get_template(name)


@dataclass(frozen=True)
class Reason:
    """Why rows could not be used, how many, and the numbers of the first of them."""

    text: str
    count: int
    first: list[int]


def reasons(problems: Iterable[Problem]) -> list[Reason]:
    """Problems by reason, the commonest first; all after `REASONS` kinds are one."""
    rows: dict[str, list[int]] = {}
    for problem in problems:
        rows.setdefault(problem.reason, []).append(problem.index)
    found = [Reason(text, len(rows[text]), sorted(rows[text])[:5]) for text in rows]
    found.sort(key=lambda reason: (-reason.count, reason.first))
    rest = sum(reason.count for reason in found[REASONS:])
    return found[:REASONS] + ([Reason("other reasons", rest, [])] if rest else [])


def value_text(metric: Metric | None) -> str:
    """A metric's value with its unit."""
    if metric is None or not math.isfinite(metric.value):
        return "—"
    return f"{100 * metric.value:.1f} %" if metric.unit == "%" else cell_text(metric.value)


def interval_text(metric: Metric | None) -> str:
    """A metric's 95 % interval, empty where it has none."""
    if metric is None or metric.low is None or metric.high is None:
        return ""
    if metric.unit == "%":
        return f"{100 * metric.low:.1f} – {100 * metric.high:.1f} %"
    return f"{cell_text(metric.low)} – {cell_text(metric.high)}"


def cell_text(value: Any) -> str:
    """A cell of a table as text: numbers with four figures at most, and none that look exact."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Metric):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(cell_text(part) for part in value)
    return str(value)


def end_text(metric: Metric) -> str:
    """An end of a scale, which is a round number."""
    return f"{100 * metric.value:.4g} %" if metric.unit == "%" else cell_text(metric.value)


@dataclass(frozen=True)
class Picture:
    """A picture as an <img> shows it: `address` holds its data; sizes are in CSS pixels."""

    address: str
    width: int
    height: int


def picture(image: bytes) -> Picture:
    """PNG data at its printed size, so that text has one size in pictures of any resolution."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        dpi = float(opened.info.get("dpi", (96, 96))[0]) or 96.0
        width, height = opened.size
    address = "data:image/png;base64," + base64.b64encode(image).decode()
    return Picture(address, round(width * 96 / dpi), round(height * 96 / dpi))
