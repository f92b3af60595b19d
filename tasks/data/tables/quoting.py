"""Decides by what a table shows whether a `"` encloses cells or is a character like others.

A file is quoted if every `"` in it stands as RFC 4180 asks: at both ends of a cell, or doubled
within one. Otherwise it is not quoted, as Common Voice's tables and captions that quote a sign. A
few files can be read both ways, with different rows. A TSV is then not quoted, since the format has
no quotes; any other table is refused until `data.quoting` says which is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST = 10_000  # lines that one quoted cell may have


@dataclass(frozen=True)
class Quotes:
    """The quotes of a table.

    Attributes:
        regular: whether there are quotes and every one stands as RFC 4180 asks.
        breaks: (first, last) numbers of the lines, from 1, of each row with line breaks in a cell.
        inside: the number of lines, without empty ones, that go on with a cell and begin no row.
    """

    regular: bool
    breaks: tuple[tuple[int, int], ...] = ()
    inside: int = 0


def find_quotes(lines: Sequence[str], separator: str) -> Quotes:
    """Looks at all quotes of a table."""
    mark = re.escape(separator)
    cell = rf'(?:"(?:[^"]|"")*"|[^"{mark}]*)'
    row = re.compile(rf"{cell}(?:{mark}{cell})*")
    breaks: list[tuple[int, int]] = []
    there, place = False, 0
    while place < len(lines):
        line = lines[place]
        place += 1
        if '"' not in line:
            continue
        there = True
        if row.fullmatch(line):
            continue
        last = _closing(lines, place)
        if last is None or not row.fullmatch("\n".join(lines[place - 1 : last])):
            return Quotes(regular=False)
        breaks.append((place, last))
        place = last
    inside = sum(1 for first, last in breaks for line in lines[first:last] if line)
    return Quotes(there, tuple(breaks), inside)


def _closing(lines: Sequence[str], place: int) -> int | None:
    """Returns the number of the line on which the cell closes that line `place` opens."""
    marks = lines[place - 1].count('"')
    for last in range(place, min(place + _LONGEST, len(lines))):
        more = lines[last].count('"')
        marks += more
        if more and marks % 2 == 0:
            return last + 1
    return None


def are_quoted(quotes: Quotes, lines: Sequence[str], separator: str, *, columns: int) -> bool:
    """Returns whether quotes enclose cells.

    Args:
        columns: the number of the table's columns.

    Raises:
        ValueError: the table can be read both ways, with different rows.
    """
    if not quotes.regular:
        return False
    even = all(line.count(separator) == columns - 1 for line in lines if line)
    if not quotes.breaks or not even:
        return True
    if separator == "\t":
        return False
    first, last = quotes.breaks[0]
    raise ValueError(
        f"lines {first} to {last} are one row if the quotes in them enclose a cell, and "
        f"{last - first + 1} rows if they are characters like others: set data.quoting to true or "
        "to false"
    )
