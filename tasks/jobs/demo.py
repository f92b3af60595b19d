"""Runs all tasks with the nano encoders, on data that is generated or ships in a package.

Each task is trained twice with the same data, steps and head: on the frozen encoder alone, and with
adapters. No encoder has seen such data before: shapes, colours, phrasing, an accent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.metrics import Metric
    from ..reports.results import Run

# Task -> the name of a config that ships, and changes that make it short enough for a demo.
TASKS: dict[str, tuple[str, ...]] = {
    "segmentation": ("segment_scenes", "trainer.epochs=3"),
    "asr": ("asr_accent", "data.options.train=560"),
    "vqa": ("vqa_easy", "trainer.batch_size=128", "data.limit.test=4000"),
    "retrieval": ("retrieve_scenes", "data.options.train=2000"),
}
HOME_ACCENT = "en-us"  # the accent that the speech encoder was trained on


@dataclass(frozen=True)
class DemoRow:
    """The results of one task.

    Attributes:
        task: the name of the task.
        backbone: the name of the encoder.
        head: the deciding metric on the test split with a trained head alone.
        adapter: the same metric with adapters.
        head_seconds: the training time of the head alone.
        adapter_seconds: the training time with adapters.
        parameters: the parameters of the adapters.
        share: the trained parameters over those of the encoder.
        kilobytes: the size of the adapter directory, 1,024 bytes each.
        report: the report of the run with adapters.
        notes: further sentences on the results.
    """

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
        """Whether the whole 95 % interval with adapters is better than that of the head alone."""
        if self.adapter.greater_is_better:
            return _bound(self.adapter, "low") > _bound(self.head, "high")
        return _bound(self.adapter, "high") < _bound(self.head, "low")


def _bound(metric: Metric, side: str) -> float:
    value = getattr(metric, side)
    return metric.value if value is None else value


def run(out: Path, tasks: Sequence[str], overrides: Sequence[str] = ()) -> list[DemoRow]:
    """Trains the tasks, each in `out/TASK/{head,adapter}`, and returns their results.

    Args:
        overrides: changes to every config, for a shorter demo.

    Raises:
        ValueError: a task is unknown.
        ImportError: speech synthesis or easy-VQA is not installed; says how to install it.
    """
    from mmadapters.suggest import nearest

    for task in tasks:
        if task not in TASKS:
            raise ValueError(
                f"the demo has no task {task!r}{nearest(task, TASKS)}; it has {', '.join(TASKS)}"
            )
    return [_task(task, out / task, overrides) for task in tasks]


def _task(task: str, folder: Path, overrides: Sequence[str]) -> DemoRow:
    head = _train(task, folder, "head", overrides)
    adapter = _train(task, folder, "adapter", overrides)
    return DemoRow(
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
        # The untrained encoder is measured once for each task, in the run with adapters.
        *(["evaluation.before=false"] if mode == "head" else []),
        *changes,
        *overrides,
    ]
    return runs.train(read_config(config, settings), overwrite=True)


def _gap(adapter: Run, folder: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """Returns a sentence on how much of the gap between the two accents the adapter closes."""
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


def show(rows: Sequence[DemoRow], console: Console, out: Path) -> None:
    """Prints the table, the notes and the paths of the reports."""
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
    """Returns a metric with its interval on a second line."""
    value, bracket, interval = str(metric).partition(" [")
    unit = " %" if metric.unit == "%" else ""
    return f"{value}{unit}\n[{interval.removesuffix(' %')}" if bracket else value
