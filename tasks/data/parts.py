"""The splits of a source before they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

    from ..core.findings import Finding


@dataclass(frozen=True)
class Piece:
    """Rows that are read together.

    Attributes:
        read: reads them.
        folder: the folder from which their relative paths start; None where they have none.
        columns: the column of each role that a known layout calls by another name.
        findings: what is suspicious about the files of the source, such as those of no row.
    """

    read: Callable[[], Dataset]
    folder: Path | None
    columns: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


# The pieces of each split by the source's own name of the split; "" where it names no split.
Parts = dict[str, list[Piece]]
