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
    """Returns precision, recall and F1 of each class, in percent.

    Args:
        matrix: (C, C) counts, the truth in rows.
        names: of the classes.
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


def shares(classes: Sequence[int], names: Sequence[str], rows: int) -> Table:
    """Returns the number and the share of rows of each class.

    Args:
        classes: the class numbers of all rows, one after another.
        names: of the classes.
        rows: the number of rows.
    """
    counts = np.bincount(np.asarray(classes, dtype=int), minlength=len(names))
    lines = [
        [name, int(count), _percent(count / max(rows, 1))]
        for name, count in zip(names, counts, strict=True)
    ]
    return Table("Classes", ["class", "rows", "%"], lines)


def confusions(matrix: np.ndarray, names: Sequence[str]) -> list[Table]:
    """Returns a table of the commonest mistakes, or no table if there are none.

    Args:
        matrix: (C, C) counts, the truth in rows.
        names: of the classes.
    """
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
    """Returns average precision, precision, recall and F1 of each label, in percent.

    Args:
        truth: (N, C) of 0 and 1.
        probabilities: (N, C).
        names: of the labels.
        threshold: the probability from which a label counts as predicted.
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
