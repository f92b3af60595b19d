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
from ..media import media_digest
from .pictures import PictureFacts, picture_facts, picture_findings
from .repeats import Answer, Keys, answer_role, conflict_findings, part_of_file
from .results import RowPlace
from .sounds import (
    SoundFacts,
    duration_column,
    duration_findings,
    seconds_of,
    sound_facts,
    sound_findings,
)
from .texts import text_findings

TEXTS = ("text", "texts", "label")  # kinds of columns that hold texts
_NOUNS = {"label": "label", "mask": "mask", "text": "transcript"}


@dataclass
class RowFacts:
    """Facts about the rows of a split, or of a sample of it.

    Attributes:
        rows: number of rows of the split.
        looked: number of rows that were looked at.
        keys: by role, the hash of each picture or recording.
        pictures: by role, the facts of each picture.
        sounds: by role, the facts of each recording.
        seconds: of each recording, by row.
        stated: the durations that a column states, by row.
        answers: the label, transcript or mask of each row, with the part of its file.
        places: each row with the name of its file.
    """

    rows: int
    looked: int = 0
    keys: Keys = field(default_factory=dict)
    pictures: dict[str, list[tuple[RowPlace, PictureFacts]]] = field(default_factory=dict)
    sounds: dict[str, list[tuple[RowPlace, SoundFacts]]] = field(default_factory=dict)
    seconds: dict[RowPlace, float] = field(default_factory=dict)
    stated: dict[RowPlace, Any] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)
    places: dict[int, RowPlace] = field(default_factory=dict)

    def add(self, place: RowPlace, facts: Mapping[str, Any]) -> None:
        """Adds the facts of a row, as `facts_of` gives them."""
        self.looked += 1
        self.places[place.index] = place
        for role, key in facts.get("keys", {}).items():
            self.keys.setdefault(role, []).append((key, place))
        for role, fact in facts.get("media", {}).items():
            if isinstance(fact, PictureFacts):
                self.pictures.setdefault(role, []).append((place, fact))
            else:
                self.sounds.setdefault(role, []).append((place, fact))
        if "seconds" in facts:
            self.seconds[place], self.stated[place] = facts["seconds"], facts["stated"]
        if facts.get("answer") is not None:
            self.answers[place.index] = Answer(facts["answer"], facts.get("part", ""))

    def where(self, noun: str, split: Split) -> str:
        """Returns the words for the rows that were looked at ("of the 40 pictures of train")."""
        if self.looked < self.rows:
            return f"of {self.looked:,} {noun} looked at, of the {self.rows:,} of {split},"
        return f"of the {self.rows:,} {noun} of {split}"


def facts_of(task: Task, row: Mapping[str, Any], *, keys: bool = True) -> dict[str, Any]:
    """Returns what is seen in a row; it can be pickled.

    A row that cannot be read has no facts: its problem is told elsewhere.

    Args:
        keys: whether files are hashed, to find them again.
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
            facts["media"][role] = see(value)
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
    results += texts_of(task, split, rows, facts.places)
    return results + conflicts_of(task, split, facts.keys, facts.answers)


def media_findings(task: Task, split: Split, rows: Rows, facts: RowFacts) -> list[Finding]:
    """Returns what is suspicious about the pictures and recordings of a split."""
    results: list[Finding] = []
    bits, pictures = task.config.data.bits, facts.where("pictures", split)
    for of_role in facts.pictures.values():
        results += picture_findings(of_role, where=pictures, bits=bits, train=split == "train")
    recordings = facts.where("recordings", split)
    for sounds in facts.sounds.values():
        results += sound_findings(sounds, where=recordings)
    if facts.stated:
        column = duration_column(rows.column_names) or ""
        results += duration_findings(facts.stated, facts.seconds, column=column, where=recordings)
    return results


def conflicts_of(
    task: Task, split: Split, keys: Keys, answers: Mapping[int, Answer]
) -> list[Finding]:
    """Returns what is suspicious about rows of the same picture or recording."""
    role = answer_role(task.columns)
    if role is None:
        return []
    return conflict_findings(keys, answers, split=split, noun=_NOUNS[task.columns[role].kind])


def texts_of(task: Task, split: Split, rows: Rows, places: Mapping[int, RowPlace]) -> list[Finding]:
    """Returns what is suspicious about the texts of a split."""
    results = []
    where = f"of the {len(rows):,} rows of {split}"
    for role, column in task.columns.items():
        if column.kind in TEXTS and role in rows.column_names:
            values = ((places.get(i, RowPlace(i, None)), v) for i, v in enumerate(rows[role]))
            results += text_findings(values, role=role, where=where)
    return results
