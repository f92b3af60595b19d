"""What a report shows of speech recognition: error rates by group, and the worst utterances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..metrics import Metric
from ..task import Figure, Record, Table
from .metrics import CHARACTER_ERRORS, WORD_ERRORS, WORDS, aligned

if TYPE_CHECKING:
    from .task import ASRTask


def illustrate(task: ASRTask, records: Sequence[Record], *, count: int) -> list[Figure | Table]:
    shown: list[Figure | Table] = []
    scores = task.score(records, bootstrap=task.config.evaluation.bootstrap)
    for column, values in scores.groups.items():
        rates = {value: metrics[0] for value, metrics in values.items()}
        shown.append(Figure(f"WER by {column}", bars(rates), f"With 95 % intervals, by {column}."))
    worst = sorted(
        records, key=lambda r: (-r["counts"][WORD_ERRORS], -r["counts"][CHARACTER_ERRORS])
    )
    rows = []
    for record in worst[:count]:
        if not record["counts"][WORD_ERRORS]:
            break
        said, heard = aligned(record["reference"], record["hypothesis"])
        errors = f"{record['counts'][WORD_ERRORS]} of {record['counts'][WORDS]}"
        rows.append((record["index"], errors, said, heard))
    if rows:
        caption = "Capitals: another word; *: nothing was said; -: nothing was heard."
        shown.append(
            Table("Worst utterances", ("row", "word errors", "said", "heard"), rows, caption)
        )
    return shown


def bars(rates: dict[str, Metric]) -> bytes:
    """A bar for each group, the highest rate first."""
    from matplotlib.figure import Figure as Canvas

    from ..plots import figure_png

    ordered = sorted(rates.items(), key=lambda item: item[1].value)
    figure = Canvas(figsize=(6.4, 0.8 + 0.38 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    values = [100 * metric.value for _, metric in ordered]
    axes.barh(range(len(ordered)), values, color="#4c78a8", height=0.62)
    for row, (_, metric) in enumerate(ordered):
        if metric.low is not None and metric.high is not None:
            axes.plot([100 * metric.low, 100 * metric.high], [row, row], color="#222222", lw=1.4)
    axes.set_yticks(
        range(len(ordered)), [f"{name} (n = {metric.count})" for name, metric in ordered]
    )
    axes.set_xlabel("word error rate, %")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure_png(figure)
