"""Finds a source's column for each role of a task and converts it to the form that tasks read.

Media stay undecoded: `{"bytes", "path"}` with an absolute path. Text columns become text, with ""
for a missing value. Classes of a hub data set become their names. All conversions are done in
Arrow; columns that need none stay in their memory-mapped file.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from ..core.rows import Column
from .media import MEDIA_SUFFIXES
from .wanted import FILE

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import ClassLabel, Dataset

MEDIA = ("image", "mask", "audio")
# A table with both of these columns names parts of recordings, in seconds (NeMo's manifests).
PART = ("offset", "duration")
# The roles of such columns, which tasks with recordings have.
PART_ROLES = {
    "offset": Column("seconds", required=False, description="where its part starts, in seconds"),
    "duration": Column("seconds", required=False, description="how long its part is, in seconds"),
    "end": Column("seconds", required=False, description="where its part ends, in seconds"),
}
_LONG_NAME = 40  # characters; a longer name of a column is a sentence


def find_columns(
    roles: Mapping[str, Column], mapping: Mapping[str, str], names: Sequence[str]
) -> dict[str, str]:
    """Returns the source's column for each role that has one.

    A role that `mapping` does not name takes the column of its own name. Media also take
    `<role>_file_name`, `mask_file_name` and `file_name`.

    Args:
        mapping: role -> column, as in data.columns.
        names: the columns of the source.

    Raises:
        ValueError: a required role has no column, or `mapping` names a role or a column that does
            not exist.
    """
    if unknown := [role for role in mapping if role not in roles]:
        raise ValueError(
            f"data.columns: there is no {unknown[0]!r} to fill{nearest(unknown[0], roles)}; "
            f"this task reads {', '.join(roles)}"
        )
    by_role: dict[str, str] = {}
    for role, column in roles.items():
        if role in mapping:
            if mapping[role] not in names:
                raise ValueError(
                    f"data.columns: {role} is {mapping[role]!r}, which the data does not have"
                    f"{nearest(mapping[role], names)}; its columns are {', '.join(names)}"
                )
            by_role[role] = mapping[role]
            continue
        free = [name for name in names if name not in mapping.values()]
        if column.kind == "seconds" and "onset" in free:
            # An offset beside an onset is an end.
            free = [name for name in free if name != "offset"]
        if candidates := [name for name in (role, *_file_names(role, column)) if name in free]:
            by_role[role] = candidates[0]
        elif column.required:
            raise ValueError(_missing(role, column, names))
    by_source: dict[str, str] = {}
    for role, name in by_role.items():
        if name in by_source:
            raise ValueError(
                f"data.columns: {by_source[name]} and {role} would both be the column {name!r}"
            )
        by_source[name] = role
    return by_role


def _file_names(role: str, column: Column) -> tuple[str, ...]:
    if column.kind == "mask":
        return f"{role}_{FILE}", f"mask_{FILE}"
    return (f"{role}_{FILE}", FILE) if column.kind in MEDIA else ()


def _missing(role: str, column: Column, names: Sequence[str]) -> str:
    about = f" ({column.description})" if column.description else ""
    guess = nearest(role, names)
    name = guess.split("'")[1] if guess else "ITS_COLUMN"
    remedy = f"say which one it is by data.columns: {{{role}: {name}}}"
    if any(_is_row(name) for name in names):
        remedy = f"if that is a row already, name the columns by data.header: [{FILE}, {role}]"
    return (
        f"the data has no column {role!r}{about}{guess}; its columns are "
        f"{', '.join(map(_cut, names))}: {remedy}"
    )


def _is_row(name: str) -> bool:
    """Returns whether the name of a column looks like a value of a row."""
    return len(name) > _LONG_NAME or Path(name).suffix.lower() in MEDIA_SUFFIXES


def _cut(name: str) -> str:
    return name if len(name) <= _LONG_NAME else name[:_LONG_NAME] + "…"


def to_roles(
    dataset: Dataset, names: Mapping[str, str], roles: Mapping[str, Column], folder: Path | None
) -> Dataset:
    """Renames the columns of a data set to roles and converts each to the form of its kind.

    Args:
        names: the source's column of each role, from `find_columns`.
        folder: the folder from which relative paths start; None leaves them relative.

    Raises:
        ValueError: a column cannot be converted to the kind of its role.
    """
    # Another column that has the name of a role would be there twice: it is removed.
    shadowed = [role for role, name in names.items() if role != name and role in dataset.features]
    dataset = dataset.remove_columns([name for name in shadowed if name not in names.values()])
    dataset = _undecoded(dataset, [n for r, n in names.items() if roles[r].kind in MEDIA])
    # Renamed twice, by names that no column has, so that two roles may swap their columns.
    dataset = dataset.rename_columns({name: f"\0{role}" for role, name in names.items()})
    dataset = dataset.rename_columns({f"\0{role}": role for role in names})
    for role in names:
        kind = roles[role].kind
        if kind in MEDIA:
            dataset = _media(dataset, role, kind, names[role], folder)
        elif kind == "text":
            dataset = _text(dataset, role)
        if kind == "audio" and names_parts(dataset.column_names, names):
            dataset = _with_parts(dataset, role, end="end" in names)
    return _named_classes(dataset)


def _undecoded(dataset: Dataset, media: Sequence[str]) -> Dataset:
    """Turns decoding off. Nested media, which no task reads, are removed."""
    for name, feature in dataset.features.items():
        if getattr(feature, "decode", False):
            undecoded = copy.copy(feature)
            undecoded.decode = False
            dataset = dataset.cast_column(name, undecoded)
        elif name not in media and "decode=True" in repr(feature):
            dataset = dataset.remove_columns(name)
    return dataset


def _media(dataset: Dataset, role: str, kind: str, name: str, folder: Path | None) -> Dataset:
    """Makes paths and bytes an undecoded column; leaves decoded samples and pixels unchanged."""
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    column = dataset.data.column(role)
    storage = column.type
    if pa.types.is_null(storage):
        column = column.cast(pa.string())
    elif pa.types.is_string(storage) or pa.types.is_large_string(storage):
        column = _absolute(column.cast(pa.string()), folder)
    elif pa.types.is_struct(storage) and storage.get_field_index("path") >= 0:
        fields = {storage.field(i).name for i in range(storage.num_fields)}
        path = pc.struct_field(column, "path")
        data = pc.struct_field(column, "bytes") if "bytes" in fields else None
        if data is None:
            column = _absolute(path.cast(pa.string()), folder)
        elif data.null_count and not pa.types.is_null(path.type):
            linked = _absolute(path.cast(pa.string()), folder)
            path = pc.if_else(data.is_null(), linked, path.cast(pa.string()))
            column = _struct(data.cast(pa.binary()), path)
        else:
            return dataset
    elif not (pa.types.is_binary(storage) or pa.types.is_large_binary(storage)):
        if pa.types.is_nested(storage):
            return dataset
        raise ValueError(
            f"the column {name!r} holds {storage}, which is no {kind}: give paths or encoded files"
        )
    feature = datasets.Audio if kind == "audio" else datasets.Image
    return _replace(dataset, role, column, feature(decode=False))


def names_parts(columns: Collection[str], names: Mapping[str, str]) -> bool:
    """Returns whether the rows name parts of recordings.

    Args:
        columns: the columns after renaming.
        names: the source's column of each role.
    """
    if "duration" in names and names["duration"] != "duration":
        return True
    return "offset" in names or all(name in columns for name in PART)


def with_part(value: Any, row: Mapping[str, Any], *, end: bool) -> Any:
    """Returns the recording of a row, `{"bytes", "path"}`, with the offset and the duration that
    the row gives it.

    Args:
        row: the values by role.
        end: whether `end` gives the end of the part, where the row has no duration.
    """
    if not isinstance(value, Mapping) or "path" not in value:
        return value
    offset, duration = (None if row.get(name) == "" else row.get(name) for name in PART)
    if end and "duration" not in row and row.get("end") not in (None, ""):
        duration = float(row["end"]) - float(offset or 0)
    return {**value, "offset": offset, "duration": duration}


def _with_parts(dataset: Dataset, role: str, *, end: bool) -> Dataset:
    """Adds the offset and the duration of each row to its recording, where they are seconds.

    Args:
        end: whether a column `end` gives the end of each part, where there is no duration.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    audio = dataset.data.column(role)
    if not pa.types.is_struct(audio.type) or audio.type.get_field_index("path") < 0:
        return dataset
    parts = []
    last = "end" if end and "duration" not in dataset.features else "duration"
    for name in ("offset", last):
        if name not in dataset.features:
            parts.append(pa.chunked_array([pa.nulls(len(dataset), pa.float64())]))
            continue
        cells = dataset.data.column(name)
        if pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type):
            cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, cells.type), cells)
        try:
            parts.append(cells.cast(pa.float64()))
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"the column {name!r} holds values that are no seconds: {first_line(error)}; "
                "rename it if it is not about parts of recordings"
            ) from None
    if last == "end":
        parts[1] = pc.subtract(parts[1], pc.fill_null(parts[0], 0.0))
    fields = [pc.struct_field(audio, name) for name in ("bytes", "path")]
    arrays = [column.combine_chunks() for column in (*fields, *parts)]
    flat = [a.chunk(0) if isinstance(a, pa.ChunkedArray) else a for a in arrays]
    named = pa.StructArray.from_arrays(flat, ["bytes", "path", *PART])
    return _replace(dataset, role, pa.chunked_array([named]))


