"""Reads JSON lines, or one JSON list of objects.

Arrow reads JSON lines fast, and guesses the type of each column. Where a guess would change a value
(a date in a text, a fraction) or fails (kinds that differ from row to row), Python reads the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
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

    texts = text_columns(wanted)
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
    rows = list(_rows(text, role_columns(wanted)))
    return rows_table([row for _, row in rows], [line for line, _ in rows], texts)


def text_columns(wanted: Wanted) -> frozenset[str]:
    """Returns the columns that the task reads as text."""
    texts = (role for role, column in wanted.columns.items() if column.kind == "text")
    return frozenset(map(wanted.source_name, texts))


def role_columns(wanted: Wanted) -> frozenset[str]:
    """Returns the columns that the task may read."""
    return frozenset((FILE, *map(wanted.source_name, wanted.columns)))


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


def _rows(text: str, columns: frozenset[str]) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yields the rows, each with the number of its line; None in a list.

    Args:
        columns: the columns that the task may read.
    """
    start = text.strip()
    if not start:
        raise ValueError("it is empty")
    document = _document(start, columns)
    if start.startswith("["):
        rows = load_json(text)
    elif document is not None:
        rows = _only_list(document)
    else:
        yield from rows_of_lines(text.split("\n"))
        return
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(
                f"its list holds values that are not objects: value {number} is {short_json(row)}"
            )
        yield None, row


def rows_of_lines(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of JSON lines, each with the number of its line.

    Raises:
        ValueError: a line is not valid JSON, or no object.
    """
    for number, line in enumerate(lines, 1):
        if line.strip():
            row = load_json(line, number)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {short_json(row)}, and no object with keys")
            yield number, row


def _document(text: str, columns: frozenset[str]) -> dict[str, Any] | None:
    """Returns the one object of a file that is no row, or None if the file has lines of rows."""
    first, _, rest = text.partition("\n")
    if not text.startswith("{") or (rest and _is_json(first)):
        return None
    value = load_json(text)
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


def load_json(text: str, line: int | None = None) -> Any:
    """Returns the value of a JSON text, whose fractions keep their text.

    Args:
        line: the number of the line in the file; None if the text is the whole file.

    Raises:
        ValueError: it is not valid JSON.
    """
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


def rows_table(
    rows: Sequence[dict[str, Any]], lines: Sequence[int | None], texts: Collection[str]
) -> pa.Table:
    """Returns a table of rows, whose columns are the keys of all of them.

    Args:
        lines: the number of each row's line in its file; None in a list.
        texts: the columns that hold texts.

    Raises:
        ValueError: a column of texts holds a list or an object in some rows.
    """
    import pyarrow as pa

    columns: dict[str, JsonColumn] = {}
    names = dict.fromkeys(key for row in rows for key in row)
    for name in names:
        column = columns[name] = JsonColumn(name, text=name in texts)
        column.look_at([row.get(name) for row in rows], lines)
    return pa.table({n: c.array([row.get(n) for row in rows]) for n, c in columns.items()})


class JsonColumn:
    """The type of a column, as the values of several blocks of rows show it.

    A text column is text. So is another column whose values are of several kinds.
    """

    def __init__(self, name: str, *, text: bool) -> None:
        self.name, self.text = name, text
        self.kinds: set[type] = set()
        self.nested: str | None = None  # the place and the start of the first list or object
        self.type: pa.DataType | None = None  # that Arrow gives to all values so far
        self.mixed = False

    def look_at(self, values: Sequence[Any], lines: Sequence[int | None]) -> None:
        """Notes the kinds of the values of some rows.

        Args:
            lines: the number of each row's line; None in a list.

        Raises:
            ValueError: it is a text column, and holds a list or an object in some rows.
        """
        import pyarrow as pa

        kinds = {type(value) for value in values if value is not None}
        if self.text and kinds & {list, dict} and self.nested is None:
            row = next(i for i, value in enumerate(values) if type(value) in (list, dict))
            where = f"row {row}" if lines[row] is None else f"line {lines[row]}"
            self.nested = f"{where} has {short_json(values[row])}"
        self.kinds |= kinds
        nested = self.kinds & {list, dict}
        if self.text and nested and self.kinds - nested:
            raise ValueError(
                f"{self.nested} under {self.name!r}, where other rows have a text: write a text "
                "there"
            )
        self.mixed = self.mixed or bool(nested and len(self.kinds) > 1)
        if self.mixed or (self.text and not nested):
            return
        try:
            kind = pa.array(values).type
            self.type = kind if self.type is None else _unified(self.type, kind)
        except (pa.ArrowException, OverflowError):
            self.mixed = True  # the kinds differ, here or further inside

    @property
    def arrow(self) -> pa.DataType:
        """The type that holds all values."""
        import pyarrow as pa

        nested = self.kinds & {list, dict}
        text = self.mixed or (self.text and not nested) or self.type is None
        return pa.string() if text else self.type

    def array(self, values: Sequence[Any]) -> pa.Array:
        """Returns values of rows that were looked at in the type of the whole column."""
        return json_array(values, self.arrow)


def json_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Returns values as an array of a type; as texts they are as they are written."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        values = [written(value) for value in values]
    return pa.array(values, type=kind)


def _unified(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    schemas = [pa.schema([("", kind)]) for kind in (one, other)]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def written(value: Any) -> str | None:
    """Returns a value as it is written in JSON, without the quotes of a text."""
    if value is None or isinstance(value, str):
        return value
    return value.text if isinstance(value, _Fraction) else json.dumps(value, ensure_ascii=False)


def short_json(value: Any) -> str:
    """Returns the start of a value in JSON, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
