"""Decides by what a table shows whether a `"` encloses cells or is a character like others.

A file is quoted if every `"` in it stands as RFC 4180 asks: at both ends of a cell, or doubled
within one. Otherwise it is not quoted, as Common Voice's tables and captions that quote a sign. A
few files can be read both ways, with different rows. A TSV is then not quoted, since the format has
no quotes; any other table is refused until `data.quoting` says which is right.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST = 10_000  # lines that one quoted cell may have


@dataclass(frozen=True)
class Quotes:
    """The quotes of a table.

    Attributes:
        regular: whether there are quotes and every one stands as RFC 4180 asks.
        broken: (first, last) numbers of the lines, from 1, of the first row with line breaks in a
            cell; None if no row has any.
        even: whether every line has a cell for each column, if quotes are characters like others.
    """

    regular: bool
    broken: tuple[int, int] | None = None
    even: bool = True


def find_quotes(lines: Iterable[str], separator: str, *, columns: int) -> Quotes:
    """Looks at all quotes of a table.

    Args:
        columns: the number of the table's columns.
    """
    mark = re.escape(separator)
    cell = rf'(?:"(?:[^"]|"")*"|[^"{mark}]*)'
    row = re.compile(rf"{cell}(?:{mark}{cell})*")
    there, even, broken = False, True, None
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        even = even and (not line or line.count(separator) == columns - 1)
        if '"' not in line:
            continue
        there = True
        if row.fullmatch(line):
            continue
        more = _closing(line, numbered)
        if more is None or not row.fullmatch("\n".join([line, *more])):
            return Quotes(regular=False)
        even = even and all(not m or m.count(separator) == columns - 1 for m in more)
        broken = broken or (number, number + len(more))
    return Quotes(there, broken, even)


def _closing(line: str, numbered: Iterable[tuple[int, str]]) -> list[str] | None:
    """Returns the lines up to the one on which the cell closes that `line` opens."""
    marks = line.count('"')
    more = []
    for _, following in itertools.islice(numbered, _LONGEST):
        more.append(following)
        inside = following.count('"')
        marks += inside
        if inside and marks % 2 == 0:
            return more
    return None


def are_quoted(quotes: Quotes, separator: str) -> bool:
    """Returns whether quotes enclose cells.

    Raises:
        ValueError: the table can be read both ways, with different rows.
    """
    if not quotes.regular:
        return False
    if quotes.broken is None or not quotes.even:
        return True
    if separator == "\t":
        return False
    first, last = quotes.broken
    raise ValueError(
        f"lines {first} to {last} are one row if the quotes in them enclose a cell, and "
        f"{last - first + 1} rows if they are characters like others: set data.quoting to true or "
        "to false"
    )
