"""Draws the conclusions about the classes of a data set."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from ..config.schema import Split
from ..core.errors import BadRow
from ..core.findings import Finding, quoted
from ..core.results import Table
from ..core.rows import Rows
from .labels import LabelMap
from .tables import shares

SHOWN = 3  # groups of labels that are named


def class_shares(labels: LabelMap, rows: Rows) -> Table:
    """Returns the number and the share of rows of each class; doctor names rows without one."""
    classes = []
    for value in rows["label"]:
        try:
            classes += labels.indices(value)
        except BadRow:
            continue
    return shares(classes, labels.names, len(rows))


def label_findings(
    labels: LabelMap, trained: Sequence[int], splits: Mapping[Split, Rows]
) -> list[Finding]:
    """Returns what is suspicious about classes: some without training rows, some spelt twice.

    Args:
        trained: the training rows of each class.
        splits: the rows of each split.
    """
    results = []
    if "train" in splits:
        results += _absent(labels, trained, splits)
    same: dict[str, list[int]] = {}
    for number, name in enumerate(labels.names):
        same.setdefault(spelling_key(name), []).append(number)
    twice = [numbers for numbers in same.values() if len(numbers) > 1]
    if twice:
        groups = "; ".join(
            " and ".join(f"{labels.names[n]!r} ({trained[n]:,} rows)" for n in numbers)
            for numbers in twice[:SHOWN]
        )
        more = f"; and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        results.append(
            Finding(
                f"labels that differ only by case, blanks or invisible characters are different "
                f"classes: {groups}{more}",
                "write each label in one way in the data",
            )
        )
    return results


def _absent(
    labels: LabelMap, trained: Sequence[int], splits: Mapping[Split, Rows]
) -> list[Finding]:
    absent = [number for number, rows in enumerate(trained) if not rows]
    if not absent:
        return []
    names = [labels.names[number] for number in absent]
    text = f"no row of train has the label {quoted(names)}"
    for split, rows in splits.items():
        if split != "train" and (count := _rows_with(labels, set(absent), rows)):
            text += f", but {count:,} of {split}"
    return [Finding(text, "correct data.labels, or the labels of the data")]


def _rows_with(labels: LabelMap, classes: set[int], rows: Rows) -> int:
    counts: Counter[bool] = Counter()
    for value in rows["label"]:
        try:
            counts[bool(classes & set(labels.indices(value)))] += 1
        except BadRow:
            continue
    return counts[True]


def spelling_key(name: str) -> str:
    """Returns a text that is equal for names that look alike."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    seen = "".join(c for c in plain if unicodedata.category(c) not in ("Cf", "Cc") or c.isspace())
    return " ".join(seen.split())
