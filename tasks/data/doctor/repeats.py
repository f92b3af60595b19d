"""Finds pictures and recordings that are there several times: in two splits, or with two labels."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...config.schema import Split
from ...core.findings import Finding
from ...core.rows import Column, Rows
from .results import RowPlace

SHOWN = 5  # pairs of rows that a sentence names
# Columns that say which part of a file a row is about.
_PARTS = ("offset", "start", "begin", "start_time", "segment_start")


# Names a row of a split.
Place = Callable[[int], RowPlace]


def _numbers() -> array:
    return array("Q")


@dataclass
class Hashes:
    """The pictures or recordings of a split by hashes of 64 bits, in 16 bytes for each.

    Among a million different files two have the same hash with a probability of 3e-8.
    """

    keys: array = field(default_factory=_numbers)
    rows: array = field(default_factory=_numbers)

    def add(self, key: str, index: int) -> None:
        """Adds what is equal for equal pictures of a row (a digest, or a path)."""
        self.keys.append(_hash(key))
        self.rows.append(index)

    def __len__(self) -> int:
        return len(self.rows)

    def found_in(self, others: Hashes) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows that are among others too, and for each the first row there."""
        if not len(self) or not len(others):
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        known, sought = np.array(others.keys), np.array(self.keys)
        order = np.argsort(known, kind="stable")
        at = np.searchsorted(known, sought, sorter=order)
        at = order[np.minimum(at, len(known) - 1)]
        same = known[at] == sought
        return np.array(self.rows)[same], np.array(others.rows)[at[same]]


# By role.
Keys = dict[str, Hashes]


@dataclass
class AnswerHashes:
    """The labels, transcripts or masks of rows in rising order, by hashes, in 24 bytes for each.

    Attributes:
        rows: the numbers of the rows.
        texts: hashes that are equal for equal answers.
        parts: hashes of words for the part of its file that a row is about.
    """

    rows: array = field(default_factory=_numbers)
    texts: array = field(default_factory=_numbers)
    parts: array = field(default_factory=_numbers)

    def add(self, index: int, text: str, part: str = "") -> None:
        """Adds the answer of a row; `part` is "" if it is about the whole file."""
        self.rows.append(index)
        self.texts.append(_hash(text))
        self.parts.append(_hash(part) | 1)

    def conflicts(self, hashes: Hashes) -> list[tuple[int, int]]:
        """Returns pairs of rows of one key and part with different answers: each such row, and the
        first row of its key and part."""
        if not self.rows or not len(hashes):
            return []
        answered, rows = np.array(self.rows), np.array(hashes.rows)
        at = np.minimum(np.searchsorted(answered, rows), len(answered) - 1)
        there = answered[at] == rows
        at, rows = at[there], rows[there]
        texts = np.array(self.texts)[at]
        # A product with an odd number keeps different parts of a file apart.
        groups = np.array(hashes.keys)[there] * np.array(self.parts)[at]
        order = np.argsort(groups, kind="stable")
        starts = np.r_[True, groups[order][1:] != groups[order][:-1]]
        first = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
        other = texts[order] != texts[first]
        pairs = zip(rows[order[other]].tolist(), rows[first[other]].tolist(), strict=True)
        return sorted(pairs)


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def shared_findings(keys: Mapping[Split, Keys], places: Mapping[Split, Place]) -> list[Finding]:
    """Returns a finding for each two splits that share pictures or recordings: figures on them are
    too good.

    Args:
        places: name the rows of each split.
    """
    leaks = []
    names = list(keys)
    for i, later in enumerate(names):
        for earlier in names[:i]:
            for role in keys[later]:
                ours, theirs = keys[later][role].found_in(keys[earlier].get(role, Hashes()))
                if not len(ours):
                    continue
                shown = zip(ours[:SHOWN].tolist(), theirs[:SHOWN].tolist(), strict=True)
                some = "; ".join(f"{places[later](a)} = {places[earlier](b)}" for a, b in shown)
                text = (
                    f"{len(ours)} of {len(keys[later][role])} rows of {later} have the same "
                    f"{role} as a row of {earlier}: {some}" + ("; …" if len(ours) > SHOWN else "")
                )
                remedy = f"leave them out of one of the two, since figures on {later} are too good"
                leaks.append(Finding(text, remedy))
    return leaks


def conflict_findings(
    keys: Keys,
    answers: AnswerHashes,
    said: Callable[[int], tuple[RowPlace, str]],
    *,
    split: Split,
    noun: str,
) -> list[Finding]:
    """Returns a finding for equal pictures or recordings of a split with different answers.

    Args:
        answers: of the rows.
        said: names a row and gives the text of its answer.
        noun: the word for them ("label").
    """
    results = []
    for role, hashes in keys.items():
        if pairs := answers.conflicts(hashes):
            some = "; ".join(_pair(*said(row), *said(other)) for row, other in pairs[:SHOWN])
            results.append(
                Finding(
                    f"{len(pairs):,} {'row' if len(pairs) == 1 else 'rows'} of {split} repeat the "
                    f"{role} of another row with another {noun}: {some}"
                    + ("; …" if len(pairs) > SHOWN else ""),
                    f"give each {role} one row with its right {noun}",
                )
            )
    return results


def _pair(place: RowPlace, answer: str, other: RowPlace, others: str) -> str:
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
