"""Reads tables whose cells are separated by a mark: CSV, TSV, and those of bars or semicolons.

`quoting` decides whether a `"` encloses a cell or is a character like others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..wanted import Wanted
from .encodings import read_text
from .quoting import are_quoted, find_quotes

if TYPE_CHECKING:
    import pyarrow as pa

SEPARATORS = ("\t", "|", ",", ";")  # the first ones are the rarest within texts
_SAMPLE = 100  # lines from which the separator is recognised
_SHOWN = 60  # characters of a line in a message
_INTEGERS = r"^(0|-?[1-9]\d{0,17})?$"  # only numbers that Python writes in the same way


def read_csv(wanted: Wanted, file: Path) -> pa.Table:
    """Reads all cells as text, so that "NA", dates and 007 stay as they are.

    Raises:
        ValueError: the text is in another encoding, a line has more or fewer cells than the names
            of the columns, or the quotes have two meanings.
    """
    config = wanted.config
    text = read_text(file, config.encoding)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not any(lines):
        raise ValueError("it is empty")
    separator = config.separator or _separator(file, lines)
    quotes = find_quotes(lines, separator)
    names, skipped = _names(lines, separator, config.header)
    quoted = config.quoting
    if quoted is None:
        quoted = are_quoted(quotes, lines, separator, columns=len(names))
    table = _parsed(lines, separator, names, skipped, quoted=quoted)
    rows = sum(1 for line in lines[skipped:] if line) - (quotes.inside if quoted else 0)
    if table.num_rows != rows:
        raise ValueError(
            f"it has {table.num_rows} rows in {rows} lines: say in data.quoting whether quotes "
            "enclose its cells (true) or are characters like others (false)"
        )
    return _stripped(table) if separator == "|" else table


def _separator(file: Path, lines: Sequence[str]) -> str:
    """Returns the mark that stands equally often in all lines, outside of quotes."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    some = [re.sub(r'"(?:[^"]|"")*"', "", line) for line in lines if line][:_SAMPLE]
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


def _parsed(
    lines: Sequence[str], separator: str, names: list[str], skipped: int, *, quoted: bool
) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    bad: list[csv.InvalidRow] = []

    def note(row: csv.InvalidRow) -> str:
        bad.append(row)
        return "error"

    data = "\n".join(lines[skipped:]).encode("utf-8")
    columns = [str(i) for i in range(len(names))]  # names may stand twice, which is told later
    try:
        table = csv.read_csv(
            pa.BufferReader(data or b"\n"),
            read_options=csv.ReadOptions(column_names=columns, block_size=_block(lines)),
            parse_options=csv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=note,
            ),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid:
        if not bad:
            raise
        raise ValueError(_ragged(bad[0], lines, skipped, names)) from None
    return table.rename_columns(names)


def _ragged(row: object, lines: Sequence[str], skipped: int, names: Sequence[str]) -> str:
    text = str(row.text)  # type: ignore[attr-defined]
    number = next((i + 1 for i, line in enumerate(lines) if i >= skipped and line == text), None)
    where = "a line" if number is None else f"line {number}"
    return (
        f"{where} has {row.actual_columns} cells and not {len(names)}, "  # type: ignore[attr-defined]
        f"one for each of {', '.join(names[:5])}: {_short(text)}; quote a cell that holds the "
        "separator, or name another in data.separator"
    )


def _block(lines: Sequence[str]) -> int:
    """Returns a number of bytes into which each row fits."""
    return max(1 << 20, 8 * max(map(len, lines)))


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def _stripped(table: pa.Table) -> pa.Table:
    """Removes blanks around cells, which tables of bars have for the eye."""
    import pyarrow.compute as pc

    columns = [pc.utf8_trim_whitespace(column) for column in table.columns]
    return type(table).from_arrays(columns, names=table.column_names)


def whole_numbers(table: pa.Table) -> pa.Table:
    """Turns columns whose cells are all whole numbers (or empty) into numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, name in enumerate(table.column_names):
        cells = table.column(i)
        if not pc.all(pc.match_substring_regex(cells, _INTEGERS)).as_py():
            continue
        filled = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
        if filled.null_count < len(cells):
            table = table.set_column(i, name, filled.cast(pa.int64()))
    return table
