"""Pictures of a classifier's report: the confusion matrix, right answers, the worst ones."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import BadRow
from ..core.results import Figure, Table
from ..core.rows import Record, Rows
from ..data import media
from .metrics import confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .task import ClassificationTask

LARGEST = 30  # classes of a confusion matrix that can be read
COLUMNS = 6
RIGHT, WRONG = "#1a7f37", "#cf222e"


def illustrate(
    task: ClassificationTask, rows: Rows, records: Sequence[Record], *, count: int
) -> list[Figure | Table]:
    """The report's pictures; of recordings, which cannot be seen, tables."""
    names = task.labels.names
    found: list[Figure | Table] = []
    if not task.config.data.multi_label:
        found += confusion_figures(records, names)
    wrong, right = ranked(records, task.config.threshold)
    groups = (
        ("Most confident mistakes", wrong, "The surest wrong answers first."),
        ("Right answers", right, "From all classes in turn."),
    )
    for title, chosen, caption in groups:
        if chosen and count:
            part = chosen[: count if title.startswith("Most") else max(count // 2, 1)]
            if task.kind == "image":
                found.append(gallery(task, rows, part, title, caption))
            else:
                found.append(listing(task, rows, part, title, caption))
    return found


def ranked(records: Sequence[Record], threshold: float) -> tuple[list[Record], list[Record]]:
    """The wrong records, the surest first, and the right ones, of all classes in turn."""
    wrong: list[Record] = []
    right: list[Record] = []
    for record in records:
        (right if is_right(record, threshold) else wrong).append(record)
    wrong.sort(key=lambda record: -badness(record))
    seen: dict[Any, int] = {}
    turns = []
    for record in right:
        key = np.asarray(record["truth"]).tobytes()
        seen[key] = seen.get(key, 0) + 1
        turns.append(seen[key])
    order = np.argsort(turns, kind="stable")
    return wrong, [right[place] for place in order]


def is_right(record: Record, threshold: float) -> bool:
    truth, probabilities = record["truth"], record["probabilities"]
    if isinstance(truth, int):
        return int(probabilities.argmax()) == truth
    return bool(((probabilities >= threshold) == truth).all())


def badness(record: Record) -> float:
    """The probability of the wrong answer; with several labels, of the worst of them."""
    truth, probabilities = record["truth"], record["probabilities"]
    if isinstance(truth, int):
        return float(probabilities.max())
    return float(np.abs(probabilities - truth).max())


def told(record: Record, names: Sequence[str], threshold: float) -> tuple[str, str]:
    """The truth and the prediction in words."""
    truth, probabilities = record["truth"], record["probabilities"]
    if isinstance(truth, int):
        best = int(probabilities.argmax())
        return names[truth], f"{names[best]} {100 * probabilities[best]:.0f} %"
    true = [names[c] for c in np.flatnonzero(truth).tolist()]
    said = [
        f"{names[c]} {100 * probabilities[c]:.0f} %"
        for c in np.flatnonzero(probabilities >= threshold).tolist()
    ]
    return ", ".join(true) or "none", ", ".join(said) or "none"


def gallery(
    task: ClassificationTask, rows: Rows, records: Sequence[Record], title: str, caption: str
) -> Figure:
    """A grid of pictures with truth and prediction."""
    from matplotlib.figure import Figure as Canvas

    lines = -(-len(records) // COLUMNS)
    columns = min(COLUMNS, len(records))
    canvas = Canvas(figsize=(2 * columns, 2.55 * lines), layout="constrained")
    axes = canvas.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, record in zip(axes, records, strict=False):
        truth, prediction = told(record, task.labels.names, task.config.threshold)
        try:
            axis.imshow(media.read_image(rows[record["index"]]["image"]))
        except BadRow:
            continue  # it was readable when it was evaluated; the report does without
        colour = RIGHT if is_right(record, task.config.threshold) else WRONG
        axis.text(0.5, -0.03, _short(truth), **_below(axis), color="black")
        axis.text(0.5, -0.17, _short(prediction), **_below(axis), color=colour)
    return Figure(title, png(canvas), f"{caption} Above the truth, below the prediction.")


def _below(axis: Axes) -> dict[str, Any]:
    return {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 9}


def _short(text: str) -> str:
    return textwrap.shorten(text, 26, placeholder="…") or text[:25] + "…"


def listing(
    task: ClassificationTask, rows: Rows, records: Sequence[Record], title: str, caption: str
) -> Table:
    """Recordings with truth and prediction."""
    lines = []
    for record in records:
        value = rows[record["index"]]["audio"]
        name = media.media_name(value) or f"row {record['index']}"
        lines.append([name, *told(record, task.labels.names, task.config.threshold)])
    return Table(title, ["recording", "truth", "prediction"], lines, caption)


def confusion_figures(records: Sequence[Record], names: Sequence[str]) -> list[Figure]:
    """The confusion matrix; of more classes than can be read, those with the most mistakes."""
    truth = np.array([record["truth"] for record in records])
    predicted = np.array([record["probabilities"].argmax() for record in records])
    matrix = confusion(truth, predicted, len(names))
    caption = "Rows: the truth. Columns: the prediction. Colours: the share of the row."
    if len(names) > LARGEST:
        wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
        kept = np.sort(np.argsort(-wrong, kind="stable")[:LARGEST])
        matrix, names = matrix[np.ix_(kept, kept)], [names[c] for c in kept]
        caption += f" The {LARGEST} classes with the most mistakes."
    return [Figure("Confusion matrix", _matrix(matrix, names), caption)]


def _matrix(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    from matplotlib.figure import Figure as Canvas

    side = 2.2 + 0.42 * len(names)
    canvas = Canvas(figsize=(side, side), layout="constrained")
    axis = canvas.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [_short(name) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=90 if max(map(len, labels)) > 3 else 0)
    axis.set_yticks(range(len(names)), labels)
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    for row, column in zip(*np.nonzero(matrix), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        size = 9 if matrix[row, column] < 1000 else 7
        axis.text(
            *(column, row, f"{matrix[row, column]}"),
            ha="center",
            va="center",
            color=colour,
            fontsize=size,
        )
    return png(canvas)


def png(canvas: Any) -> bytes:
    """The canvas as PNG data."""
    data = io.BytesIO()
    canvas.savefig(data, format="png", dpi=110)
    return data.getvalue()
