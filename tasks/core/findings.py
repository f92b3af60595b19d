"""Facts about a data set at which a person would stop before training on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["suspicious", "unusable"]
NAMED = 5  # rows that a sentence names


@dataclass(frozen=True)
class Finding:
    """A fact about a data set that makes it suspicious, or unusable.

    Attributes:
        sentence: what is wrong and where: the split, the number of rows, the first of them.
        remedy: what to do; "" if the sentence says it.
        severity: unusable if nothing can be learned or measured as long as it is so.
    """

    sentence: str
    remedy: str = ""
    severity: Severity = "suspicious"

    def __str__(self) -> str:
        return f"{self.sentence}: {self.remedy}" if self.remedy else self.sentence


@dataclass
class Places:
    """Rows: how many there are, and the first few of them.

    It is as long as there are rows, and holds as much memory as a few. A slice gives rows of the
    first that it has.
    """

    count: int = 0
    first: list[Any] = field(default_factory=list)

    def add(self, index: int, place: Callable[[int], Any] = int) -> None:
        """Adds a row; `place` names it, and is called for the first few alone."""
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(place(index))

    def merge(self, later: Places) -> None:
        """Adds rows that come after those that are here."""
        self.count += later.count
        self.first = [*self.first, *later.first][:NAMED]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: slice) -> list[Any]:
        return self.first[key]


def named_rows(places: Sequence[Any] | Places) -> str:
    """Returns the words for the first rows of a finding: "row 3", "rows 3, 5, … (12 in all)"."""
    shown = ", ".join(map(str, places[:NAMED]))
    if len(places) > NAMED:
        return f"rows {shown}, … ({len(places):,} in all)"
    return f"row {shown}" if len(places) == 1 else f"rows {shown}"


def quoted(names: Sequence[str], most: int = NAMED) -> str:
    """Returns names in quotes, the first few of them: "'a', 'b' and 3 more"."""
    shown = ", ".join(repr(name) for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
