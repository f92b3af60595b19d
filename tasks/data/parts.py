"""The splits of a source before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.findings import Finding


class Shard(Protocol):
    """Rows that a stream reads in their order, such as those of one file. It can be pickled."""

    def blocks(self) -> Iterator[Dataset]:
        """Yields the rows in blocks of equal columns, without holding all of them.

        Raises:
            ValueError: the rows cannot be read.
        """


@dataclass(frozen=True)
class Piece:
    """Rows that are read together.

    Attributes:
        read: reads them.
        folder: the folder from which their relative paths start; None where they have none.
        columns: the column of each role that a known layout calls by another name.
        findings: what is suspicious about the files of the source, such as those of no row.
        shards: looks at the rows and returns the shards that a stream reads instead, with the same
            rows; None where a stream reads all rows at once too.
    """

    read: Callable[[], Dataset]
    folder: Path | None
    columns: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    shards: Callable[[], Sequence[Shard]] | None = None


# The pieces of each split by the source's own name of the split; "" where it names no split.
Parts = dict[str, list[Piece]]
