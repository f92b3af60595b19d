"""Tables of a classifier's report.

Shape legend: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.results import Table
from .metrics import average_precision, class_figures, confusion

MISTAKES = 20


def of_classes(matrix: np.ndarray, names: Sequence[str], trained: Sequence[int]) -> Table:
    """Precision, recall and F1 of each class, in percent.

    Args:
        matrix: (C, C) counts, the truth in rows.
        trained: (C,) rows of the training split.
    """
    figures = class_figures(matrix)
    there = matrix.sum(axis=1)
    rows = [
        [name, int(trained[c]), int(there[c]), *(_percent(part[c]) for part in figures.values())]
        for c, name in enumerate(names)
    ]
    columns = ["class", "training rows", "rows", *(f"{name} %" for name in figures)]
    return Table("Classes", columns, rows)


def shares(found: Sequence[int], names: Sequence[str], rows: int) -> Table:
    """How often each class is there.

    Args:
        found: the classes of all rows, one after another.
        rows: how many rows there are.
    """
    counts = np.bincount(np.asarray(found, dtype=int), minlength=len(names))
    lines = [
        [name, int(count), _percent(count / max(rows, 1))]
        for name, count in zip(names, counts, strict=True)
    ]
    return Table("Classes", ["class", "rows", "%"], lines)


def confusions(matrix: np.ndarray, names: Sequence[str]) -> list[Table]:
    """The commonest mistakes, if there are any."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [divmod(int(place), len(names)) for place in order]
    rows = [
        [names[true], names[told], int(wrong[true, told]), _percent(share)]
        for true, told in pairs
        if wrong[true, told]
        for share in [wrong[true, told] / matrix[true].sum()]
    ]
    if not rows:
        return []
    columns = ["truth", "prediction", "rows", "% of the truth"]
    return [Table("Commonest mistakes", columns, rows)]


def of_labels(
    truth: np.ndarray, probabilities: np.ndarray, names: Sequence[str], *, threshold: float
) -> Table:
    """Average precision, precision, recall and F1 of each label, in percent.

    Args:
        truth: (N, C) of 0 and 1.
        probabilities: (N, C).
    """
    one = np.ones((1, len(truth)))
    rows = []
    for c, name in enumerate(names):
        true = truth[:, c].astype(int)
        told = (probabilities[:, c] >= threshold).astype(int)
        figures = class_figures(confusion(true, told, 2))
        precision = average_precision(true, probabilities[:, c], one)[0]
        parts = [precision, *(figure[1] for figure in figures.values())]
        rows.append([name, int(true.sum()), *map(_percent, parts)])
    columns = ["label", "rows", "average precision %", "precision %", "recall %", "F1 %"]
    return Table("Labels", columns, rows, f"Predicted from a probability of {threshold:g}.")


def _percent(share: float) -> float | str:
    return "–" if np.isnan(share) else round(100 * float(share), 1)