def _absolute(paths: pa.ChunkedArray, folder: Path | None) -> pa.ChunkedArray:
    """Joins relative paths to `folder`; "" becomes a missing value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    paths = pc.if_else(pc.equal(paths, ""), pa.scalar(None, pa.string()), paths)
    if folder is None:
        return paths
    start = os.path.join(os.path.abspath(folder), "")
    rooted = pc.match_substring_regex(paths, r"^(/|\\|[A-Za-z]:[\\/]|\w+://)")
    return pc.if_else(rooted, paths, pc.binary_join_element_wise(start, paths, ""))


def _struct(data: pa.ChunkedArray, path: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa

    whole = [array.combine_chunks() for array in (data, path)]
    flat = [a.chunk(0) if isinstance(a, pa.ChunkedArray) else a for a in whole]
    return pa.chunked_array([pa.StructArray.from_arrays(flat, ["bytes", "path"])])


def _text(dataset: Dataset, role: str) -> Dataset:
    import datasets
    import pyarrow as pa
    import pyarrow.compute as pc

    column = dataset.data.column(role)
    if isinstance(dataset.features[role], datasets.ClassLabel):
        column = _class_names(column, dataset.features[role])
    elif pa.types.is_nested(column.type):  # several texts of one row
        return dataset
    return _replace(dataset, role, pc.fill_null(column.cast(pa.string()), ""))


def _named_classes(dataset: Dataset) -> Dataset:
    """Replaces classes by their names; a number that is no class (usually −1) becomes a missing
    value."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            column = _class_names(dataset.data.column(name), feature)
            dataset = _replace(dataset, name, column)
    return dataset


def _class_names(column: pa.ChunkedArray, feature: ClassLabel) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array(feature.names, type=pa.string())
    inside = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))
    return names.take(pc.if_else(inside, column, pa.scalar(None, column.type)).combine_chunks())


def _replace(dataset: Dataset, name: str, column: Any, feature: Any = None) -> Dataset:
    """Replaces one column; the others stay in their memory-mapped files."""
    import pyarrow as pa

    if feature is not None:
        arrays = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        column = pa.chunked_array([feature.cast_storage(a) for a in arrays], type=feature.pa_type)
    others = dataset.remove_columns(name)
    if not others.column_names:
        import datasets

        features = None if feature is None else datasets.Features({name: feature})
        table = pa.table({name: column})
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    return others.add_column(name, column, feature=feature)
