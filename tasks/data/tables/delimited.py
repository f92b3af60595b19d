"""Reads tables whose cells are separated by a mark: CSV, TSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_INTEGERS = r"^(0|-?[1-9]\d{0,17})?$"  # only numbers that Python writes in the same way


def read_csv(file: Path) -> pa.Table:
    """Reads all cells as text, so that "NA", dates and 007 stay as they are."""
    from pyarrow import csv, string

    with open(file, encoding="utf-8-sig") as lines:
        header = next(lines, "")
    separators = [mark for mark in ",;\t" if mark in header]
    separator = "," if "," in separators or not separators else separators[0]
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, string()), strings_can_be_null=False
    )
    return csv.read_csv(file, parse_options=parse, convert_options=convert)


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
