"""Streams of tables and folders on this machine.

A block of rows goes through the same conversion as a whole data set, so the rows are the same.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmadapters.suggest import nearest

from ...config.schema import Split
from ...core.rows import Column, Rows
from ..columns import find_columns, to_roles
from ..layouts.roots import check_inside, piece_columns
from ..parts import Parts, Piece, Shard
from ..rows import plain
from ..splits import SPLIT_COLUMN, check_split_column
from ..stream import READ_AT_ONCE, Row, Stream, read_streams
from ..wanted import Wanted

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ROWS = 1000  # in a block of rows that are in memory, or mapped into it
LISTED = 20  # values in a message


def read_local_streams(parts: Parts, wanted: Wanted, splits: Sequence[Split]) -> dict[Split, Rows]:
    """Reads the splits of tables and folders as `read_streams`.

    Raises:
        ValueError: as `load_splits`.
    """
    source = _Source(parts, wanted)
    return read_streams(source.names, source.stream, wanted.config, splits)


@dataclass(frozen=True)
class _DatasetShard:
    """Rows that are in memory already, or mapped into it from a file."""

    dataset: Dataset

    def blocks(self) -> Iterator[Dataset]:
        for start in range(0, len(self.dataset), ROWS):
            yield self.dataset.select(range(start, min(start + ROWS, len(self.dataset))))


@dataclass(frozen=True)
class _Test:
    """A test of rows: `column` has one of `values`, or none of them with `drop`."""

    setting: str
    column: str
    values: tuple[str | None, ...]
    drop: bool = False

    def cells(self, block: Dataset) -> pa.ChunkedArray:
        """Returns the values of the column as text.

        Raises:
            ValueError: they are no single values.
        """
        import pyarrow as pa

        if self.column not in block.column_names:
            return pa.chunked_array([pa.nulls(len(block), pa.string())])
        cells = block.with_format("arrow")[:].column(self.column)
        if pa.types.is_nested(cells.type) or pa.types.is_binary(cells.type):
            raise ValueError(
                f"{self.setting}: {self.column!r} holds {cells.type}, not a value for each row"
            )
        return cells.cast(pa.string())

    def kept(self, block: Dataset) -> Dataset:
        """Returns the rows that pass."""
        import pyarrow as pa
        import pyarrow.compute as pc

        cells = self.cells(block)
        mask = pc.is_in(cells, value_set=pa.array(self.values, type=pa.string()))
        hits = mask.to_numpy(zero_copy_only=False).astype(bool) != self.drop
        return block if hits.all() else block.select(np.flatnonzero(hits))


@dataclass(frozen=True)
class RoleShard:
    """A shard whose columns are renamed to roles and converted.

    Attributes:
        shard: the rows as they stand in the source.
        names: the source's column of each role.
        mapping: the roles whose columns the layout or the config names.
        roles: the task's columns.
        folder: the folder from which relative paths start.
        trust: `data.trust_paths` of the config.
        tests: of the rows that belong to the split.
    """

    shard: Shard
    names: Mapping[str, str]
    mapping: Mapping[str, str]
    roles: Mapping[str, Column]
    folder: Path | None
    trust: bool | None = None
    tests: tuple[_Test, ...] = ()

    def blocks(self) -> Iterator[Dataset]:
        """Yields the rows that pass all tests; a block may be empty.

        Raises:
            ValueError: the rows cannot be read.
        """
        for block in self.shard.blocks():
            names = self._names(block)
            check_inside(block, names, self.roles, self.folder, trust=self.trust)
            converted = to_roles(block, names, self.roles, self.folder)
            for test in self.tests:
                converted = test.kept(converted)
            yield converted

    def _names(self, block: Dataset) -> Mapping[str, str]:
        columns = block.column_names
        if set(self.names.values()) == set(columns):
            return self.names
        names = {role: name for role, name in self.names.items() if name in columns}
        both = [*dict.fromkeys((*self.names.values(), *columns))]
        later = find_columns(self.roles, self.mapping, both)
        if new := [role for role in later if role not in self.names]:
            raise ValueError(
                f"data.streaming: the first rows have no {new[0]}, and later ones have it under "
                f"{later[new[0]]!r}: begin with files whose rows have it, or leave data.streaming "
                "out"
            )
        return names


class _Source:
    """The data of a source, each split looked through when it is asked for.

    Attributes:
        names: the source's names of its splits; if it names none, all rows are "train".
    """

    def __init__(self, parts: Parts, wanted: Wanted) -> None:
        self.config, self.roles, self.parts = wanted.config, wanted.columns, parts
        check_split_column(self.config, list(parts))
        self.whole: list[RoleShard] = []
        self.column: str | None = None  # that names the splits
        self.names = list(parts)
        if len(parts) == 1:
            name, pieces = next(iter(parts.items()))
            self.whole = self._shards(pieces)
            self.names = self._by_column(name or "train")

    def stream(self, split: Split, names: Sequence[str]) -> LocalStream:
        """Returns the stream of a split.

        Raises:
            ValueError: a filter names a column or a value that does not exist, or no row is left.
        """
        shards = self.whole or self._shards([p for name in names for p in self.parts[name]])
        if self.column is not None:
            belongs = _Test("data.split_column", self.column, tuple(names))
            shards = [replace(shard, tests=(belongs,)) for shard in shards]
        for test in self._tests(split, shards):
            _check_values(test, split, shards)
            shards = [replace(shard, tests=(*shard.tests, test)) for shard in shards]
            if not any(len(block) for block in _blocks(shards)):
                raise ValueError(f"{test.setting}: no row of {split} is left")
        return LocalStream(shards)

    def _shards(self, pieces: Sequence[Piece]) -> list[RoleShard]:
        shards: list[RoleShard] = []
        for piece in pieces:
            some: Sequence[Shard]
            some = piece.shards() if piece.shards else [_DatasetShard(piece.read())]
            first = next((block for shard in some for block in shard.blocks() if len(block)), None)
            if first is None:
                continue
            names = piece_columns(piece, first, self.config, self.roles)
            known = {role: name for role, name in piece.columns.items() if role in self.roles}
            mapping = {**known, **self.config.columns}
            trust = self.config.trust_paths
            shards += [RoleShard(s, names, mapping, self.roles, piece.folder, trust) for s in some]
        if not shards:
            raise ValueError(f"data.source: {self.config.source} has no rows")
        return shards

    def _by_column(self, name: str) -> list[str]:
        column, present = self.config.split_column, _columns(self.whole)
        if column is not None:
            column = _resolved(column, "data.split_column", self.whole[0].names, present)
        elif SPLIT_COLUMN in present and SPLIT_COLUMN not in self.roles:
            column = SPLIT_COLUMN
        if column is None:
            return [name]
        self.column = column
        every = _Test("data.split_column", column, ())
        values = dict.fromkeys(
            value
            for block in _blocks(self.whole)
            for value in every.cells(block).unique().to_pylist()
        )
        return [value for value in values if value is not None]

    def _tests(self, split: Split, shards: Sequence[RoleShard]) -> Iterator[_Test]:
        present = _columns(shards)
        for filters, drop in ((self.config.keep, False), (self.config.drop, True)):
            for name, values in filters.get(split, {}).items():
                setting = f"data.{'drop' if drop else 'keep'}.{split}"
                column = _resolved(name, setting, shards[0].names, present)
                yield _Test(setting, column, tuple(plain(value) for value in values), drop)


def _blocks(shards: Iterable[RoleShard]) -> Iterator[Dataset]:
    return (block for shard in shards for block in shard.blocks())


def _firsts(shards: Sequence[RoleShard]) -> Iterator[Dataset]:
    """Yields the first block of each group of shards that have the same columns."""
    for _, group in itertools.groupby(shards, key=lambda shard: id(shard.names)):
        yield from itertools.islice(_blocks(replace(s, tests=()) for s in group), 1)


def _columns(shards: Sequence[RoleShard]) -> list[str]:
    return list(dict.fromkeys(n for block in _firsts(shards) for n in block.column_names))


def _resolved(name: str, setting: str, names: Mapping[str, str], present: Sequence[str]) -> str:
    """Returns the present name of a column, given its name in the source or its role."""
    by_source = {source: role for role, source in names.items()}
    column = by_source.get(name, name)
    if column not in present:
        raise ValueError(
            f"{setting}: the data has no column {name!r}{nearest(name, [*present, *by_source])}; "
            f"its columns are {', '.join(present)}"
        )
    return column


def _check_values(test: _Test, split: Split, shards: Sequence[RoleShard]) -> None:
    """Checks that some row has each value of a test; reads only until all were seen."""
    missing = set(test.values)
    there: dict[str, None] = {}
    for block in _blocks(shards):
        values = test.cells(block).unique().to_pylist()
        missing -= set(values)
        if not missing:
            return
        for value in values if len(there) <= LISTED else ():
            there[str(value)] = None
    value = next(value for value in test.values if value in missing)
    some = sorted(there)
    listed = ", ".join(some[:LISTED]) + (", …" if len(some) > LISTED else "")
    raise ValueError(
        f"{test.setting}: no row of {split} has {test.column} {value!r}"
        f"{nearest(str(value), some)}; there are {listed}"
    )


class LocalStream(Stream):
    """The rows of a split of tables or folders, each a dict by role.

    Attributes:
        column_names: the names of the columns after renaming, as of `Rows`.
    """

    def __init__(self, shards: Sequence[RoleShard]) -> None:
        import datasets

        self._labels = {r for r, c in shards[0].roles.items() if c.kind == "label"}
        self.features = datasets.Features()
        for block in _firsts(shards):
            for name, feature in block.features.items():
                # A column without values says nothing of its type.
                if getattr(self.features.get(name), "dtype", "null") == "null":
                    self.features[name] = feature
        self.column_names = list(self.features)
        self.dataset = datasets.IterableDataset.from_generator(
            _rows, gen_kwargs={"shards": list(shards)}
        )

    def __iter__(self) -> Iterator[Row]:
        for batch in self.dataset.iter(batch_size=READ_AT_ONCE):
            empty = [None] * len(next(iter(batch.values())))
            columns = [batch.get(name, empty) for name in self.column_names]
            for values in zip(*columns, strict=True):
                yield dict(zip(self.column_names, values, strict=True))

    def shuffle(self, buffer: int, seed: int) -> LocalStream:
        stream = copy.copy(self)
        stream.dataset = self.dataset.shuffle(seed=seed, buffer_size=buffer)
        return stream

    def head(self, count: int | None) -> Dataset:
        return self._dataset(list(itertools.islice(self, count)))

    def to_fit(self, count: int) -> Dataset:
        """Returns `count` rows that are drawn from all, and the first one with each label.

        The first rows of a folder of classes are all of one class. Without labels, the first rows
        are returned.
        """
        labels = [role for role in self.column_names if role in self._labels]
        if not labels:
            return self.head(count)
        rng = np.random.default_rng(0)
        drawn: list[tuple[int, Row]] = []
        firsts: dict[str, tuple[int, Row]] = {}
        for number, row in enumerate(self):
            for role in labels:
                firsts.setdefault(f"{role} {row[role]!r}", (number, row))
            if number < count:
                drawn.append((number, row))
            elif (place := int(rng.integers(number + 1))) < count:
                drawn[place] = (number, row)
        rows = dict([*drawn, *firsts.values()])
        return self._dataset([rows[number] for number in sorted(rows)])

    def _dataset(self, rows: list[Row]) -> Dataset:
        import datasets
        import pyarrow as pa

        if not rows:
            raise ValueError("there are no rows")
        table = pa.Table.from_pylist(rows, schema=self.features.arrow_schema)
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=self.features))


def _rows(shards: Sequence[RoleShard]) -> Iterator[Row]:
    for block in _blocks(shards):
        columns = block[:]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
