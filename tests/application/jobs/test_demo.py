"""The demo on a few rows, and its real claims where they are cheap enough to be measured again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from mmadapters.tasks.core.metrics import Metric
from mmadapters.tasks.jobs import demo

SMALL = {
    "segmentation": ["data.options.train=16", "data.options.validation=8", "data.options.test=8"],
    "asr": ["data.options.train=16", "data.options.validation=4", "data.options.test=8"],
    "vqa": ["data.limit={train: 32, validation: 16, test: 16}", "trainer.max_steps=4"],
    "retrieval": ["data.options.train=32", "data.options.validation=16", "data.options.test=16"],
}


@pytest.mark.parametrize("task", list(demo.TASKS))
def test_every_task_of_the_demo_runs_and_reports(task: str, tmp_path: Path) -> None:
    if task == "asr":
        pytest.importorskip("espeakng_loader")
    if task == "vqa":
        pytest.importorskip("easy_vqa")
    few = [*SMALL[task], "trainer.epochs=1", "trainer.batch_size=8", "trainer.tensorboard=false"]
    (row,) = demo.run(tmp_path, [task], few)
    assert row.report.is_file()
    assert (row.report.parent / "adapter/adapter.safetensors").is_file()
    assert 0 < row.share <= 0.05
    assert row.kilobytes > 0
    assert bool(row.notes) == (task == "asr")
    console = Console(record=True, width=80, file=io.StringIO())
    demo.show([row], console, tmp_path)
    text = console.export_text()
    for metric in (row.head, row.adapter):
        assert f"{100 * metric.value:.1f} %" in text
    assert str(row.report) in text


def row(head: Metric, adapter: Metric) -> demo.DemoRow:
    return demo.DemoRow("asr", "nano/vit", head, adapter, 1.0, 1.0, 1, 0.01, 1.0, Path("x"))


def test_clear_means_that_the_intervals_do_not_touch() -> None:
    low, high = Metric("m", 0.3, 0.25, 0.35), Metric("m", 0.5, 0.45, 0.55)
    near = Metric("m", 0.4, 0.34, 0.46)
    assert row(low, high).clear
    assert not row(low, near).clear
    assert not row(high, low).clear

    def error(metric: Metric) -> Metric:
        return Metric("e", metric.value, metric.low, metric.high, greater_is_better=False)

    assert row(error(high), error(low)).clear
    assert not row(error(low), error(high)).clear


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'retrieval'"):
        demo.run(tmp_path, ["retreival"])
