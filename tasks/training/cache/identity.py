"""What kept states were made of, so that a later run can tell whether they are its own."""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmadapters import FrozenTrunk

from ...core.capabilities import CacheableInputs, capability
from ...core.machine import versions
from ...core.rows import Rows
from ...core.task import Task
from ..evaluate import MEDIA

# Sections and settings of a config that do not change what an example is.
_BESIDE = {
    *("name", "output", "adapter", "members", "composition", "trainer", "evaluation"),
    *("head", "loss", "decoding", "inference", "chunks"),
}
_PACKAGES = (
    *("mmadapters", "torch", "torchvision", "torchaudio", "timm", "transformers"),
    *("open_clip_torch", "pillow", "soundfile", "numpy"),
)


def description(
    task: Task, prefix: FrozenTrunk, rows: Rows, *, train: bool, precision: str
) -> dict[str, Any]:
    """All that the kept states of a split depend on, JSON-ready.

    Raises:
        ValueError: the rows hold what has no name.
    """
    encoder = prefix.model
    identity = encoder.identity()
    drawn = train and capability(task, CacheableInputs).randomness(rows) is not None
    beside = _BESIDE if drawn else _BESIDE | {"seed"}
    return {
        "encoder": {
            "library": identity["library"],
            "architecture": identity["architecture"],
            "weights": prefix.fingerprint(),
            "modules": hashlib.sha256(repr(encoder.backbone).encode()).hexdigest(),
        },
        "towers": [[part.tower, part.block, list(part.layers)] for part in prefix.towers],
        "precision": precision,
        "task": task.name,
        "config": task.config.model_dump(mode="json", exclude=beside),
        "state": task.state,
        "split": "train" if train else "evaluation",
        "rows": rows_identity(task, rows),
        "versions": versions(_PACKAGES),
    }


def rows_identity(task: Task, rows: Rows) -> str:
    """A hash of all that the rows hold; of media that lie elsewhere, their size and time of change.

    Raises:
        ValueError: they hold what has no name.
    """
    digest = hashlib.sha256()
    if hasattr(rows, "data") and hasattr(rows, "_indices"):
        _hash_tables(digest, rows)
        media = [name for name, column in task.columns.items() if column.kind in MEDIA]
        for name in media:
            if name in rows.column_names:
                for path in _paths(rows, name):
                    digest.update(_stamp(path).encode())
        return digest.hexdigest()
    for index in range(len(rows)):
        _hash(digest, rows[index])
    return digest.hexdigest()


class _Sink:
    """A file whose bytes go into a hash."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        return


def _hash_tables(digest: Any, rows: Any) -> None:
    import pyarrow as pa

    for part in (rows.data, rows._indices):
        if part is None:
            continue
        table = getattr(part, "table", part)
        # The schema's metadata names the data set's features, not its rows.
        table = table.replace_schema_metadata(None)
        with pa.ipc.new_stream(pa.PythonFile(_Sink(digest), mode="w"), table.schema) as writer:
            writer.write_table(table)


def _paths(rows: Any, name: str) -> list[str | None]:
    """Of a column of media, the paths of those that are not in the rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.data.column(name)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.to_pylist()
    if not pa.types.is_struct(column.type):
        return []
    fields = {column.type.field(i).name for i in range(column.type.num_fields)}
    if not {"bytes", "path"} <= fields:
        return []
    inside = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
    paths = pc.struct_field(column, "path").to_pylist()
    return [path for path, there in zip(paths, inside, strict=True) if not there]


def _stamp(path: str | None) -> str:
    try:
        found = os.stat(path or "")
    except (OSError, ValueError):
        return f"{path} -"
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def _hash(digest: Any, value: Any) -> None:
    digest.update(type(value).__name__.encode())
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(str(name).encode())
            _hash(digest, value[name])
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    elif isinstance(value, bytes):
        digest.update(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            _hash(digest, part)
    elif value is None or isinstance(value, str | numbers.Number):
        digest.update(f"{value!r};".encode())
    else:
        raise ValueError(
            f"rows that hold a {type(value).__name__} cannot be told from others by a later run: "
            "keep their states in memory"
        )
