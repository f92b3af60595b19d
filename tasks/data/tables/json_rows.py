"""Reads JSON lines, or one JSON list of objects.

Arrow reads JSON lines fast, and guesses the type of each column. Where a guess would change a value
(a date in a text, a fraction) or fails (kinds that differ from row to row), Python reads the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.limits import DEPTH

from ..wanted import FILE, Wanted
from .encodings import read_text

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = 64 << 20  # bytes; one row must fit into a block
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')  # a text of JSON
_NO_MARKS = re.compile(rb"[^][{}]+")
_SHOWN = 60  # characters of a value in a message


class _Fraction(float):
    """A number with a fraction or an exponent, and its text in the file."""

    text: str

    def __new__(cls, text: str) -> _Fraction:
        number = super().__new__(cls, text)
        number.text = text
        return number


def read_json(wanted: Wanted, file: Path) -> pa.Table:
    """Reads a table whose columns are the keys of all rows together.

    Columns that the task reads as text are text, whatever they hold, with numbers as they are
    written. So are other columns whose values are of several kinds; lists and objects in them
    become JSON text.

    Raises:
        ValueError: a line is not valid JSON, or a row is no object.
    """
    import pyarrow as pa
    from pyarrow import json as lines

    texts = {wanted.source_name(r) for r, c in wanted.columns.items() if c.kind == "text"}
    text = read_text(file, wanted.config.encoding)  # Arrow would not notice another encoding
    _check_depth(text)
    if _begins_with_a_row(text):
        options = lines.ReadOptions(block_size=_BLOCK)
        try:
            table = lines.read_json(pa.BufferReader(text.encode()), read_options=options)
        except pa.ArrowException:
            table = None
        # A single row may be an object around the list of rows.
        several = table is not None and table.num_rows > 1
        if several and not any(_guessed(field, texts) for field in table.schema):
            return table
    columns = {FILE, *map(wanted.source_name, wanted.columns)}
    rows = list(_rows(text, columns))
    return _table([row for _, row in rows], [line for line, _ in rows], texts)


def _check_depth(text: str) -> None:
    """Raises ValueError for values that are nested so deeply that Arrow's parser would crash."""
    import numpy as np

    marks = np.frombuffer(_NO_MARKS.sub(b"", _TEXT.sub(b"", text.encode())), np.uint8)
    opens = np.isin(marks, np.frombuffer(b"[{", np.uint8))
    steps = np.where(opens, 1, -1)
    if marks.size and DEPTH.passed(int(np.cumsum(steps).max())) is not None:
        raise ValueError("its values are nested too deeply")


def _begins_with_a_row(text: str) -> bool:
    """Returns whether the first line that is not empty holds an object."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    line = text[start : len(text) if end < 0 else end].rstrip()
    return line.startswith("{") and line.endswith("}")


def _guessed(field: pa.Field, texts: Collection[str]) -> bool:
    """Returns whether Arrow's type of a column may have changed what is written in the file."""
    import pyarrow as pa

    kind = field.type
    return pa.types.is_temporal(kind) or (field.name in texts and pa.types.is_floating(kind))


def _rows(text: str, columns: set[str]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yields the rows, each with the number of its line; None in a list.

    Args:
        columns: the columns that the task may read.
    """
    start = text.strip()
    if not start:
        raise ValueError("it is empty")
    document = _document(start, columns)
    if start.startswith("["):
        rows = _loaded(text)
    elif document is not None:
        rows = _only_list(document)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = _loaded(line, number)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is {short_json(row)}, and no object with keys")
                yield number, row
        return
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"its list holds values that are not objects: value {number} is {short_json(row)}"
            )
        yield None, row


def _document(text: str, columns: set[str]) -> dict[str, Any] | None:
    """Returns the one object of a file that is no row, or None if the file has lines of rows."""
    first, _, rest = text.partition("\n")
    if not text.startswith("{") or (rest and _is_json(first)):
        return None
    value = _loaded(text)
    return value if isinstance(value, dict) and columns.isdisjoint(value) else None


def _only_list(document: dict[str, Any]) -> list[Any]:
    """Returns the one list of objects in an object (`{"data": […]}`).

    Raises:
        ValueError: there is none, or there are several.
    """
    lists = [
        value
        for value in document.values()
        if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    if len(lists) == 1:
        return lists[0]
    raise ValueError(
        f"it is one JSON object with the keys {', '.join(list(document)[:8])}, and not one list of "
        "rows: write a list of objects, or one object a line"
    )


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _loaded(text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text, parse_float=_Fraction)
    except json.JSONDecodeError as error:
        raise ValueError(invalid_json(error, line)) from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def invalid_json(error: json.JSONDecodeError, line: int | None = None) -> str:
    """Returns the words for a text that is no JSON.

    Args:
        line: the number of the line in the file; None if the text is the whole file.
    """
    number = error.lineno if line is None else line
    return f"line {number}, column {error.colno} is not valid JSON: {error.msg}"


def _table(rows: list[dict[str, Any]], lines: list[int | None], texts: Collection[str]) -> pa.Table:
    import pyarrow as pa

    names = dict.fromkeys(key for row in rows for key in row)
    return pa.table(
        {n: _column(n, [row.get(n) for row in rows], lines, text=n in texts) for n in names}
    )


def _column(name: str, values: list[Any], lines: list[int | None], *, text: bool) -> pa.Array:
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    nested = kinds & {list, dict}
    if text and nested and kinds - nested:
        row = next(i for i, value in enumerate(values) if type(value) in nested)
        where = f"row {row}" if lines[row] is None else f"line {lines[row]}"
        raise ValueError(
            f"{where} has {short_json(values[row])} under {name!r}, where other rows have a text: "
            "write a text there"
        )
    if not (text and not nested) and (not nested or len(kinds) == 1):
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            pass  # the kinds differ, here or further inside
    return pa.array([written(value) for value in values], type=pa.string())


def written(value: Any) -> str | None:
    """Returns a value as it is written in JSON, without the quotes of a text."""
    if value is None or isinstance(value, str):
        return value
    return value.text if isinstance(value, _Fraction) else json.dumps(value, ensure_ascii=False)


def short_json(value: Any) -> str:
    """Returns the start of a value in JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
