"""The report of `mmadapters bench`: Markdown, console tables, `bench.json` and the chart."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.files import write_bytes, write_text

from .checks import Check, checks
from .limits import TowerSize, first_blocks
from .results import Bench, BenchRow, Spread

if TYPE_CHECKING:
    from rich.console import Console

JSON, MARKDOWN, CHART = "bench.json", "bench.md", "bench.png"
MIB = 2**20


@dataclass(frozen=True)
class TextTable:
    """A table as text.

    Attributes:
        words: number of columns from the left that are not figures.
    """

    title: str
    head: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    words: int


def write_report(bench: Bench, folder: Path) -> None:
    """Writes `bench.json`, `bench.md` and `bench.png`; each file is complete or absent."""
    from ..core.plots import figure_png
    from .chart import chart

    folder.mkdir(parents=True, exist_ok=True)
    content = {**bench.to_dict(), "checks": [asdict(check) for check in checks(bench)]}
    write_text(folder / JSON, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / MARKDOWN, markdown(bench))
    write_bytes(folder / CHART, figure_png(chart(bench)))


def markdown(bench: Bench) -> str:
    """Formats the whole report as Markdown."""
    parts = ["# Speed, side by side", header(bench), f"![the same as a chart]({CHART})", CAPTION]
    parts += [_markdown_grid(grid) for grid in [checked(checks(bench)), *_missing(bench)]]
    for preset in bench.settings.encoders:
        parts.append(f"## {preset}\n\n{_described(bench.towers[preset])}")
        parts += [_markdown_grid(grid) for grid in grids(bench, preset)]
    return "\n\n".join(parts) + "\n"


CAPTION = (
    "Figures are medians with their quartiles in brackets; the cases of a table took turns. A "
    "ratio is the median of the ratios of each round, within one environment and mode. Kept is "
    "the memory that the forward pass of a step keeps for its backward pass, without parameters. "
    "Peak is the most memory that a step allocates, with the model's weights. The limit of a step"
    " is a number of frozen forward passes of the same rounds. If block k of L is the first "
    "adapted one, it is T(k) = 1 + s (1 + a) (L − 1 − k) / L, from the cached trunk s ((L − k) / "
    "L + (1 + a) (L − 1 − k) / L), and 3 for full fine-tuning. Parameters are the trained ones "
    "without the head. Cached states are on the device; a step does not read them from a disk."
)


def header(bench: Bench) -> str:
    """Formats the command, the machine and the versions."""
    machine, settings = bench.machine, bench.settings
    where = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"`{settings.command}` on {date.today()}; {where}; {machine['system']}; mmadapters "
        f"{machine['mmadapters']}; {settings.precision}, {settings.repeats} rounds."
    ]
    for name, packages in machine["environments"].items():
        numbers = ", ".join(f"{package} {number}" for package, number in packages.items())
        lines.append(f"- {name}: {numbers}")
    return "\n".join([lines[0], "", *lines[1:]])


def _described(towers: Sequence[TowerSize]) -> str:
    return "; ".join(
        f"{tower.name}: L = {tower.blocks}, N = {tower.tokens}, D = {tower.width}, "
        f"a = {tower.attention:.3f}, s = {tower.share:.3f}"
        for tower in towers
    )


def checked(results: Sequence[Check]) -> TextTable:
    """Makes the table of the targets and whether they hold."""
    verdicts = {True: "holds", False: "**missed**", None: "not measured"}
    lines = [
        (
            check.what,
            "" if check.value is None else f"{check.value:.3g}",
            f"{check.relation} {check.bound:.3g}",
            verdicts[check.holds],
        )
        for check in results
    ]
    return TextTable("Held to", ("what", "measured", "bound", "verdict"), lines, 1)


def _missing(bench: Bench) -> list[TextTable]:
    if not bench.missing:
        return []
    lines = [(entry.encoder, entry.what, entry.why) for entry in bench.missing]
    return [TextTable("Not measured", ("encoder", "what", "why"), lines, 3)]


def grids(bench: Bench, preset: str) -> list[TextTable]:
    """Makes the tables of one encoder: forward passes, training steps, switching and loading."""
    rows = [row for row in bench.rows if row.preset == preset]
    towers = bench.towers[preset]
    size = f"batch {bench.settings.train_batch}"
    tables = [
        TextTable(
            "Forward pass",
            ("what", "where", "mode", "batch", "parameters", "ms", "over bare"),
            [_forward_line(row) for row in rows if row.phase == "forward"],
            3,
        ),
        TextTable(
            f"Training step, {size}",
            (
                *("what", "where", "mode", "first block", "parameters", "ms", "over full"),
                *("kept, MiB", "peak, MiB", "limit, ms", "of the limit"),
            ),
            [_step_line(row, towers) for row in rows if row.phase == "step"],
            4,
        ),
        TextTable(
            "Switching between two adapters, loading one from disk",
            ("what", "where", "does", "ms", "over ours"),
            [_life_line(row) for row in rows if row.phase == "life"],
            3,
        ),
    ]
    return [grid for grid in tables if grid.lines]


def _forward_line(row: BenchRow) -> tuple[str, ...]:
    count = f"{row.parameters:,}" if row.parameters else ""
    times = (milliseconds(row.seconds), ratio(row.ratio))
    return (row.name, where(row), row.mode, str(row.batch), count, *times)


def _step_line(row: BenchRow, towers: Sequence[TowerSize]) -> tuple[str, ...]:
    steps = row.kind in ("step", "cached")
    name = row.name if steps else f"{row.name}, forward only"
    start = first_blocks(row.start, towers) if steps and row.method != "full" else ""
    count = f"{row.parameters:,}" if row.parameters else ""
    memory = tuple("" if b is None else f"{b / MIB:,.1f}" for b in (row.kept, row.peak))
    limit = "" if row.limit is None else significant(1e3 * row.limit)
    reached = "" if row.reached is None else f"{100 * row.reached.median:.0f} %"
    times = (milliseconds(row.seconds), ratio(row.ratio))
    return (name, where(row), row.mode, start, count, *times, *memory, limit, reached)


def _life_line(row: BenchRow) -> tuple[str, ...]:
    return (row.name, where(row), row.kind, milliseconds(row.seconds), ratio(row.ratio))


def where(row: BenchRow) -> str:
    """Returns the environment and the encoder of a row."""
    return f"{row.environment}: {row.encoder}"


def milliseconds(seconds: Spread) -> str:
    """Formats a median and its quartiles in milliseconds."""
    median, low, high = (
        significant(1e3 * value) for value in (seconds.median, seconds.low, seconds.high)
    )
    return f"{median} [{low}, {high}]"


def ratio(spread: Spread | None) -> str:
    """Formats a median ratio and its quartiles; empty without one."""
    if spread is None:
        return ""
    if spread.low == spread.high == 1:
        return "1"
    return f"{spread.median:.3f} [{spread.low:.3f}, {spread.high:.3f}]"


def significant(value: float) -> str:
    """Formats a number with three significant digits, or all digits before the point."""
    digits = 0 if value >= 100 else 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{digits}f}"


def _markdown_grid(grid: TextTable) -> str:
    rule = ["---"] * grid.words + ["---:"] * (len(grid.head) - grid.words)
    lines = [grid.head, tuple(rule), *grid.lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {grid.title}\n\n{table}"


def show(bench: Bench, console: Console) -> None:
    """Prints the tables of the report."""
    from ..reports.console import plain

    console.print(plain(header(bench)), soft_wrap=True, highlight=False)
    for preset in bench.settings.encoders:
        console.print(plain(f"\n{preset}: {_described(bench.towers[preset])}"), soft_wrap=True)
        for grid in grids(bench, preset):
            console.print(_rich(grid))
    for grid in [checked(checks(bench)), *_missing(bench)]:
        console.print(_rich(grid))


def _rich(grid: TextTable) -> Any:
    from rich.table import Table

    from ..reports.console import plain

    table = Table(*map(plain, grid.head), title=plain(grid.title), title_justify="left")
    for column in table.columns[grid.words :]:
        column.justify = "right"
    for line in grid.lines:
        table.add_row(*(plain(cell.replace("**", "")) for cell in line))
    return table
