"""Reads JSON lines in blocks of rows, whose columns have the types of the whole file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..wanted import Wanted
from .encodings import read_lines
from .json_rows import JsonColumn, json_array, role_columns, rows_of_lines, text_columns

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000  # in a block


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON lines.

    Attributes:
        types: the type of each column, the keys of all rows together.
    """

    file: Path
    encoding: str | None
    types: Mapping[str, pa.DataType]

    def blocks(self) -> Iterator[pa.Table]:
        """Yields the rows.

        Raises:
            ValueError: the file has changed since it was looked through.
        """
        import pyarrow as pa

        for rows, _ in _blocks(self.file, self.encoding):
            yield pa.table(
                {
                    name: json_array([row.get(name) for row in rows], kind)
                    for name, kind in self.types.items()
                }
            )


def json_lines(wanted: Wanted, file: Path) -> JsonLines | None:
    """Looks through a file of JSON lines; returns None for a list, or an object around one.

    Raises:
        ValueError: a line is not valid JSON, or no object with keys.
    """
    encoding = wanted.config.encoding
    if not _is_lines(file, encoding, role_columns(wanted)):
        return None
    texts = text_columns(wanted)
    columns: dict[str, JsonColumn] = {}
    for rows, lines in _blocks(file, encoding):
        for name in dict.fromkeys(key for row in rows for key in row):
            column = columns.setdefault(name, JsonColumn(name, text=name in texts))
            column.look_at([row.get(name) for row in rows], lines)
    return JsonLines(file, encoding, {name: column.arrow for name, column in columns.items()})


def _is_lines(file: Path, encoding: str | None, columns: frozenset[str]) -> bool:
    filled = (line for line in read_lines(file, encoding) if line.strip())
    first = next(filled, "")
    if not first.strip().startswith("{"):
        return False
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return next(filled, None) is not None or not columns.isdisjoint(row)


def _blocks(
    file: Path, encoding: str | None
) -> Iterator[tuple[list[dict[str, Any]], list[int | None]]]:
    """Yields the rows of each block and the numbers of their lines."""
    rows = rows_of_lines(read_lines(file, encoding))
    while block := list(itertools.islice(rows, ROWS)):
        yield [row for _, row in block], [number for number, _ in block]
