"""Reads lists out of the cells of a table, in one way for all tasks."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any


def listed(value: Any) -> list[Any] | None:
    """Returns the items of a cell that holds a list, or None if it holds something else.

    A list may stand in a cell as JSON (`["a", "b"]`) or as Python writes it (`['a', 'b']`, as in
    tables that pandas has written). Its numbers are texts, as they are written. A text that only
    begins with a bracket is no list.
    """
    if isinstance(value, str):
        return _written(value)
    if value is None or isinstance(value, Mapping | bytes) or not isinstance(value, Iterable):
        return None
    return list(value)


def _written(text: str) -> list[Any] | None:
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        items = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        items = _python_list(text)
    return items if isinstance(items, list) else None


def _python_list(text: str) -> Any:
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(items, list) or not all(isinstance(i, str | int | float) for i in items):
        return None
    return [item if isinstance(item, str) else str(item) for item in items]
