"""Reads tables whose cells are separated by a mark: CSV, TSV, and those of bars or semicolons.

A table is looked through once, and then read in blocks of rows. `quoting` decides whether a `"`
encloses a cell or is a character like others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..wanted import Wanted
from .encodings import read_lines
from .quoting import are_quoted, find_quotes

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATORS = ("\t", "|", ",", ";")  # the first ones are the rarest within texts
_SAMPLE = 100  # lines from which the separator is recognised
_SHOWN = 60  # characters of a line in a message
_WHOLE = 64 << 20  # characters of a block of a table that is read as a whole
_INTEGERS = r"^(0|-?[1-9]\d{0,17})?$"  # only numbers that Python writes in the same way


@dataclass(frozen=True)
class DelimitedTable:
    """A table, and how its lines are cut into cells.

    Attributes:
        names: of the columns.
        skipped: the number of lines before the first row.
        quoted: whether quotes enclose cells.
        breaks: whether a cell may hold line breaks.
    """

    file: Path
    encoding: str | None
    separator: str
    names: tuple[str, ...]
    skipped: int
    quoted: bool
    breaks: bool

    def blocks(self, size: int) -> Iterator[pa.Table]:
        """Yields the rows, with all cells as text, so that "NA", dates and 007 stay as they are.

        Args:
            size: the number of characters of a block, after which the row is completed.

        Raises:
            ValueError: the text is in another encoding, or a line has more or fewer cells than the
                names of the columns.
        """
        lines = itertools.islice(read_lines(self.file, self.encoding), self.skipped, None)
        first = self.skipped + 1
        for block, rows in self._cut(lines, size):
            table = self._parsed(block, first)
            if table.num_rows != rows:
                raise ValueError(
                    f"it has {table.num_rows} rows in {rows} lines: say in data.quoting whether "
                    "quotes enclose its cells (true) or are characters like others (false)"
                )
            yield _stripped(table) if self.separator == "|" else table
            first += len(block)

    def _cut(self, lines: Iterable[str], size: int) -> Iterator[tuple[list[str], int]]:
        """Yields lines of whole rows and their number of rows; at least once."""
        block: list[str] = []
        length = rows = 0
        inside = False  # whether a cell goes on in the next line
        for line in lines:
            line = line.removesuffix("\r")
            block.append(line)
            length += len(line) + 1
            if line and not inside:
                rows += 1
            if self.breaks and line.count('"') % 2:
                inside = not inside
            if length >= size and not inside:
                yield block, rows
                block, length, rows = [], 0, 0
        yield block, rows

    def _parsed(self, lines: Sequence[str], first: int) -> pa.Table:
        """Parses lines, of which the first has the number `first` in the file."""
        import pyarrow as pa
        from pyarrow import csv

        bad: list[csv.InvalidRow] = []

        def note(row: csv.InvalidRow) -> str:
            bad.append(row)
            return "error"

        data = "\n".join(lines).encode("utf-8")
        size = _block_size(lines)
        columns = [str(i) for i in range(len(self.names))]  # names may stand twice: told later
        try:
            table = csv.read_csv(
                pa.BufferReader(data or b"\n"),
                read_options=csv.ReadOptions(
                    column_names=columns, block_size=size, use_threads=len(data) > size
                ),
                parse_options=csv.ParseOptions(
                    delimiter=self.separator,
                    quote_char='"' if self.quoted else False,
                    newlines_in_values=self.quoted,
                    invalid_row_handler=note,
                ),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
                ),
            )
        except pa.ArrowInvalid:
            if not bad:
                raise
            raise ValueError(_ragged(bad[0], lines, first, self.names)) from None
        return table.rename_columns(list(self.names))


def delimited_table(wanted: Wanted, file: Path) -> DelimitedTable:
    """Looks through a table, without reading its cells.

    Raises:
        ValueError: the text is in another encoding, or the quotes have two meanings.
    """
    config = wanted.config
    start = list(_start(_lines(file, config.encoding)))
    if not any(start):
        raise ValueError("it is empty")
    separator = config.separator or _separator(file, start)
    names, skipped = _names(start, separator, config.header)
    quotes = find_quotes(_lines(file, config.encoding), separator, columns=len(names))
    quoted = are_quoted(quotes, separator) if config.quoting is None else config.quoting
    breaks = quoted and quotes.broken is not None
    return DelimitedTable(
        file, config.encoding, separator, tuple(names), skipped, quoted=quoted, breaks=breaks
    )


def read_csv(wanted: Wanted, file: Path) -> pa.Table:
    """Reads a whole table.

    Raises:
        ValueError: as `delimited_table` and `DelimitedTable.blocks`.
    """
    import pyarrow as pa

    return pa.concat_tables(delimited_table(wanted, file).blocks(_WHOLE))


def _lines(file: Path, encoding: str | None) -> Iterator[str]:
    return (line.removesuffix("\r") for line in read_lines(file, encoding))


def _start(lines: Iterable[str]) -> Iterator[str]:
    """Yields lines until there are enough that hold text."""
    filled = 0
    for line in lines:
        yield line
        filled += bool(line)
        if filled == _SAMPLE:
            return


def _separator(file: Path, lines: Sequence[str]) -> str:
    """Returns the mark that stands equally often in all lines, outside of quotes."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    some = [re.sub(r'"(?:[^"]|"")*"', "", line) for line in lines if line]
    header = [mark for mark in SEPARATORS if mark in some[0]]
    even = [mark for mark in header if len({line.count(mark) for line in some}) == 1]
    return even[0] if even else "," if "," in header else (header or [","])[0]


def _names(
    lines: Sequence[str], separator: str, header: Sequence[str] | None
) -> tuple[list[str], int]:
    """Returns the names of the columns and the number of lines before the first row."""
    import csv

    first = next(i for i, line in enumerate(lines) if line)
    cells = next(csv.reader([lines[first]], delimiter=separator))
    if header is None:
        return [cell.strip() for cell in cells], first + 1
    if len(header) != len(cells):
        raise ValueError(
            f"data.header names {len(header)} columns, and line {first + 1} has {len(cells)} cells"
            f": {_short(lines[first])}"
        )
    return list(header), first


def _ragged(row: object, lines: Sequence[str], first: int, names: Sequence[str]) -> str:
    text = str(row.text)  # type: ignore[attr-defined]
    number = next((first + i for i, line in enumerate(lines) if line == text), None)
    where = "a line" if number is None else f"line {number}"
    return (
        f"{where} has {row.actual_columns} cells and not {len(names)}, "  # type: ignore[attr-defined]
        f"one for each of {', '.join(names[:5])}: {_short(text)}; quote a cell that holds the "
        "separator, or name another in data.separator"
    )


def _block_size(lines: Sequence[str]) -> int:
    """Returns a number of bytes into which each row fits."""
    return max(1 << 20, 8 * max(map(len, lines), default=0))


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _stripped(table: pa.Table) -> pa.Table:
    """Removes blanks around cells, which tables of bars have for the eye."""
    import pyarrow.compute as pc

    columns = [pc.utf8_trim_whitespace(column) for column in table.columns]
    return type(table).from_arrays(columns, names=table.column_names)


class WholeNumbers:
    """The columns whose cells are all whole numbers or empty, over several tables.

    Attributes:
        others: columns with another cell.
        filled: columns with a cell that is not empty.
    """

    def __init__(self) -> None:
        self.others: set[str] = set()
        self.filled: set[str] = set()

    def look_at(self, table: pa.Table) -> None:
        """Notes what the cells of a table show."""
        import pyarrow.compute as pc

        for name in set(table.column_names) - self.others:
            cells = table.column(name)
            if not pc.all(pc.match_substring_regex(cells, _INTEGERS), min_count=0).as_py():
                self.others.add(name)
            elif name not in self.filled and pc.any(pc.not_equal(cells, "")).as_py():
                self.filled.add(name)

    @property
    def names(self) -> frozenset[str]:
        """The columns that are numbers."""
        return frozenset(self.filled - self.others)


def as_numbers(table: pa.Table, names: Collection[str]) -> pa.Table:
    """Turns columns of whole numbers from texts into numbers, with nothing for empty ones."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, name in enumerate(table.column_names):
        if name in names:
            cells = table.column(i)
            filled = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
            table = table.set_column(i, name, filled.cast(pa.int64()))
    return table
