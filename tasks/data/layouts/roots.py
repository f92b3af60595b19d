"""Checks what a table says of its files: the folder of their paths, and parts of recordings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...config.schema import DataConfig
from ...core.rows import Column
from ..columns import MEDIA, find_columns
from ..parts import Piece

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Folders in which published data sets keep the files that a table beside them names.
SIBLINGS = (
    *("clips", "wavs", "wav", "audio", "audios", "flac", "recordings"),
    *("images", "image", "imgs", "img", "pictures", "train_images", "media", "data", "files"),
)
# Columns of the starts and ends of parts of recordings, in the data sets that have them.
STARTS = (
    *(("start", "end"), ("start_time", "end_time"), ("begin_time", "end_time")),
    *(("start_seconds", "end_seconds"), ("onset", "offset"), ("begin", "end")),
)
_REMOTE = re.compile(r"\b(https?|ftp|sftp|ssh|s3|gs|gcs|abfs|smb|webhdfs|github|file|local)://")
_OUTSIDE = r"(^|[\\/])\.\.([\\/]|$)|://"  # in paths that may lead out of a folder
LOOKED_AT = 10  # paths of a column


def piece_columns(
    piece: Piece, dataset: Dataset, config: DataConfig, roles: Mapping[str, Column]
) -> dict[str, str]:
    """Returns the column of each role in the rows of a piece, after all checks of the rows.

    Args:
        dataset: the rows, or the first ones.

    Raises:
        ValueError: a required role has no column, or the columns do not fit the files.
    """
    known = {role: name for role, name in piece.columns.items() if role in roles}
    names = find_columns(roles, {**known, **config.columns}, dataset.column_names)
    check_parts(dataset, names, roles)
    check_root(dataset, names, roles, piece.folder)
    check_inside(dataset, names, roles, piece.folder, trust=config.trust_paths)
    return names


def check_root(
    dataset: Dataset, names: Mapping[str, str], roles: Mapping[str, Column], folder: Path | None
) -> None:
    """Checks the first paths of each column of media.

    Args:
        names: the source's column of each role.
        folder: the folder from which relative paths start.

    Raises:
        ValueError: none of them is there, but from another folder nearby one would be.
    """
    if folder is None:
        return
    for role, name in names.items():
        if roles[role].kind not in MEDIA:
            continue
        cells = dataset.data.column(name).slice(0, LOOKED_AT).to_pylist()
        paths = [path for path in cells if isinstance(path, str) and path]
        paths = [path for path in paths if not os.path.isabs(path) and "://" not in path]
        if not paths or any((folder / path).exists() for path in paths):
            continue
        for other in _nearby(folder):
            if (other / paths[0]).is_file():
                raise ValueError(
                    f"data.root: the column {name!r} names {paths[0]}, which is not in {folder} "
                    f"but in {other}: say data.root: {other}"
                )


def check_inside(
    dataset: Dataset,
    names: Mapping[str, str],
    roles: Mapping[str, Column],
    folder: Path | None,
    *,
    trust: bool | None,
) -> None:
    """Checks that a table names no files outside its folder.

    A table from elsewhere can name any file of this machine by `..`, and any server by a URL. Of
    URLs only hf:// (the hub) and zip:// (an archive) are allowed. Absolute paths are those of this
    machine, so the table was most likely written on it: they are refused only if `trust` is False.

    Args:
        names: the source's column of each role.
        folder: the folder from which relative paths start; None for data that are no table of this
            machine.
        trust: `data.trust_paths` of the config.

    Raises:
        ValueError: a path leads out of the folder; the message names its row.
    """
    if folder is None or trust:
        return
    top = os.path.abspath(folder)
    for role, name in names.items():
        if roles[role].kind not in MEDIA:
            continue
        for row, path in _suspects(dataset.data.column(name), every=trust is False):
            if trust is None and "://" in path and not _REMOTE.search(path):
                continue
            if "://" not in path:
                whole = os.path.join(top, path)
                if trust is None and (os.path.isabs(path) or not os.path.isfile(whole)):
                    continue  # a missing file is told with its row when it is read
                real = os.path.normpath(whole) if trust is None else os.path.realpath(whole)
                base = top if trust is None else os.path.realpath(top)
                if os.path.commonpath((real, base)) == base:
                    continue
            raise ValueError(
                f"row {row} names {path!r} in the column {name!r}, which is outside of {folder}: "
                "say data.root, the folder that all paths are in, or data.trust_paths: true if you "
                "trust whoever wrote the table"
            )


def _suspects(column: pa.ChunkedArray, *, every: bool) -> Iterator[tuple[int, str]]:
    """Yields row and path of those that may lead out of a folder, or of all."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        column = pc.struct_field(column, "path")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    mask = pc.match_substring_regex(column, "" if every else _OUTSIDE)
    rows = pc.indices_nonzero(pc.fill_null(mask, False))
    yield from zip(rows.to_pylist(), column.take(rows).to_pylist(), strict=True)


def check_parts(dataset: Dataset, names: Mapping[str, str], roles: Mapping[str, Column]) -> None:
    """Checks that starts and ends of recordings are not overlooked.

    A recording that stands in several rows with different starts is cut by them. Files that were
    cut already stand in one row each.

    Args:
        names: the source's column of each role.

    Raises:
        ValueError: the table has such rows, and no role takes their columns.
    """
    import pyarrow as pa

    audio = [name for role, name in names.items() if roles[role].kind == "audio"]
    if not audio or "offset" not in roles or names.keys() & {"offset", "duration"}:
        return
    path = dataset.data.column(audio[0])
    there = [(s, e) for s, e in STARTS if {s, e} <= {*dataset.column_names} - {*audio}]
    if not there or not (pa.types.is_string(path.type) or pa.types.is_large_string(path.type)):
        return
    start, end = there[0]
    if pa.types.is_nested(dataset.data.column(start).type):
        return
    pairs = pa.table({"path": path, "start": dataset.data.column(start).cast(pa.string())})
    starts = pairs.group_by("path").aggregate([("start", "count_distinct")])
    if max(starts.column("start_count_distinct").to_pylist(), default=0) > 1:
        raise ValueError(
            f"data.columns: rows name the same recording with different values of {start!r}, and "
            f"would all read the whole of it: say data.columns: {{offset: {start}, end: {end}}}, "
            "or give the columns other names if they are not about parts of recordings"
        )


def _nearby(folder: Path) -> Iterator[Path]:
    for start in (folder, folder.parent):
        yield from (start / sibling for sibling in SIBLINGS)
    yield from list(folder.absolute().parents)[:3]
