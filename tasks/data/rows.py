"""Selects the rows of a split: by the values of a column, by share, by number.

A `RowSelection` is a data set and numbers of its rows. Every selection is a few operations on whole
columns, and the data set is cut once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmadapters.suggest import nearest

from ..config.schema import Split
from ..core.rows import Column
from .columns import MEDIA
from .media import media_digest

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class RowSelection:
    """Rows of a data set whose columns are roles.

    Attributes:
        dataset: all rows of the source.
        indices: (N,) int64, the numbers of the selected rows, ascending.
        names: the source's column of each role.
    """

    dataset: Dataset
    indices: np.ndarray
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self) -> Dataset:
        """Returns the selected rows as a data set."""
        if len(self) == len(self.dataset):
            return self.dataset
        return self.dataset.select(self.indices)

    def column(self, name: str) -> pa.ChunkedArray:
        """Returns the whole column, with all rows of the data set."""
        return self.dataset.data.column(name)

    def resolve(self, name: str, setting: str) -> str:
        """Returns the present name of a column, given its name in the source or its role.

        Args:
            setting: the config's key, for messages.

        Raises:
            ValueError: there is no such column.
        """
        by_source = {source: role for role, source in self.names.items()}
        present = by_source.get(name, name)
        if present not in self.dataset.column_names:
            known = [*self.dataset.column_names, *by_source]
            raise ValueError(
                f"{setting}: the data has no column {name!r}{nearest(name, known)}; its columns "
                f"are {', '.join(self.dataset.column_names)}"
            )
        return present


def by_values(selection: RowSelection, column: str) -> dict[str, RowSelection]:
    """Returns the rows of each value of a text column; rows without a value are in none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pc.dictionary_encode(selection.column(column).cast(pa.string())).combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)[selection.indices]
    return {
        value: replace(selection, indices=selection.indices[codes == code])
        for code, value in enumerate(encoded.dictionary.to_pylist())
    }


def keep(
    selection: RowSelection,
    split: Split,
    filters: Mapping[str, Sequence[Any]],
    *,
    drop: bool = False,
) -> RowSelection:
    """Returns the rows whose columns match every filter, or with `drop` those that match none.

    Args:
        filters: column -> the values that match.

    Raises:
        ValueError: a column or a value does not exist, or no row is left.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for name, values in filters.items():
        setting = f"data.{'drop' if drop else 'keep'}.{split}"
        column = selection.column(selection.resolve(name, setting))
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise ValueError(f"{setting}: {name!r} holds {column.type}, not a value for each row")
        cells = column.cast(pa.string()).take(pa.array(selection.indices))
        wanted = [plain(value) for value in values]
        there = set(pc.unique(cells).to_pylist())
        for value in wanted:
            if value not in there:
                some = sorted(str(other) for other in there)
                listed = ", ".join(some[:20]) + (", …" if len(some) > 20 else "")
                raise ValueError(
                    f"{setting}: no row of {split} has {name} {value!r}"
                    f"{nearest(str(value), some)}; there are {listed}"
                )
        mask = pc.is_in(cells, value_set=pa.array(wanted, type=pa.string()))
        hits = mask.to_numpy(zero_copy_only=False).astype(bool)
        selection = replace(selection, indices=selection.indices[hits != drop])
        if not len(selection):
            raise ValueError(f"{setting}: no row of {split} is left")
    return selection


def plain(value: Any) -> str | None:
    """Returns a value as the text that Arrow makes of it, so that 7, "7" and true of a YAML file
    match."""
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None else str(value)


def cut(
    selection: RowSelection,
    fractions: Mapping[Split, float],
    roles: Mapping[str, Column],
    *,
    seed: int,
) -> dict[Split, RowSelection]:
    """Cuts training rows into several splits by share; the rest is "train".

    Rows that share a picture or a recording stay together. Otherwise a model would be tested on
    some questions about a picture and trained on the others. The test split is drawn first, so it
    is the same with and without a validation split.

    Args:
        fractions: the share of each new split, between 0 and 1.

    Raises:
        ValueError: there are too few rows (or pictures).
    """
    groups = _media_groups(selection, roles)  # (N,)
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    ends = np.cumsum(sizes[order])
    parts: dict[Split, RowSelection] = {}
    start = taken = 0
    for split in sorted(fractions):  # test, validation
        taken += max(round(fractions[split] * len(selection)), 1)
        stop = max(int(np.searchsorted(ends, taken)) + 1, start + 1)
        if stop >= len(order):
            raise ValueError(
                f"data.fractions: {len(order)} rows or groups of rows with the same media are too "
                f"few to cut {', '.join(fractions)} from"
            )
        chosen = np.isin(groups, order[start:stop])
        parts[split] = replace(selection, indices=selection.indices[chosen])
        start = stop
        taken = int(ends[stop - 1])
    rest = np.isin(groups, order[start:])
    return {"train": replace(selection, indices=selection.indices[rest]), **parts}


def _media_groups(selection: RowSelection, roles: Mapping[str, Column]) -> np.ndarray:
    """Returns (N,) the group of each row by its picture or recording, numbered by first
    appearance."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = selection.dataset.column_names
    media = [r for r, c in roles.items() if c.kind in MEDIA and c.kind != "mask" and r in names]
    if not media:
        return np.arange(len(selection))
    column = selection.column(media[0])
    fields = {column.type.field(i).name for i in range(column.type.num_fields)}
    if {"bytes", "path"} <= fields and pc.struct_field(column, "bytes").null_count == len(column):
        keys = pc.struct_field(column, "path").take(pa.array(selection.indices))
    else:
        # A path beside bytes is only a name, and several files may have the same one.
        rows = selection.dataset.select_columns([media[0]]).select(selection.indices)
        keys = pa.chunked_array([[media_digest(row[media[0]]) for row in rows]], type=pa.string())
    encoded = pc.dictionary_encode(keys, null_encoding="mask").combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    # Each row without media is a group of its own.
    alone = codes < 0
    codes[alone] = len(encoded.dictionary) + np.arange(alone.sum())
    return codes


def limit(selection: RowSelection, count: int | None, *, seed: int) -> RowSelection:
    """Returns at most `count` random rows in their order; a smaller count selects a subset."""
    if count is None or len(selection) <= count:
        return selection
    chosen = np.random.default_rng(seed).permutation(len(selection))[:count]
    return replace(selection, indices=selection.indices[np.sort(chosen)])
