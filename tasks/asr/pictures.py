"""Pictures of the report: error rates by group, the worst utterances, the most frequent errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..core.metrics import Metric
from ..core.plots import bars_with_intervals, figure_png
from ..core.results import Figure, Table
from ..core.rows import Record
from .metrics import CER, CHARACTER_ERRORS, WER, WORD_ERRORS, WORDS, aligned, misheard


def illustrate(
    records: Sequence[Record],
    groups: Mapping[str, Mapping[str, Sequence[Metric]]],
    *,
    count: int,
) -> list[Figure | Table]:
    """Returns a chart for each column of groups, and the tables that have a row.

    Args:
        groups: the metrics by column and value, as in `Scores.groups`.
        count: the most rows of a table.
    """
    shown: list[Figure | Table] = []
    for column, values in groups.items():
        rates = sorted(
            ((value, metrics[0]) for value, metrics in values.items()),
            key=lambda item: -item[1].value,
        )
        name = next(iter(values.values()))[0].name if values else WER
        title = "character error rate" if name == CER else "word error rate"
        chart = bars_with_intervals(dict(rates), title=title)
        caption = f"By {column}, the highest first; lines are 95 % intervals."
        shown.append(Figure(f"{name} by {column}", figure_png(chart), caption))
    tables = (worst(records, count=count), confusions(records, count=count))
    return [*shown, *(table for table in tables if table.rows)]


def worst(records: Sequence[Record], *, count: int) -> Table:
    """Returns the utterances with most word errors: the reference above the recognised text."""
    ordered = sorted(
        (record for record in records if record["counts"][WORD_ERRORS]),
        key=lambda r: (-r["counts"][WORD_ERRORS], -r["counts"][CHARACTER_ERRORS]),
    )
    rows = []
    for record in ordered[:count]:
        errors = f"{record['counts'][WORD_ERRORS]} of {record['counts'][WORDS]}"
        lines = "\n".join(aligned(record["reference"], record["hypothesis"]))
        rows.append((record["index"], errors, lines))
    caption = (
        "Said above heard. Capitals: heard as another word; --- below: not heard; *** above: heard "
        "and not said."
    )
    return Table("Worst utterances", ("row", "word errors", "said and heard"), rows, caption)


def confusions(records: Sequence[Record], *, count: int) -> Table:
    """Returns the most frequent errors, without those that come only once."""
    errors = Counter(
        pair for record in records for pair in misheard(record["reference"], record["hypothesis"])
    )
    rows = [
        (said or "(nothing)", heard or "(nothing)", times)
        for (said, heard), times in errors.most_common(count)
        if times > 1
    ]
    return Table("Most frequent errors", ("said", "heard", "times"), rows)
