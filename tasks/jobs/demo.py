"""All tasks on data that is drawn, synthesised or ships in a package, with the nano encoders.

Each task is trained twice with the same data, steps and head: on the frozen encoder alone, and with
adapters. What the data show, no encoder has seen: shapes, colours, phrasing, an accent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.metrics import Metric
    from .run import Run

# Task -> the config that ships, and what makes it short enough for a demo.
TASKS: dict[str, tuple[str, ...]] = {
    "segmentation": ("segment_scenes", "trainer.epochs=3"),
    "asr": ("asr_accent", "data.options.train=560"),
    "vqa": ("vqa_easy", "trainer.batch_size=128", "data.limit.test=4000"),
    "retrieval": ("retrieve_scenes", "data.options.train=2000"),
}
HOME_ACCENT = "en-us"


@dataclass(frozen=True)
class Row:
    """One task's outcome. `head` and `adapter`: the deciding metric on the test split; `notes`:
    what else is to be said of it."""

    task: str
    backbone: str
    head: Metric
    adapter: Metric
    head_seconds: float
    adapter_seconds: float
    parameters: int
    share: float
    kilobytes: float
    report: Path
    notes: tuple[str, ...] = ()

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval of the adapter lies wholly on the better side of the head's."""
        if self.adapter.greater_is_better:
            return _bound(self.adapter, "low") > _bound(self.head, "high")
        return _bound(self.adapter, "high") < _bound(self.head, "low")


def _bound(metric: Metric, side: str) -> float:
    value = getattr(metric, side)
    return metric.value if value is None else value


def run(out: Path, tasks: Sequence[str], overrides: Sequence[str] = ()) -> list[Row]:
    """Trains the tasks, each in `out/TASK/{head,adapter}`, and returns what came out.

    Args:
        overrides: changes to every config, for a shorter demo.

    Raises:
        ValueError: an unknown task.
        ImportError: speech synthesis or easy-VQA is not installed; says how to.
    """
    from mmadapters.suggest import nearest

    for task in tasks:
        if task not in TASKS:
            raise ValueError(
                f"the demo has no task {task!r}{nearest(task, TASKS)}; it has {', '.join(TASKS)}"
            )
    return [_task(task, out / task, overrides) for task in tasks]


def _task(task: str, folder: Path, overrides: Sequence[str]) -> Row:
    head = _train(task, folder, "head", overrides)
    adapter = _train(task, folder, "adapter", overrides)
    return Row(
        task=task,
        backbone=adapter.task.config.backbone.name,
        head=head.headline,
        adapter=adapter.headline,
        head_seconds=head.facts["train_seconds"],
        adapter_seconds=adapter.facts["train_seconds"],
        parameters=adapter.facts["adapter_parameters"],
        share=adapter.facts["trained_share"],
        kilobytes=adapter.facts["adapter_bytes"] / 1024,
        report=adapter.folder / "report.html",
        notes=_gap(adapter, folder, overrides) if task == "asr" else (),
    )


def _train(task: str, folder: Path, mode: str, overrides: Sequence[str], *changes: str) -> Run:
    from ..config.file import read_config
    from . import run as runs

    name = f"{task}-{mode}" if not changes else f"{task}-{HOME_ACCENT}"
    config, *short = TASKS[task]
    settings = [
        *short,
        f"trainer.mode={mode}",
        f"name={name}",
        f"output={folder / name.removeprefix(f'{task}-')}",
        # The untrained encoder is measured once for each task, with the adapter's run.
        *(["evaluation.before=false"] if mode == "head" else []),
        *changes,
        *overrides,
    ]
    return runs.train(read_config(config, settings), overwrite=True)


def _gap(adapter: Run, folder: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """How much of the distance between the new accent and the encoder's own the adapter closes."""
    if adapter.before is None:
        return ()
    home = _train(
        "asr", folder, "none", overrides, f"data.options.accents=[{HOME_ACCENT}]"
    ).headline
    before, after = adapter.before[adapter.task.metric], adapter.headline
    closed = (before.value - after.value) / (before.value - home.value)
    return (
        f"before any training {before}, {HOME_ACCENT} {home}: "
        f"the adapter closes {100 * closed:.0f} % of the gap",
    )


def show(rows: Sequence[Row], console: Console, out: Path) -> None:
    """The table, and where the reports are."""
    from rich.table import Table

    table = Table("task", title="Test splits, with 95 % intervals")
    for column in ("head only", "with adapter", "adapter", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.task}\n{row.adapter.name}\n{row.backbone}",
            _two_lines(row.head),
            _two_lines(row.adapter) + ("" if row.clear else "\nnot clear"),
            f"{row.parameters:,} trained\n{100 * row.share:.2f} % of the encoder"
            f"\n{row.kilobytes:,.0f} kB with head",
            f"{row.head_seconds:.0f} + {row.adapter_seconds:.0f}",
        )
        table.add_section()
    console.print(table)
    for row in rows:
        for note in row.notes:
            console.print(f"{row.task}: {note}", soft_wrap=True)
        console.print(f"{row.task}: {row.report}", soft_wrap=True)


def _two_lines(metric: Metric) -> str:
    """A metric with its interval below it."""
    value, bracket, interval = str(metric).partition(" [")
    unit = " %" if metric.unit == "%" else ""
    return f"{value}{unit}\n[{interval.removesuffix(' %')}" if bracket else value
