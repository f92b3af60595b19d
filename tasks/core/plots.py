"""Charts and picture grids of one style, as PNG data or as SVG in the colours of its page.

matplotlib is imported when something is drawn, without pyplot: no state is kept, no window opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import io
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Colours:
    """The colours of a chart, as #rrggbb.

    Attributes:
        ink: of titles and names.
        muted: of the labels of axes.
        line: of grid lines and axes.
        accent: of curves and bars.
        second: of points and values that stand out.
    """

    ink: str
    muted: str
    line: str
    accent: str
    second: str


LIGHT = Colours(ink="#1c2330", muted="#5b6576", line="#dfe3ea", accent="#2f62d9", second="#c2410c")
# They stand for the custom properties of the page that an SVG will be part of.
PAGE = Colours(ink="#010101", muted="#020202", line="#030303", accent="#040404", second="#050505")


def figure_png(figure: Figure, *, dpi: int = 160) -> bytes:
    """Returns a matplotlib figure as PNG data, on white."""
    data = io.BytesIO()
    with _literal_text(figure):
        figure.savefig(data, format="png", dpi=dpi, facecolor="white")
    return data.getvalue()


@contextlib.contextmanager
def _literal_text(figure: Figure) -> Iterator[None]:
    """Inside the block every text of a figure is drawn as it is written.

    Labels and captions come from data, in which dollar signs make no formula.
    """
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def figure_svg(figure: Figure, *, title: str) -> str:
    """Returns a matplotlib figure as an `<svg>` element of a page.

    Text stays text, and the colours of `PAGE` become the page's `--ink`, `--muted`, `--line`,
    `--accent` and `--second`.

    Args:
        figure: drawn in the colours of `PAGE`.
        title: a description of the picture, for readers who do not see it.
    """
    import matplotlib

    data = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title}
    with matplotlib.rc_context(settings), _literal_text(figure):
        figure.savefig(data, format="svg", transparent=True)
    written = data.getvalue()
    box = re.search(r'viewBox="([^"]*)"', written)
    assert box is not None
    inside = written[written.index(">", written.index("<svg")) + 1 :]
    for element in ("metadata", "style"):
        inside = re.sub(rf"<{element}.*?</{element}>", "", inside, flags=re.DOTALL)
    for name, colour in vars(PAGE).items():
        inside = re.sub(rf"(fill|stroke): {colour}\b", rf"\1: var(--{name})", inside)
    # Several charts share a page, and their ids must not meet.
    prefix = "c" + hashlib.sha256((title + inside).encode()).hexdigest()[:8]
    inside = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", inside)
    label = html.escape(title, quote=True)
    return f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{label}">{inside}'


def curve(
    x: Sequence[float],
    y: Sequence[float],
    *,
    title: str,
    xlabel: str = "step",
    percent: bool = False,
    mark: tuple[float, float, str] | None = None,
    colours: Colours = LIGHT,
) -> Figure:
    """Draws a line over steps. A y that is NaN leaves a gap.

    Args:
        x: steps.
        y: a value for each step.
        title: of the chart.
        xlabel: of the x axis.
        percent: whether y are shares, which are shown as percentages.
        mark: x, y and label of a point that is pointed out.
        colours: of the chart.
    """
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(4.0, 2.5), layout="constrained")
    axes = figure.subplots()
    factor = 100 if percent else 1
    values = factor * np.asarray(y, dtype=float)
    axes.plot(x, values, color=colours.accent, lw=1.6, marker="o" if len(y) <= 20 else "", ms=3)
    if mark is not None:
        at, value, label = mark
        axes.axvline(at, color=colours.second, lw=0.8, ls=(0, (3, 3)), zorder=0)
        axes.plot([at], [factor * value], "o", ms=8, mfc="none", mec=colours.second, mew=1.8)
        axes.set_title(label, loc="right", fontsize=9, color=colours.second, parse_math=False)
    name = title + (", %" if percent else "")
    axes.set_title(name, loc="left", fontsize=10, color=colours.ink, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9, color=colours.muted)
    axes.locator_params(axis="x", integer=True)
    _style(axes, colours)
    return figure


def bars_with_intervals(
    metrics: Mapping[str, Metric], *, title: str, colours: Colours = LIGHT
) -> Figure:
    """Draws a bar for each metric, from top to bottom, with its 95 % interval and its count.

    Args:
        metrics: by the name that is written next to the bar.
        title: of the chart.
        colours: of the chart.
    """
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(7.0, 0.8 + 0.3 * len(metrics)), layout="constrained")
    axes = figure.subplots()
    shares = all(metric.unit == "%" for metric in metrics.values())
    factor = 100 if shares else 1
    for place, metric in enumerate(metrics.values()):
        axes.barh(place, factor * metric.value, height=0.62, color=colours.accent, alpha=0.85)
        if metric.low is not None and metric.high is not None:
            ends = [factor * metric.low, factor * metric.high]
            axes.plot(ends, [place, place], color=colours.ink, lw=1.5, solid_capstyle="butt")
    names = [f"{name} (n = {metric.count:,})" for name, metric in metrics.items()]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=min(0.0, *axes.get_xlim()))
    axes.set_xlabel(title + (", %" if shares else ""), fontsize=9, color=colours.muted)
    _style(axes, colours)
    axes.grid(axis="x", color=colours.line, lw=0.8)
    axes.grid(visible=False, axis="y")
    return figure


def grid(
    images: Sequence[Any],
    titles: Sequence[str],
    columns: int,
    *,
    right: Sequence[bool | None] | None = None,
) -> Figure:
    """Draws pictures in rows, each with its words below it.

    Args:
        images: as `imshow` takes them: PIL images, (H, W, 3) or (H, W) arrays.
        titles: the words of each picture. Line breaks are kept, and longer lines are wrapped; at
            most six lines are shown.
        columns: the most pictures of a row.
        right: the frame of each picture: green (True), red (False) or none (None).
    """
    from matplotlib.figure import Figure as Canvas

    columns = max(min(columns, len(images)), 1)
    rows = max(-(-len(images) // columns), 1)
    words = [_wrapped(title, 26) for title in titles]
    tall = max((text.count("\n") + 1 for text in words if text), default=0)
    figure = Canvas(figsize=(2.1 * columns, (2.1 + 0.16 * tall) * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten()
    verdicts = right if right is not None else [None] * len(images)
    for axes in places[len(images) :]:
        axes.set_axis_off()
    for axes, image, text, verdict in zip(places, images, words, verdicts, strict=False):
        small = max(np.asarray(image).shape[:2]) < 128
        axes.imshow(image, cmap="gray", interpolation="nearest" if small else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set(
            visible=verdict is not None, color=RIGHT if verdict else WRONG, linewidth=2.5
        )
        axes.set_xlabel(text, fontsize=8, color=LIGHT.ink, parse_math=False)
    return figure


def heat_maps(
    maps: Mapping[str, Sequence[Sequence[Metric | None]]], *, rows: str, columns: Sequence[str]
) -> Figure:
    """Draws square tables of metrics side by side. A darker cell is better.

    Shares are shaded from 0 to 1, other metrics by the greatest value in their column.

    Args:
        maps: title -> rows of cells; None leaves a cell empty.
        rows: the word before a column's name that makes the name of a row ("after").
        columns: names of the columns, and with `rows` before them of the rows.
    """
    from matplotlib.figure import Figure as Canvas

    wide = max(3.2, 0.9 * len(columns) + 1.4)
    figure = Canvas(figsize=(wide * len(maps), 0.62 * wide + 0.5), layout="constrained")
    places = figure.subplots(1, len(maps), squeeze=False).flatten()
    top = [
        max((abs(c.value) for m in maps.values() for row in m if (c := row[place])), default=1.0)
        for place in range(len(columns))
    ]
    for axes, (title, cells) in zip(places, maps.items(), strict=True):
        shades = [[_shade(cell, top[x]) for x, cell in enumerate(row)] for row in cells]
        texts = [
            ["" if c is None else str(c).partition(" [")[0].removesuffix(" %") for c in row]
            for row in cells
        ]
        _cells(axes, shades, texts, title, columns=columns, rows=[f"{rows} {n}" for n in columns])
    return figure


def fusion_map(sites: Mapping[str, Sequence[float]], *, members: Sequence[str]) -> Figure:
    """Draws the attention of an AdapterFusion: a row for each site, a column for each member.

    Args:
        sites: site -> the mean weight (0 to 1) of each member, NaN if it has no adapter there.
        members: names of the adapters that are fused.
    """
    from matplotlib.figure import Figure as Canvas

    size = (1.1 * len(members) + 2.6, 0.8 + 0.26 * len(sites))
    figure = Canvas(figsize=size, layout="constrained")
    axes = figure.subplots()
    weights = list(sites.values())
    texts = [["" if math.isnan(w) else f"{100 * w:.0f}" for w in row] for row in weights]
    _cells(axes, weights, texts, "attention, %", columns=members, rows=list(sites))
    return figure


def _cells(
    axes: Any,
    shades: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    title: str,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
) -> None:
    """Draws a table as shaded cells with texts. A shade of 1 is the darkest, and NaN is white."""
    table = np.array(shades, dtype=float)
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            ink = "white" if table[y, x] > 0.7 else LIGHT.ink
            axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=10)
    axes.set_title(title, loc="left", fontsize=10, color=LIGHT.ink, parse_math=False)
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(rows)), rows, parse_math=False)
    axes.tick_params(colors=LIGHT.muted, labelsize=9, length=0)
    axes.spines[:].set_visible(False)


def _shade(metric: Metric | None, top: float) -> float:
    """Returns a shade from 0 to 1, 1 for the best value; NaN without a metric."""
    if metric is None:
        return math.nan
    share = metric.value if metric.unit == "%" else abs(metric.value) / (top or 1.0)
    share = min(max(share, 0.0), 1.0)
    return share if metric.greater_is_better else 1 - share


def _wrapped(text: str, width: int) -> str:
    """Returns the text in lines of at most `width` letters, six lines at most."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]]
    return "\n".join([*lines[:5], f"{lines[5][: width - 2]} …"] if len(lines) > 6 else lines)


def _style(axes: Axes, colours: Colours) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.line)
    axes.tick_params(colors=colours.muted, labelsize=9, length=0)
    axes.grid(axis="y", color=colours.line, lw=0.8)
    axes.set_axisbelow(True)
