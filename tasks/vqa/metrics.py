"""Metrics of a split's answers: accuracy in total, by kind of question and by answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.metrics import Metric, summed_metric
from ..core.results import Scores, Table
from ..core.rows import Record
from .answers import Vocabulary, score

KINDS = ("question_type", "answer_type")  # columns of VQAv2 by which accuracy is always given
BY_ANSWER = "answer"
SHOWN_ANSWERS = 30
SHOWN_ROWS = 15


def truth(answers: Sequence[str]) -> str:
    """Returns the answer that most people gave; of equally frequent ones the first by alphabet."""
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def scores(
    records: Sequence[Record],
    vocabulary: Vocabulary | None,
    *,
    limited: bool,
    groups: Sequence[str],
    resamples: int,
) -> Scores:
    """Returns the scores of a split. Questions about one image are resampled together.

    Args:
        records: of the split.
        vocabulary: of the training split; None if nothing was trained.
        limited: whether all answers come from the vocabulary.
        groups: columns whose values form groups, besides `KINDS`.
        resamples: for the intervals; 0 for none.
    """
    figures = {"accuracy": _each(records, lambda r: score(r["prediction"], r["answers"]))}
    if vocabulary is not None:
        common = vocabulary.answers[0]
        figures["most common answer"] = _each(records, lambda r: score(common, r["answers"]))
        if limited:
            figures["within reach"] = _each(records, lambda r: vocabulary.reachable(r["answers"]))
    _, images = np.unique([record["image"] for record in records], return_inverse=True)

    def of(chosen: np.ndarray, names: Sequence[str]) -> list[Metric]:
        return [
            summed_metric(
                name,
                np.stack([figures[name][chosen], np.ones(len(chosen))], axis=1),
                _share,
                resamples=resamples,
                clusters=images[chosen],
            )
            for name in names
        ]

    truths = [truth(record["answers"]) for record in records]
    columns = [*(name for name in KINDS if name in records[0]["row"]), *groups]
    by_column = {
        column: _members([record["row"].get(column) for record in records]) for column in columns
    }
    by_column[BY_ANSWER] = dict(list(_members(truths, by_size=True).items())[:SHOWN_ANSWERS])
    main = list(figures)[:2]
    return Scores(
        of(np.arange(len(records)), list(figures)),
        {
            column: {value: of(chosen, main) for value, chosen in members.items()}
            for column, members in by_column.items()
        },
        _tables(records, truths, figures["accuracy"], vocabulary if limited else None),
    )


def _each(records: Sequence[Record], function: Callable[[Record], float]) -> np.ndarray:
    return np.array([function(record) for record in records])


def _share(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _members(values: Sequence[Any], *, by_size: bool = False) -> dict[str, np.ndarray]:
    """Returns the places of each value, in order of the values, or the largest group first."""
    names = np.array([str(value) for value in values])
    places = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
    if by_size:
        return dict(sorted(places.items(), key=lambda item: (-len(item[1]), item[0])))
    return places


def _tables(
    records: Sequence[Record],
    truths: Sequence[str],
    accuracy: np.ndarray,
    vocabulary: Vocabulary | None,
) -> list[Table]:
    wrong: Counter[tuple[str, ...]] = Counter(
        (right, record["prediction"])
        for record, right, value in zip(records, truths, accuracy, strict=True)
        if value == 0
    )
    tables = []
    if wrong:
        tables.append(
            Table("Most frequent mistakes", ("truth", "answered", "questions"), _rows(wrong))
        )
    if vocabulary is not None:
        unknown: Counter[tuple[str, ...]] = Counter(
            (t,) for t in truths if vocabulary.number(t) is None
        )
        if unknown:
            tables.append(
                Table(
                    "Answers that the vocabulary lacks",
                    ("answer", "questions"),
                    _rows(unknown),
                    f"{sum(unknown.values())} of {len(records)} questions, all counted as they are "
                    "answered. The vocabulary comes from the training split only.",
                )
            )
    return tables


def _rows(counts: Mapping[tuple[str, ...], int]) -> list[tuple[Any, ...]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(*key, count) for key, count in ordered[:SHOWN_ROWS]]
