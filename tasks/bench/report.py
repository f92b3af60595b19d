"""What `mmadapters bench` shows: tables as Markdown and on the console, and `bench.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.files import write_bytes, write_text

from .checks import Check, checks
from .limits import Tower, first_block
from .results import Row, Spread
from .run import Bench

if TYPE_CHECKING:
    from rich.console import Console

JSON, MARKDOWN, CHART = "bench.json", "bench.md", "bench.png"
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """A table as text. `words`: how many columns from the left are not figures."""

    title: str
    head: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]
    words: int


def write_report(bench: Bench, folder: Path) -> None:
    """Writes `bench.json`, `bench.md` and `bench.png`, each whole or not at all."""
    from ..core.plots import figure_png
    from .chart import chart

    folder.mkdir(parents=True, exist_ok=True)
    found = {**bench.to_dict(), "checks": [asdict(check) for check in checks(bench)]}
    write_text(folder / JSON, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / MARKDOWN, markdown(bench))
    write_bytes(folder / CHART, figure_png(chart(bench)))


def markdown(bench: Bench) -> str:
    """The whole report."""
    parts = ["# Speed, side by side", header(bench), f"![the same as a chart]({CHART})", CAPTION]
    parts += [_markdown_grid(grid) for grid in [checked(checks(bench)), *_missing(bench)]]
    for preset in bench.settings.encoders:
        parts.append(f"## {preset}\n\n{_described(bench.towers[preset])}")
        parts += [_markdown_grid(grid) for grid in grids(bench, preset)]
    return "\n\n".join(parts) + "\n"


CAPTION = (
    "Medians with their quartiles in brackets; the cases of a table took turns. Ratios are medians "
    "of those of each round, taken in one environment and mode. Kept: what a step's forward pass "
    "keeps for its backward pass, parameters left out; peak: the most that a step allocates, the "
    "model's weights included. The limit of a step is made of the frozen forward pass of the same "
    "rounds; of an encoder's first adapted block k of L, T(k) = 1 + s (1 + a) (L − 1 − k) / L "
    "forward passes, from the cached prefix s ((L − k) / L + (1 + a) (L − 1 − k) / L), 3 for full "
    "fine-tuning. Parameters are those that are trained, without the head. Cached states lie on "
    "the device; reading them from a disk is not in the step."
)


def header(bench: Bench) -> str:
    """The command, the machine and the versions."""
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


def _described(towers: Sequence[Tower]) -> str:
    return "; ".join(
        f"{tower.name}: L = {tower.blocks}, N = {tower.tokens}, D = {tower.width}, "
        f"a = {tower.attention:.3f}, s = {tower.share:.3f}"
        for tower in towers
    )


def checked(found: Sequence[Check]) -> Grid:
    """What the figures are held to, and whether they hold."""
    verdicts = {True: "holds", False: "**missed**", None: "not measured"}
    lines = [
        (
            check.what,
            "" if check.value is None else f"{check.value:.3g}",
            f"{check.relation} {check.bound:.3g}",
            verdicts[check.holds],
        )
        for check in found
    ]
    return Grid("Held to", ("what", "measured", "bound", "verdict"), lines, 1)


def _missing(bench: Bench) -> list[Grid]:
    if not bench.missing:
        return []
    lines = [(entry.encoder, entry.what, entry.why) for entry in bench.missing]
    return [Grid("Not measured", ("encoder", "what", "why"), lines, 3)]


def grids(bench: Bench, preset: str) -> list[Grid]:
    """The tables of one encoder: forward passes, training steps, switching and loading."""
    rows = [row for row in bench.rows if row.preset == preset]
    towers = bench.towers[preset]
    size = f"batch {bench.settings.train_batch}"
    found = [
        Grid(
            "Forward pass",
            ("what", "where", "mode", "batch", "parameters", "ms", "over bare"),
            [_forward_line(row) for row in rows if row.phase == "forward"],
            3,
        ),
        Grid(
            f"Training step, {size}",
            (
                *("what", "where", "mode", "first block", "parameters", "ms", "over full"),
                *("kept, MiB", "peak, MiB", "limit, ms", "of the limit"),
            ),
            [_step_line(row, towers) for row in rows if row.phase == "step"],
            4,
        ),
        Grid(
            "Switching between two adapters, loading one from disk",
            ("what", "where", "does", "ms", "over ours"),
            [_life_line(row) for row in rows if row.phase == "life"],
            3,
        ),
    ]
    return [grid for grid in found if grid.lines]


def _forward_line(row: Row) -> tuple[str, ...]:
    count = f"{row.parameters:,}" if row.parameters else ""
    times = (milliseconds(row.seconds), ratio(row.ratio))
    return (row.name, where(row), row.mode, str(row.batch), count, *times)


def _step_line(row: Row, towers: Sequence[Tower]) -> tuple[str, ...]:
    steps = row.kind in ("step", "cached")
    name = row.name if steps else f"{row.name}, forward only"
    start = first(row.start, towers) if steps and row.method != "full" else ""
    count = f"{row.parameters:,}" if row.parameters else ""
    memory = tuple("" if b is None else f"{b / MIB:,.1f}" for b in (row.kept, row.peak))
    limit = "" if row.limit is None else significant(1e3 * row.limit)
    reached = "" if row.reached is None else f"{100 * row.reached.median:.0f} %"
    times = (milliseconds(row.seconds), ratio(row.ratio))
    return (name, where(row), row.mode, start, count, *times, *memory, limit, reached)


def _life_line(row: Row) -> tuple[str, ...]:
    return (row.name, where(row), row.kind, milliseconds(row.seconds), ratio(row.ratio))


def where(row: Row) -> str:
    """The environment and the encoder of a row."""
    return f"{row.environment}: {row.encoder}"


def first(start: str, towers: Iterable[Tower]) -> str:
    """The first adapted blocks, each once: "6 of 12"."""
    words = [f"{first_block(start, tower.blocks)} of {tower.blocks}" for tower in towers]
    return ", ".join(dict.fromkeys(words))


def milliseconds(seconds: Spread) -> str:
    """A median and its quartiles, in milliseconds."""
    median, low, high = (
        significant(1e3 * value) for value in (seconds.median, seconds.low, seconds.high)
    )
    return f"{median} [{low}, {high}]"


def ratio(found: Spread | None) -> str:
    """A median ratio and its quartiles."""
    if found is None:
        return ""
    if found.low == found.high == 1:
        return "1"
    return f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"


def significant(value: float) -> str:
    """Three digits that count, or all before the point."""
    digits = 0 if value >= 100 else 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{digits}f}"


def _markdown_grid(grid: Grid) -> str:
    rule = ["---"] * grid.words + ["---:"] * (len(grid.head) - grid.words)
    lines = [grid.head, tuple(rule), *grid.lines]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {grid.title}\n\n{table}"


def show(bench: Bench, console: Console) -> None:
    """Prints the same tables."""
    from ..reports.console import plain

    console.print(plain(header(bench)), soft_wrap=True, highlight=False)
    for preset in bench.settings.encoders:
        console.print(plain(f"\n{preset}: {_described(bench.towers[preset])}"), soft_wrap=True)
        for grid in grids(bench, preset):
            console.print(_rich(grid))
    for grid in [checked(checks(bench)), *_missing(bench)]:
        console.print(_rich(grid))


def _rich(grid: Grid) -> Any:
    from rich.table import Table

    from ..reports.console import plain

    table = Table(*map(plain, grid.head), title=plain(grid.title), title_justify="left")
    for column in table.columns[grid.words :]:
        column.justify = "right"
    for line in grid.lines:
        table.add_row(*(plain(cell.replace("**", "")) for cell in line))
    return table
