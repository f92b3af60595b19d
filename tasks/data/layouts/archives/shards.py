"""Pieces of rows whose files lie in tars or in folders."""

from __future__ import annotations

import itertools
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...parts import Piece
from ...tables.json_rows import rows_table, text_columns
from ...wanted import Wanted
from .members import Member, MemberRows, role_columns
from .tars import is_compressed, tar_members

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = 200  # in a block


@dataclass(frozen=True)
class ArchiveShard:
    """The rows of one tar, or of one folder.

    Attributes:
        place: the tar or the folder.
        texts: the columns that the task reads as text.
    """

    place: Path
    texts: frozenset[str]

    def blocks(self) -> Iterator[Dataset]:
        return self._blocks(ROWS, Counter())

    def whole(self, passed_over: Counter[str]) -> list[dict[str, Any]]:
        """Returns all rows, with references to their media.

        Args:
            passed_over: takes the number of members of each suffix that no task reads.

        Raises:
            ValueError: the rows cannot be read, or their media would be held in memory.
        """
        if is_compressed(self.place):
            raise ValueError(
                f"{self.place} is compressed, and all its media would be held in memory: set "
                "data.streaming: true, or decompress it"
            )
        return self._taken(MemberRows(self._members(), passed_over), None)

    def first(self, passed_over: Counter[str]) -> Dataset | None:
        """Returns the first rows, or None if there are none."""
        return next(self._blocks(ROWS, passed_over), None)

    def _blocks(self, size: int, passed_over: Counter[str]) -> Iterator[Dataset]:
        rows = iter(MemberRows(self._members(), passed_over))
        while block := self._taken(rows, size):
            yield as_dataset(block, self.texts, self.place)

    def _taken(self, rows: Any, count: int | None) -> list[dict[str, Any]]:
        try:
            return list(itertools.islice(rows, count))
        except ValueError as error:
            raise ValueError(f"data.source: {self.place} cannot be read: {error}") from None

    def _members(self) -> Iterator[Member]:
        return _files(self.place) if self.place.is_dir() else tar_members(self.place)


def as_dataset(rows: list[dict[str, Any]], texts: frozenset[str], place: Path) -> Dataset:
    """Returns a data set of rows.

    Raises:
        ValueError: a column of texts holds a list or an object in some rows.
    """
    import datasets

    try:
        return datasets.Dataset(rows_table(rows, [None] * len(rows), texts))
    except ValueError as error:
        raise ValueError(f"data.source: {place} cannot be read: {error}") from None


def archive_piece(wanted: Wanted, places: Sequence[Path]) -> Piece:
    """Returns the rows of tars or folders as a piece.

    Raises:
        ValueError: the first one cannot be read.
    """
    texts = text_columns(wanted)
    shards = [ArchiveShard(place, texts) for place in places]
    passed_over: Counter[str] = Counter()
    first = next((b for s in shards if (b := s.first(passed_over)) is not None), None)
    if first is None:
        raise ValueError(
            f"data.source: {places[0]} has no files that are called KEY.jpg, KEY.txt and so on"
        )

    def read() -> Dataset:
        passed: Counter[str] = Counter()
        rows = [row for shard in shards for row in shard.whole(passed)]
        _warn(places[0], passed, "")
        return as_dataset(rows, texts, places[0])

    def streamed() -> Sequence[ArchiveShard]:
        _warn(places[0], passed_over, f"the first {ROWS} rows of ")
        return shards

    return Piece(read, None, role_columns(first.column_names), shards=streamed)


def _warn(place: Path, passed_over: Counter[str], some: str) -> None:
    if passed_over:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common())
        warnings.warn(
            f"data.source: files in {some}{place} are in formats that no task reads, and were "
            f"passed over: {kinds}",
            stacklevel=3,
        )


def _files(folder: Path) -> Iterator[Member]:
    """Yields the files of a folder, in the order of their names."""
    for name in sorted(os.listdir(folder)):
        file = folder / name
        if not name.startswith(".") and file.is_file():
            yield Member(name, file.resolve().as_posix, file.read_bytes)
