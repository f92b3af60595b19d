"""Collects what is seen in each row, and draws the conclusions about a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config.schema import Split
from ...core.errors import BadRow
from ...core.findings import Finding
from ...core.rows import Rows
from ...core.task import Task
from ..media import media_digest, media_name
from .pictures import PictureFacts, PictureTally, picture_facts, picture_findings
from .repeats import AnswerHashes, Hashes, Keys, Place, answer_role, conflict_findings, part_of_file
from .results import RowPlace
from .sounds import (
    Durations,
    SoundTally,
    duration_column,
    duration_findings,
    seconds_of,
    sound_facts,
    sound_findings,
)
from .texts import text_findings

TEXTS = ("text", "texts", "label")  # kinds of columns that hold texts
_NOUNS = {"label": "label", "mask": "mask", "text": "transcript"}


class RowNames:
    """Names the rows of a split by the files of their pictures or recordings."""

    def __init__(self, task: Task, rows: Rows) -> None:
        self._rows = rows
        kinds = {role: column.kind for role, column in task.columns.items()}
        names = rows.column_names
        self._media = [r for r, kind in kinds.items() if kind in ("image", "audio") and r in names]

    def __call__(self, index: int) -> RowPlace:
        """Returns the place of a row."""
        try:
            row = self._rows[index]
        except Exception:  # doctor tells elsewhere that the row cannot be read
            return RowPlace(index, None)
        names = (media_name(row.get(role)) for role in self._media)
        return RowPlace(index, next((name for name in names if name), None))


@dataclass
class RowFacts:
    """Facts about the rows of a split, or of a sample of it.

    They are added up: the memory that they take is that of some numbers for each row.

    Attributes:
        rows: number of rows of the split.
        place: names a row.
        looked: number of rows that were looked at.
        keys: by role, hashes of each picture or recording.
        pictures: by role, what was seen in pictures.
        sounds: by role, what was heard in recordings.
        durations: of the recordings, in the files and as a column states them.
        answers: the label, transcript or mask of each row, with the part of its file.
    """

    rows: int
    place: Place
    looked: int = 0
    keys: Keys = field(default_factory=dict)
    pictures: dict[str, PictureTally] = field(default_factory=dict)
    sounds: dict[str, SoundTally] = field(default_factory=dict)
    durations: Durations = field(default_factory=Durations)
    answers: AnswerHashes = field(default_factory=AnswerHashes)

    def add(self, index: int, facts: Mapping[str, Any]) -> None:
        """Adds the facts of a row, as `facts_of` gives them. Rows come in rising order."""
        self.looked += 1
        for role, key in facts.get("keys", {}).items():
            self.keys.setdefault(role, Hashes()).add(key, index)
        for role, fact in facts.get("media", {}).items():
            if isinstance(fact, PictureFacts):
                self.pictures.setdefault(role, PictureTally()).add(index, fact, self.place)
            else:
                self.sounds.setdefault(role, SoundTally()).add(index, fact, self.place)
        if "seconds" in facts:
            self.durations.add(index, facts["stated"], facts["seconds"])
        if facts.get("answer") is not None:
            self.answers.add(index, facts["answer"], facts.get("part", ""))

    def where(self, noun: str, split: Split) -> str:
        """Returns the words for the rows that were looked at ("of the 40 pictures of train")."""
        if self.looked < self.rows:
            return f"of {self.looked:,} {noun} looked at, of the {self.rows:,} of {split},"
        return f"of the {self.rows:,} {noun} of {split}"


def facts_of(
    task: Task,
    row: Mapping[str, Any],
    *,
    keys: bool = True,
    decoded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what is seen in a row; it can be pickled.

    A row that cannot be read has no facts: its problem is told elsewhere.

    Args:
        keys: whether files are hashed, to find them again.
        decoded: by role, pictures of the row that are decoded already.
    """
    facts: dict[str, Any] = {"keys": {}, "media": {}}
    for role, column in task.columns.items():
        value = row.get(role)
        if column.kind not in ("image", "audio") or value is None:
            continue
        if keys and (digest := media_digest(value)) is not None:
            facts["keys"][role] = digest
            facts["part"] = part_of_file(row, value)
        try:
            see = picture_facts if column.kind == "image" else sound_facts
            facts["media"][role] = see((decoded or {}).get(role, value))
        except BadRow:
            continue
        if column.kind == "audio" and (name := duration_column(list(row))) is not None:
            facts |= {"seconds": seconds_of(value), "stated": row[name]}
    answering = answer_role(task.columns)
    if keys and answering is not None:
        facts["answer"] = answer_of(row.get(answering), task.columns[answering].kind)
    return facts


def answer_of(value: Any, kind: str) -> str | None:
    """Returns a text that is equal for equal labels, transcripts or masks; None for none."""
    if value is None:
        return None
    return media_digest(value) if kind == "mask" else str(value).strip()


def findings_of(task: Task, split: Split, rows: Rows, facts: RowFacts) -> list[Finding]:
    """Returns what is suspicious about the media, the texts and the answers of a split."""
    results = media_findings(task, split, rows, facts)
    results += texts_of(task, split, rows, facts.place)
    return results + conflicts_of(task, split, rows, facts)


def media_findings(task: Task, split: Split, rows: Rows, facts: RowFacts) -> list[Finding]:
    """Returns what is suspicious about the pictures and recordings of a split."""
    results: list[Finding] = []
    bits, pictures = task.config.data.bits, facts.where("pictures", split)
    for seen in facts.pictures.values():
        results += picture_findings(seen, where=pictures, bits=bits, train=split == "train")
    recordings = facts.where("recordings", split)
    for heard in facts.sounds.values():
        results += sound_findings(heard, where=recordings)
    column = duration_column(rows.column_names) or ""
    return results + duration_findings(
        facts.durations, facts.place, column=column, where=recordings
    )


def conflicts_of(task: Task, split: Split, rows: Rows, facts: RowFacts) -> list[Finding]:
    """Returns what is suspicious about rows of the same picture or recording."""
    role = answer_role(task.columns)
    if role is None:
        return []
    kind = task.columns[role].kind

    def said(index: int) -> tuple[RowPlace, str]:
        return facts.place(index), answer_of(rows[index].get(role), kind) or ""

    return conflict_findings(facts.keys, facts.answers, said, split=split, noun=_NOUNS[kind])


def texts_of(task: Task, split: Split, rows: Rows, place: Place) -> list[Finding]:
    """Returns what is suspicious about the texts of a split."""
    results = []
    where = f"of the {len(rows):,} rows of {split}"
    for role, column in task.columns.items():
        if column.kind in TEXTS and role in rows.column_names:
            results += text_findings(rows[role], place, role=role, where=where)
    return results
