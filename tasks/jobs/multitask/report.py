"""Shows the tasks of a joint run in `report.html` and on the console."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import yaml

from mmadapters.files import write_text

from ...core.metrics import Metric
from ...core.results import Table
from ...reports.charts import learning_curves
from ...reports.console import plain
from ...reports.page import interval_text, template, value_text
from ..folder import REPORT
from .results import MEAN, Multitask, history_of

if TYPE_CHECKING:
    from rich.console import Console

_WAYS = {
    "single": "one adapter for all tasks",
    "multiple": "an adapter for each task",
    "half_down": "an adapter for each task, their down-projections shared",
    "half_up": "an adapter for each task, their up-projections shared",
}


def write_multitask_report(done: Multitask, environment: Mapping[str, Any]) -> None:
    """Writes `report.html`, which links to the reports of the tasks and to nothing else.

    Args:
        environment: as in `metrics.json`.
    """
    page = template("multitask.html.j2").render(
        title=done.config.name,
        headline=value_text(mean_metric(done)),
        of="mean on the test splits",
        summary=_summary(done),
        tasks=_tasks(done),
        sizes=_parameters(done),
        charts=_charts(done),
        reports=[f"{name}/{REPORT}" for name in done.runs],
        environment=environment,
        config=yaml.safe_dump(done.config.to_save(), sort_keys=False),
        created=datetime.now().astimezone(),
    )
    write_text(done.folder / REPORT, page)


def mean_metric(done: Multitask) -> Metric:
    """Returns the mean of the tasks' deciding metrics as a metric."""
    units = {metric.unit for metric in done.deciding.values()}
    return Metric(MEAN, done.mean, unit="%" if units == {"%"} else "")


def _summary(done: Multitask) -> list[str]:
    first = next(iter(done.runs.values())).task.config.backbone.name
    sentences = [f"{first}, frozen; {_WAYS[done.config.sharing]}; {', '.join(done.runs)} together."]
    if done.facts["best_step"]:
        sentences.append(
            f"Step {done.facts['best_step']:,} was kept, which has the best mean on the validation "
            "splits."
        )
    return sentences


def _tasks(done: Multitask) -> Table:
    rows = [
        (
            name,
            run.task.metric,
            run.scores["validation"][run.task.metric] if "validation" in run.scores else "—",
            run.scores["test"][run.task.metric] if "test" in run.scores else "—",
            done.steps[name],
            run.facts["adapter_parameters"],
            run.facts["head_parameters"],
        )
        for name, run in done.runs.items()
    ]
    columns = ("task", "metric", "validation", "test", "steps", "adapter", "head")
    caption = (
        "In brackets: 95 % intervals. Adapter, head: parameters; shared ones count in each task."
    )
    return Table("Every task", columns, rows, caption)


def _parameters(done: Multitask) -> Table:
    facts = done.facts
    rows = [
        ("encoder, frozen", facts["encoder_parameters"]),
        ("adapters, shared ones once", facts["adapter_parameters"]),
        ("adapters, if nothing were shared", facts["adapter_parameters_unshared"]),
        ("heads", facts["head_parameters"]),
    ]
    share = f"Trained: {100 * facts['trained_share']:.2f} % of the encoder."
    return Table("Parameters in all", ("of", "number"), rows, share)


def _charts(done: Multitask) -> dict[str, list[str]]:
    """Returns learning curves of all tasks together and of each task, by title."""
    best = done.facts["best_step"]
    shown = {"all tasks": learning_curves(done.history, mean_metric(done), best)}
    for name, run in done.runs.items():
        history = history_of(done.history, name)
        for entry in history:
            entry.pop("learning_rate", None)  # all tasks have the same, which is shown once
        shown[name] = learning_curves(history, run.headline, best)
    return {name: charts for name, charts in shown.items() if charts}


def show(done: Multitask, console: Console) -> None:
    """Prints the tasks' figures, the trained parameters and the path of the report."""
    from rich.table import Table as Grid

    columns = ("task", "metric", "test", "95 % interval", "n", "steps")
    grid = Grid(*columns, title=f"Together, {_WAYS[done.config.sharing]}", title_justify="left")
    for column in grid.columns[2:]:
        column.justify = "right"
    for name, metric in done.deciding.items():
        shown = (value_text(metric), interval_text(metric), f"{metric.count:,}")
        grid.add_row(plain(name), metric.name, *shown, f"{done.steps[name]:,}")
    grid.add_section()
    grid.add_row(MEAN, "", value_text(mean_metric(done)))
    console.print(grid)
    facts = done.facts
    console.print(
        f"trained {100 * facts['trained_share']:.2f} % of the encoder "
        f"({facts['adapter_parameters']:,} in the adapters, shared ones once; "
        f"{facts['head_parameters']:,} in the heads), {facts['steps']} steps in "
        f"{facts['train_seconds']:.0f} s.",
        soft_wrap=True,
    )
    console.print(f"Report: {done.folder / REPORT}", soft_wrap=True)
