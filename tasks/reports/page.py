"""The page of a run's report: one HTML file without scripts that loads no other file.

`RunReport` holds its contents, `write_report` writes it. All text is escaped, and pictures are part
of the page as data. A Content-Security-Policy forbids the page to load or run anything.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.files import write_text

from ..core.errors import Problem
from ..core.findings import Finding
from ..core.metrics import Metric
from ..core.results import Figure, Scores, Table
from .charts import learning_curves
from .tables import group_table, metric_named, metric_rows

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
REASONS = 12  # the largest number of reasons that are listed for the skipped rows of a split


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The contents of a report.

    Attributes:
        title: the name of the run.
        task: the name of the task, as in `task: NAME`.
        metric: the name of the deciding metric; in `history` it has the prefix `eval_`.
        scores: the scores by split; the split of the headline figure ("test") is first.
        before: the scores of that split before training.
        summary: sentences below the title.
        facts: the most important figures (trained share, size, time), label -> text.
        figures: pictures and tables of the task, in order.
        history: transformers' `log_history`: step, loss, learning_rate, eval_….
        best_step: the step whose checkpoint was kept.
        problems: by split, the rows that could not be used.
        findings: what is suspicious about the data.
        environment: machine and versions; a mapping in it is shown as a list.
        config: the resolved config as YAML.
        created: the time on the page; now by default.
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
    findings: Sequence[Finding] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    created: datetime | None = None


def write_report(path: Path, report: RunReport) -> None:
    """Writes the page, completely or not at all.

    Raises:
        ValueError: the first split has no score of the deciding metric.
    """
    write_text(path, render(report))


def render(report: RunReport) -> str:
    """Returns the page as text; raises as `write_report`."""
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
        problems={name: reasons(rows) for name, rows in report.problems.items() if rows},
        created=report.created or datetime.now().astimezone(),
    )


@functools.cache
def template(name: str) -> Template:
    """Returns a template of `templates/` with filters that show metrics, cells and pictures.

    It is compiled once: the dry pass of a run needs it, and its report.
    """
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
    """A reason for which rows could not be used.

    Attributes:
        text: the reason.
        count: how many rows it concerns.
        first: the numbers of the first few of them.
    """

    text: str
    count: int
    first: list[int]


def reasons(problems: Iterable[Problem]) -> list[Reason]:
    """Groups problems by reason, the most frequent first.

    Reasons after the first `REASONS` are counted together as "other reasons".
    """
    rows: dict[str, list[int]] = {}
    for problem in problems:
        rows.setdefault(problem.reason, []).append(problem.index)
    every = [Reason(text, len(rows[text]), sorted(rows[text])[:5]) for text in rows]
    every.sort(key=lambda reason: (-reason.count, reason.first))
    rest = sum(reason.count for reason in every[REASONS:])
    return every[:REASONS] + ([Reason("other reasons", rest, [])] if rest else [])


def value_text(metric: Metric | None) -> str:
    """Returns the value of a metric with its unit, or a dash if it has none."""
    if metric is None or not math.isfinite(metric.value):
        return "—"
    return f"{100 * metric.value:.1f} %" if metric.unit == "%" else cell_text(metric.value)


def interval_text(metric: Metric | None) -> str:
    """Returns the 95 % interval of a metric, or an empty text if it has none."""
    if metric is None or metric.low is None or metric.high is None:
        return ""
    if metric.unit == "%":
        return f"{100 * metric.low:.1f} – {100 * metric.high:.1f} %"
    return f"{cell_text(metric.low)} – {cell_text(metric.high)}"


def cell_text(value: Any) -> str:
    """Returns the text of a cell; real numbers have four digits, large ones no decimals."""
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
    """Returns the text of an end of a scale, which is a round number."""
    return f"{100 * metric.value:.4g} %" if metric.unit == "%" else cell_text(metric.value)


@dataclass(frozen=True)
class Picture:
    """A picture for an <img> element.

    Attributes:
        address: a data URL that holds the picture.
        width: CSS pixels.
        height: CSS pixels.
    """

    address: str
    width: int
    height: int


def picture(image: bytes) -> Picture:
    """Returns PNG data at its printed size, so that text is equally large at any resolution."""
    from PIL import Image

    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG", "WEBP")) as opened:
        dpi = float(opened.info.get("dpi", (96, 96))[0]) or 96.0
        width, height = opened.size
    address = "data:image/png;base64," + base64.b64encode(image).decode()
    return Picture(address, round(width * 96 / dpi), round(height * 96 / dpi))
