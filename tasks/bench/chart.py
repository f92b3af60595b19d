"""The chart of a run: training steps with their limits, forward passes relative to the bare one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..core.plots import LIGHT
from .limits import first_blocks
from .results import Bench, BenchRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LINE = 12.0, 0.24
OURS, CACHED, PEER = LIGHT.accent, "#1a7f37", LIGHT.muted
BATCHES = (LIGHT.accent, LIGHT.second, "#1a7f37", "#7c3aed", LIGHT.muted)


def chart(bench: Bench) -> Figure:
    """Draws a line of two panels for each encoder: training steps and forward passes."""
    from matplotlib.figure import Figure as Canvas

    panels = [(preset, _steps(bench, preset), _forwards(bench, preset)) for preset in bench.towers]
    heights = [1.0 + LINE * max(len(steps), len(names)) for _, steps, names in panels]
    figure = Canvas(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    places = figure.subplots(
        len(panels), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 1)
    )
    for (preset, steps, forwards), (left, right) in zip(panels, places, strict=True):
        _draw_steps(left, preset, steps, bench)
        _draw_forwards(right, forwards, bench.settings.batches)
    return figure


def _steps(bench: Bench, preset: str) -> list[BenchRow]:
    return [
        row
        for row in bench.rows
        if row.preset == preset and row.kind in ("step", "cached") and row.ratio is not None
    ]


def _forwards(bench: Bench, preset: str) -> dict[str, list[BenchRow]]:
    """Groups the rows of all batch sizes by the label of their line."""
    lines: dict[str, list[BenchRow]] = {}
    for row in bench.rows:
        if row.preset == preset and row.phase == "forward" and row.method != "bare":
            lines.setdefault(_label(row), []).append(row)
    return lines


def _label(row: BenchRow) -> str:
    mode = "" if row.mode == "eager" else f", {row.mode}"
    place = "" if row.environment == "here" else f" ({row.environment})"
    return f"{row.name}{mode}{place}"


def _draw_steps(axes: Axes, preset: str, rows: Sequence[BenchRow], bench: Bench) -> None:
    names = []
    for place, row in enumerate(rows):
        assert row.ratio is not None
        colour = CACHED if row.kind == "cached" else OURS if row.library == "mmadapters" else PEER
        axes.barh(place, row.ratio.median, height=0.66, color=colour, alpha=0.85)
        _whisker(axes, place, row.ratio.low, row.ratio.high)
        if row.reached is not None:
            limit = row.ratio.median * row.reached.median
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color=LIGHT.second, lw=2)
        block = (
            ""
            if row.method == "full"
            else f", from {first_blocks(row.start, bench.towers[preset])}"
        )
        names.append(_label(row).replace(row.name, f"{row.name}{block}", 1))
    batch = bench.settings.train_batch
    _finish(axes, names, f"{preset}: training step over full fine-tuning, batch {batch}")
    axes.set_xlim(left=0)
    axes.set_xlabel("orange: the limit", fontsize=8, color=LIGHT.second)


def _draw_forwards(axes: Axes, lines: dict[str, list[BenchRow]], batches: Sequence[int]) -> None:
    for place, rows in enumerate(lines.values()):
        for row in rows:
            assert row.ratio is not None
            at = batches.index(row.batch)
            colour, shift = BATCHES[at % len(BATCHES)], 0.18 * (at - (len(batches) - 1) / 2)
            low, value, high = (
                100 * (end - 1) for end in (row.ratio.low, row.ratio.median, row.ratio.high)
            )
            _whisker(axes, place + shift, low, high, colour)
            axes.plot([value], [place + shift], "o", ms=4.5, color=colour)
    axes.axvline(0, color=LIGHT.ink, lw=0.8, zorder=0)
    _finish(axes, list(lines), "forward pass over the bare encoder, %")
    for at, batch in enumerate(batches):
        axes.plot([], [], "o", ms=4.5, color=BATCHES[at % len(BATCHES)], label=f"batch {batch}")
    axes.legend(fontsize=8, frameon=False, loc="best")


def _whisker(axes: Any, place: float, low: float, high: float, colour: str = LIGHT.ink) -> None:
    axes.plot([low, high], [place, place], color=colour, lw=1.2, solid_capstyle="butt")


def _finish(axes: Axes, names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=9, color=LIGHT.ink, parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT.line)
    axes.tick_params(colors=LIGHT.muted, labelsize=8, length=0)
    axes.grid(axis="x", color=LIGHT.line, lw=0.8)
    axes.set_axisbelow(True)
