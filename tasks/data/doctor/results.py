"""The results of an examination: what was seen of each split, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...config.schema import Split
from ...core.findings import Finding
from ...core.results import Table

# fine; suspicious: every row can be used, but a person should look before training on them;
# unusable: rows cannot be used, or nothing can be learned from them.
Verdict = Literal["fine", "suspicious", "unusable"]


@dataclass(frozen=True)
class RowPlace:
    """A row: its number in its split and the name of its file, or None."""

    index: int
    name: str | None

    def __str__(self) -> str:
        return f"{self.index}" if self.name is None else f"{self.index} ({self.name})"


@dataclass(frozen=True)
class Group:
    """Rows with the same problem.

    Attributes:
        reason: the reason of the first row, with its numbers and names.
        count: number of rows.
        places: the first few rows.
    """

    reason: str
    count: int
    places: tuple[RowPlace, ...]


@dataclass
class SplitReport:
    """The result for one split.

    Attributes:
        rows: number of rows.
        usable: number of rows that can be used.
        problems: rows that cannot be used.
        notes: rows that can be used but that the task remarks on.
        errors: problems of the split as a whole.
        tables: the task's own tables about the split.
        made: number of rows of which training examples were made. All are read and decoded.
        partial: whether only the first rows of a stream were read.
    """

    name: Split
    rows: int
    usable: int = 0
    problems: list[Group] = field(default_factory=list)
    notes: list[Group] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    made: int = 0
    partial: bool = False

    @property
    def ok(self) -> bool:
        """Whether every row of the split can be used."""
        return not self.errors and not self.problems


@dataclass
class DataReport:
    """The results for all splits, and the findings about the data set as a whole."""

    splits: list[SplitReport]
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row of every split can be used; findings and notes are ignored."""
        return bool(self.splits) and all(split.ok for split in self.splits)

    @property
    def warnings(self) -> list[str]:
        """The sentences of the findings, without their remedies."""
        return [finding.sentence for finding in self.findings]

    @property
    def verdict(self) -> Verdict:
        """Whether the data are fine, suspicious or unusable."""
        if not self.ok or any(finding.severity == "unusable" for finding in self.findings):
            return "unusable"
        return "suspicious" if self.findings else "fine"
