"""Pictures of a classifier's report: the confusion matrix, right answers, the worst ones."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.errors import BadRow
from ..core.plots import figure_png
from ..core.results import Figure, Table
from ..core.rows import Record, Rows
from ..data import media
from .metrics import confusion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 30  # the most classes of a confusion matrix that can be read
COLUMNS = 6
RIGHT, WRONG = "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Answers:
    """Draws the answers of a classifier.

    Attributes:
        names: of the classes.
        threshold: the probability from which a label counts as predicted, with several labels.
        multi_label: whether an example may have several labels.
    """

    names: Sequence[str]
    threshold: float
    multi_label: bool

    def illustrate(
        self,
        rows: Rows,
        records: Sequence[Record],
        *,
        kind: Literal["image", "audio"],
        count: int,
    ) -> list[Figure | Table]:
        """Returns the report's pictures, or tables if recordings are classified.

        Args:
            count: the number of mistakes; right answers are half as many.
        """
        shown: list[Figure | Table] = []
        if not self.multi_label:
            shown += confusion_figures(records, self.names)
        wrong, right = ranked(records, self.threshold)
        groups = (
            ("Most confident mistakes", wrong, "The surest wrong answers first."),
            ("Right answers", right, "From all classes in turn."),
        )
        for title, chosen, caption in groups:
            if chosen and count:
                part = chosen[: count if title.startswith("Most") else max(count // 2, 1)]
                if kind == "image":
                    shown.append(self.gallery(rows, part, title, caption))
                else:
                    shown.append(self.listing(rows, part, title, caption))
        return shown

    def gallery(self, rows: Rows, records: Sequence[Record], title: str, caption: str) -> Figure:
        """Returns a grid of pictures with truth and prediction."""
        from matplotlib.figure import Figure as Canvas

        lines = -(-len(records) // COLUMNS)
        columns = min(COLUMNS, len(records))
        canvas = Canvas(figsize=(2 * columns, 2.55 * lines), layout="constrained")
        axes = canvas.subplots(lines, columns, squeeze=False).flatten()
        for axis in axes:
            axis.set_axis_off()
        for axis, record in zip(axes, records, strict=False):
            truth, prediction = told(record, self.names, self.threshold)
            try:
                axis.imshow(media.picture_to_show(rows[record["index"]]["image"]))
            except BadRow:
                continue  # evaluation could read it; the report does without it
            colour = RIGHT if is_right(record, self.threshold) else WRONG
            axis.text(0.5, -0.03, _short(truth), **_below(axis), color="black")
            axis.text(0.5, -0.17, _short(prediction), **_below(axis), color=colour)
        return Figure(
            title, figure_png(canvas, dpi=110), f"{caption} Above the truth, below the prediction."
        )

    def listing(self, rows: Rows, records: Sequence[Record], title: str, caption: str) -> Table:
        """Returns a table of recordings with truth and prediction."""
        lines = []
        for record in records:
            value = rows[record["index"]]["audio"]
            name = media.media_name(value) or f"row {record['index']}"
            lines.append([name, *told(record, self.names, self.threshold)])
        return Table(title, ["recording", "truth", "prediction"], lines, caption)


def ranked(records: Sequence[Record], threshold: float) -> tuple[list[Record], list[Record]]:
    """Returns the wrong records, the surest first, and the right ones, of all classes in turn."""
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
    """Returns whether the prediction is the truth; with several labels, whether all of them are."""
    truth, probabilities = record["truth"], record["probabilities"]
    if isinstance(truth, int):
        return int(probabilities.argmax()) == truth
    return bool(((probabilities >= threshold) == truth).all())


def badness(record: Record) -> float:
    """Returns the probability of the wrong answer; with several labels, of the worst of them."""
    truth, probabilities = record["truth"], record["probabilities"]
    if isinstance(truth, int):
        return float(probabilities.max())
    return float(np.abs(probabilities - truth).max())


def told(record: Record, names: Sequence[str], threshold: float) -> tuple[str, str]:
    """Returns the truth and the prediction in words."""
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


def _below(axis: Axes) -> dict[str, Any]:
    return {"transform": axis.transAxes, "ha": "center", "va": "top", "fontsize": 9}


def _short(text: str) -> str:
    return textwrap.shorten(text, 26, placeholder="…") or text[:25] + "…"


def confusion_figures(records: Sequence[Record], names: Sequence[str]) -> list[Figure]:
    """Returns the confusion matrix of at most `LARGEST` classes: those with the most mistakes."""
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
    return figure_png(canvas, dpi=110)
