"""The splits of a data set that consists of tables."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from ..parts import Parts, Piece
from ..splits import KNOWN
from ..tables.read import TABLES, read_tables
from ..tables.shards import table_shards
from ..wanted import Wanted


def table_parts(wanted: Wanted, files: Sequence[Path]) -> Parts:
    """Returns the splits of the tables of one data set: those that the file names begin with, or
    one split if some name begins with none."""
    if odd := [file for file in files if file.suffix.lower() not in TABLES]:
        raise ValueError(
            f"data.source: {odd[0]} is none of {', '.join(TABLES)}; a folder of media needs a "
            f"metadata.csv with a column {'file_name'!r}"
        )
    named = [split_of_file(file.name) for file in files]
    if len(files) == 1 or None in named:
        return {"": table_pieces(wanted, files)}
    parts: dict[str, list[Path]] = {}
    for name, file in zip(named, files, strict=True):
        parts.setdefault(str(name), []).append(file)
    return {name: table_pieces(wanted, some) for name, some in parts.items()}


def split_of_file(name: str) -> str | None:
    """Returns the split that a file's name begins with, or None."""
    first = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return first if first in KNOWN else None


def table_pieces(wanted: Wanted, files: Sequence[Path]) -> list[Piece]:
    """Returns the pieces of a split: the tables of each folder are read together.

    Their relative paths start in data.root, or else in that folder.
    """
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file)
    return [
        Piece(
            lambda some=tuple(some): read_tables(wanted, some),  # type: ignore[misc]
            wanted.root(folder),
            shards=functools.partial(table_shards, wanted, tuple(some)),
        )
        for folder, some in by_folder.items()
    ]
