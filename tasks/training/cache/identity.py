"""The identity of cached trunk states: a later run compares it to tell if it can use them."""

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
from ...data.columns import MEDIA
from ...data.media import media_file

# Sections and keys of a config that examples do not depend on.
_IRRELEVANT = {
    *("name", "output", "adapter", "members", "composition", "trainer", "evaluation"),
    *("head", "loss", "decoding", "inference", "chunks"),
}
_PACKAGES = (
    *("mmadapters", "torch", "torchvision", "torchaudio", "timm", "transformers"),
    *("open_clip_torch", "pillow", "soundfile", "numpy"),
)


def description(
    task: Task, trunk: FrozenTrunk, rows: Rows, *, train: bool, precision: str
) -> dict[str, Any]:
    """Returns everything that the cached states of a split depend on, JSON-ready.

    Raises:
        ValueError: the rows hold values that cannot be hashed.
    """
    encoder = trunk.model
    identity = encoder.identity()
    random = train and capability(task, CacheableInputs).randomness(rows) is not None
    excluded = _IRRELEVANT if random else _IRRELEVANT | {"seed"}
    return {
        "encoder": {
            "library": identity["library"],
            "architecture": identity["architecture"],
            "weights": trunk.fingerprint(),
            "modules": hashlib.sha256(repr(encoder.backbone).encode()).hexdigest(),
        },
        "towers": [[part.tower, part.block, list(part.layers)] for part in trunk.towers],
        "precision": precision,
        "task": task.name,
        "config": task.config.model_dump(mode="json", exclude=excluded),
        "state": task.state,
        "split": "train" if train else "evaluation",
        "rows": rows_identity(task, rows),
        "versions": versions(_PACKAGES),
    }


def rows_identity(task: Task, rows: Rows) -> str:
    """Returns a hash of all values of the rows.

    Media files that the rows only name count with their size and time of modification.

    Raises:
        ValueError: the rows hold values that cannot be hashed.
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
    """A file that adds every byte written to it to a hash."""

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
        # The schema's metadata describes the features of the data set, not its rows.
        table = table.replace_schema_metadata(None)
        with pa.ipc.new_stream(pa.PythonFile(_Sink(digest), mode="w"), table.schema) as writer:
            writer.write_table(table)


def _paths(rows: Any, name: str) -> list[str | None]:
    """Returns the paths of the media in a column whose bytes are not in the rows."""
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
        status = os.stat(media_file(path or ""))
    except (OSError, ValueError):
        return f"{path} -"
    return f"{path} {status.st_size} {status.st_mtime_ns}"


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
            f"a later run cannot recognise rows that hold a {type(value).__name__}: cache their "
            "states in memory"
        )
