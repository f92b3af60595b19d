"""Finds pictures and recordings that are there several times: in two splits, or with two labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.schema import Split
from ...core.findings import Finding
from ...core.rows import Column, Rows
from .results import RowPlace

SHOWN = 5  # pairs of rows that a sentence names
# By role: the key of every picture or recording of a split (a hash, or a path), and its row.
Keys = dict[str, list[tuple[str, RowPlace]]]
# Columns that say which part of a file a row is about.
_PARTS = ("offset", "start", "begin", "start_time", "segment_start")


@dataclass(frozen=True)
class Answer:
    """The label, transcript or mask of a row.

    Attributes:
        text: equal for equal ones.
        part: words for the part of its file that the row is about; "" for the whole file.
    """

    text: str
    part: str = ""


def shared_findings(keys: Mapping[Split, Keys]) -> list[Finding]:
    """Returns a finding for each two splits that share pictures or recordings: figures on them are
    too good."""
    leaks = []
    names = list(keys)
    for i, later in enumerate(names):
        for earlier in names[:i]:
            for role in keys[later]:
                known = dict(reversed(keys[earlier].get(role, ())))
                hits = [(p, known[d]) for d, p in keys[later][role] if d in known]
                if not hits:
                    continue
                some = "; ".join(f"{place} = {other}" for place, other in hits[:SHOWN])
                text = (
                    f"{len(hits)} of {len(keys[later][role])} rows of {later} have the same "
                    f"{role} as a row of {earlier}: {some}" + ("; …" if len(hits) > SHOWN else "")
                )
                remedy = f"leave them out of one of the two, since figures on {later} are too good"
                leaks.append(Finding(text, remedy))
    return leaks


def conflict_findings(
    keys: Keys, answers: Mapping[int, Answer], *, split: Split, noun: str
) -> list[Finding]:
    """Returns a finding for equal pictures or recordings of a split with different answers.

    Args:
        answers: of the rows.
        noun: the word for them ("label").
    """
    results = []
    for role, rows in keys.items():
        first: dict[tuple[str, str], RowPlace] = {}
        pairs = []
        for key, place in rows:
            if (answer := answers.get(place.index)) is None:
                continue
            other = first.setdefault((key, answer.part), place)
            if answers[other.index].text != answer.text:
                pairs.append((place, other, answer.text, answers[other.index].text))
        if pairs:
            some = "; ".join(_pair(*pair) for pair in pairs[:SHOWN])
            results.append(
                Finding(
                    f"{len(pairs):,} {'row' if len(pairs) == 1 else 'rows'} of {split} repeat the "
                    f"{role} of another row with another {noun}: {some}"
                    + ("; …" if len(pairs) > SHOWN else ""),
                    f"give each {role} one row with its right {noun}",
                )
            )
    return results


def _pair(place: RowPlace, other: RowPlace, answer: str, others: str) -> str:
    if max(len(answer), len(others)) > 40:
        return f"{place} and {other}"
    return f"{place} {answer!r} and {other} {others!r}"


def answer_role(columns: Mapping[str, Column]) -> str | None:
    """Returns the role that says one thing about each picture or recording, or None.

    A picture may have many captions, and many questions. A label, a mask and a transcript are one.
    """
    kinds = {role: column.kind for role, column in columns.items()}
    for wanted in ("label", "mask"):
        if role := next((role for role, kind in kinds.items() if kind == wanted), None):
            return role
    texts = [role for role, kind in kinds.items() if kind == "text" and columns[role].required]
    return texts[0] if "audio" in kinds.values() and texts else None


def part_of_file(row: Mapping[str, Any], value: Any) -> str:
    """Returns words for the part of its file that a row is about; "" for the whole file."""
    parts = [str(row[name]) for name in _PARTS if row.get(name) is not None]
    if isinstance(value, Mapping):
        known = ("bytes", "path", "array", "sampling_rate")
        more = {k: v for k, v in value.items() if k not in known and v is not None}
        parts += [f"{key}={more[key]}" for key in sorted(more)]
    return " ".join(parts)


def about_parts(rows: Rows) -> bool:
    """Returns whether rows are about parts of files, as a column says."""
    return bool(set(_PARTS) & set(rows.column_names))


def paths_of(rows: Rows, role: str) -> Sequence[str | None]:
    """Returns the paths of the media of a column, without reading bytes that are in the rows.

    It is empty for rows that are no table of files.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    data = getattr(rows, "data", None)
    if data is None or role not in rows.column_names:
        return ()
    column = data.column(role)
    if not pa.types.is_struct(column.type):
        return ()
    fields = {column.type.field(i).name for i in range(column.type.num_fields)}
    if not {"bytes", "path"} <= fields:
        return ()
    if pc.struct_field(column, "bytes").null_count < len(column):
        return ()
    paths = pc.struct_field(column, "path")
    chosen = getattr(rows, "_indices", None)
    return (paths if chosen is None else paths.take(chosen.column(0))).to_pylist()
