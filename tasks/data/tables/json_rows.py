"""Reads JSON lines, or one JSON list of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_JSON_BLOCK = 64 << 20  # bytes; one row must fit into a block


def read_json(file: Path) -> pa.Table:
    """Reads JSON lines, or one JSON list of objects."""
    import pyarrow as pa
    from pyarrow import json as lines

    with open(file, encoding="utf-8-sig") as text:
        start = text.read(4096).lstrip()
        if start.startswith("["):
            text.seek(0)
            rows = json.load(text)
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("its list holds values that are not objects")
            return pa.Table.from_pylist(rows)
    if not start:
        raise ValueError("it is empty")
    return lines.read_json(file, read_options=lines.ReadOptions(block_size=_JSON_BLOCK))
