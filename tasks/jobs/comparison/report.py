"""Shows a comparison: a table as Markdown, a chart, `report.html` and the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import yaml

from mmadapters.files import write_bytes, write_text

from ...core.metrics import Metric
from ...core.plots import LIGHT, figure_png
from ...core.results import Figure, Table
from ...reports.console import plain
from ...reports.page import template
from ..folder import REPORT
from .results import Comparison, Cost, Duel

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas
    from rich.console import Console

MARKDOWN, CHART = "comparison.md", "comparison.png"
COLUMNS = ("method", "metric", "bottleneck", "difference", "trained", "step, ms", "MiB", "verdict")


def write_comparison_report(done: Comparison, environment: Mapping[str, Any]) -> None:
    """Writes `comparison.md`, `comparison.png` and `report.html`.

    Args:
        environment: as in `comparison.json`.
    """
    image = figure_png(chart(done.duels))
    table = Table(metric_title(done), COLUMNS, rows(done), caption(done))
    page = template("comparison.html.j2").render(
        title=done.config.name,
        headline=f"{sum(d.verdict == 'better' for d in done.duels)} of {len(done.duels)}",
        summary=summary(done),
        picture=Figure("Methods and bottlenecks of their size", image, CHARTED),
        comparison=table,
        environment=environment,
        config=yaml.safe_dump(done.config.to_save(), sort_keys=False),
        created=datetime.now().astimezone(),
    )
    write_bytes(done.folder / CHART, image)
    write_text(done.folder / MARKDOWN, markdown(done))
    write_text(done.folder / REPORT, page)


CAPTION = (
    "Means of {} seeds with 95 % intervals over test examples and seeds. The plain bottleneck "
    "trains as many parameters; both counts include the head. Its figures stand after the slash. "
    "MiB: tensors that the forward pass keeps for the backward pass, without parameters{}. Steps "
    "of both are timed in turns."
)
CHARTED = (
    "Left: the metric of a method (filled) and of the bottleneck of its size (hollow). Right: "
    "their difference. Bars are 95 % intervals over test examples and seeds."
)


def metric_title(done: Comparison) -> str:
    """Returns the title of the table: the metric, the job and the encoder."""
    metric = done.duels[0].method.metric
    better = "higher" if metric.greater_is_better else "lower"
    return f"{metric.name} ({better} is better), {done.config.job} on {done.backbone}"


def caption(done: Comparison) -> str:
    """Returns the caption of the table, which explains its columns."""
    peak = any(duel.cost.peak_bytes is not None for duel in done.duels)
    more = "; in brackets the peak memory of a step, with the model" if peak else ""
    return CAPTION.format(len(done.config.seeds), more)


def rows(done: Comparison) -> list[tuple[str, ...]]:
    """Returns the table as text: methods by their difference, the best first, then references."""
    lines: list[tuple[str, ...]] = []
    for duel in sorted(done.duels, key=_gain, reverse=True):
        mine, other = duel.method, duel.bottleneck
        sizes = f"{mine.parameters:,} / {other.parameters:,}"
        both = (duel.cost, duel.bottleneck_cost)
        lines.append(
            (
                *(mine.name, str(mine.metric), str(other.metric), _signed(duel.difference)),
                *(sizes, _joined(_milliseconds, *both), _joined(_memory, *both), duel.verdict),
            )
        )
    for entrant, cost in done.references:
        lines.append(
            (
                *(entrant.name, str(entrant.metric), "", "", f"{entrant.parameters:,}"),
                *(_milliseconds(cost), _memory(cost), "reference"),
            )
        )
    return lines


def summary(done: Comparison) -> list[str]:
    """Returns sentences that say which methods beat the plain bottleneck and which do not."""
    by: dict[str, list[str]] = {}
    for duel in done.duels:
        by.setdefault(duel.verdict, []).append(duel.method.name)
    sentences = []
    if "better" in by:
        sentences.append(
            f"Better than the plain bottleneck of its size: {', '.join(by['better'])}."
        )
    else:
        sentences.append("No method is shown to be better than the plain bottleneck of its size.")
    if "no difference" in by:
        sentences.append(
            f"Not shown to beat it, nor to lose to it: {', '.join(by['no difference'])}."
        )
    if "worse" in by:
        sentences.append(f"Worse than it: {', '.join(by['worse'])}.")
    return sentences


def markdown(done: Comparison) -> str:
    """Returns the table, its summary and its caption as Markdown."""
    lines = [f"**{metric_title(done)}**", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows(done)]
    return "\n".join([*lines, "", " ".join(summary(done)), "", caption(done), ""])


def chart(duels: Sequence[Duel]) -> Canvas:
    """Draws each method with the bottleneck of its size, and their difference, with intervals."""
    from matplotlib.figure import Figure as Canvas

    ordered = sorted(duels, key=_gain)
    figure = Canvas(figsize=(9.0, 1.3 + 0.42 * len(ordered)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    factor = 100 if ordered[0].method.metric.unit == "%" else 1
    for place, duel in enumerate(ordered):
        _whisker(left, place + 0.14, duel.method.metric, factor, LIGHT.accent, filled=True)
        _whisker(left, place - 0.14, duel.bottleneck.metric, factor, LIGHT.muted, filled=False)
        colour = {"better": "#1a7f37", "worse": "#cf222e"}.get(duel.verdict, LIGHT.muted)
        _whisker(right, place, duel.difference, factor, colour, filled=True)
    right.axvline(0, color=LIGHT.ink, lw=0.8, zorder=0)
    metric = ordered[0].method.metric
    unit = ", %" if factor == 100 else ""
    better = "→" if metric.greater_is_better else "←"
    left.set_yticks(range(len(ordered)), [d.method.name for d in ordered], parse_math=False)
    left.set_ylim(-0.6, len(ordered) - 0.4)
    left.set_title(f"{metric.name}{unit}", loc="left", fontsize=10, color=LIGHT.ink)
    right.set_title(f"difference, {better} is better", loc="left", fontsize=10, color=LIGHT.ink)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LIGHT.line)
        axes.tick_params(colors=LIGHT.muted, labelsize=9, length=0)
        axes.grid(axis="x", color=LIGHT.line, lw=0.8)
        axes.set_axisbelow(True)
    return figure


def _whisker(
    axes: Any, place: float, metric: Metric, factor: int, colour: str, *, filled: bool
) -> None:
    if metric.low is not None and metric.high is not None:
        ends = [factor * metric.low, factor * metric.high]
        axes.plot(ends, [place, place], color=colour, lw=1.6, solid_capstyle="butt")
    face = colour if filled else "white"
    axes.plot([factor * metric.value], [place], "o", ms=6, color=colour, mfc=face, mew=1.4)


def show(done: Comparison, console: Console) -> None:
    """Prints the table, its summary and the path of the report."""
    from rich.table import Table as Grid

    grid = Grid(*COLUMNS, title=plain(metric_title(done)), title_justify="left")
    for column in grid.columns[1:-1]:
        column.justify = "right"
    grid.columns[0].no_wrap = True
    for row in rows(done):
        grid.add_row(*map(plain, row))
    console.print(grid)
    for sentence in summary(done):
        console.print(plain(sentence), soft_wrap=True)
    console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)


def _gain(duel: Duel) -> float:
    metric = duel.difference
    return metric.value if metric.greater_is_better else -metric.value


def _signed(metric: Metric) -> str:
    factor = 100 if metric.unit == "%" else 1
    text = f"{factor * metric.value:+.1f}"
    if metric.low is not None and metric.high is not None:
        text += f" [{factor * metric.low:+.1f}, {factor * metric.high:+.1f}]"
    return text


def _joined(text: Callable[[Cost], str], cost: Cost, other: Cost) -> str:
    return f"{text(cost)} / {text(other)}"


def _milliseconds(cost: Cost) -> str:
    return f"{1000 * cost.step_seconds:,.1f}"


def _memory(cost: Cost) -> str:
    text = f"{cost.kept_bytes / 2**20:,.0f}"
    return text if cost.peak_bytes is None else f"{text} ({cost.peak_bytes / 2**20:,.0f})"
