"""Rows that are read in their order while a model trains, as those of a hub data set while they
download."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapters.suggest import nearest

from ..config.schema import SPLITS, DataConfig, Split
from ..core.rows import Column, Rows
from .columns import find_columns, names_parts, to_roles, with_part
from .rows import plain
from .splits import find_splits

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

Row = dict[str, Any]
READ_AT_ONCE = 16
SHUFFLED = 10  # rows in the buffer for each row that a limit draws


def read_hub_streams(
    source: Mapping[str, IterableDataset],
    config: DataConfig,
    roles: Mapping[str, Column],
    splits: Sequence[Split],
) -> dict[Split, Rows]:
    """Reads the splits of a hub data set as `read_streams`.

    Raises:
        ValueError: as `load_splits`.
    """

    def stream(split: Split, names: Sequence[str]) -> Stream:
        dataset = _joined([source[name] for name in names])
        columns = _names(dataset)
        by_role = find_columns(roles, config.columns, columns)
        return Stream(dataset, by_role, roles, wanted=_filter(config, split, by_role, columns))

    return read_streams(list(source), stream, config, splits)


def read_streams(
    names: Sequence[str],
    stream_of: Callable[[Split, Sequence[str]], Stream],
    config: DataConfig,
    splits: Sequence[Split],
) -> dict[Split, Rows]:
    """Returns the training rows as a `Stream`; the other splits, and training rows with a
    data.limit, in memory.

    A limit draws from a buffer of ten times as many rows, since many data sets are sorted by class.

    Args:
        names: the source's names of its splits.
        stream_of: makes the stream of a split from the source's splits of these names.

    Raises:
        ValueError: as `load_splits`.
    """
    present = find_splits(config, names)
    if missing := [split for split in config.fractions if split not in present]:
        raise ValueError(
            f"data.fractions: no {missing[0]} rows can be cut from a stream; the data has the "
            f"splits {', '.join(names)}"
        )
    rows: dict[Split, Any] = {}
    for split in (split for split in SPLITS if split in splits and split in present):
        stream = stream_of(split, present[split])
        count = config.limit.get(split)
        if split == "train" and count is None:
            rows[split] = stream
            continue
        if count is not None:
            stream = stream.shuffle(SHUFFLED * count, config.seed)
        try:
            rows[split] = stream.head(count)
        except ValueError as error:
            raise ValueError(f"data.source: of {split} in {config.source} {error}") from None
    return rows


@dataclass(frozen=True)
class _Filter:
    """The data.keep and data.drop of a split, each (column of the source, values, is it a drop)."""

    tests: tuple[tuple[str, frozenset[str | None], bool], ...] = ()

    def __call__(self, row: Row) -> bool:
        return all((plain(row.get(n)) in values) != drop for n, values, drop in self.tests)


def _filter(
    config: DataConfig, split: Split, by_role: Mapping[str, str], names: Sequence[str]
) -> _Filter:
    tests = []
    for setting in ("keep", "drop"):
        for name, values in getattr(config, setting).get(split, {}).items():
            column = by_role.get(name, name)
            if column not in names:
                raise ValueError(
                    f"data.{setting}.{split}: the data has no column {name!r}"
                    f"{nearest(name, names)}; its columns are {', '.join(names)}"
                )
            tests.append((column, frozenset(plain(value) for value in values), setting == "drop"))
    return _Filter(tuple(tests))


class Stream:
    """The rows of a training split, each a dict by role; every pass reads them again.

    Attributes:
        column_names: the names of the columns after renaming, as of `Rows`.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        by_role: Mapping[str, str],
        roles: Mapping[str, Column],
        *,
        wanted: Callable[[Row], bool] = _Filter(),
    ) -> None:
        """Makes the stream of a data set.

        Args:
            dataset: media undecoded, columns named as in the source.
            by_role: the source's column of each role.
            wanted: whether a row, with the source's columns, belongs to the stream.
        """
        self.dataset, self.by_role, self.roles = dataset, dict(by_role), roles
        self.wanted = wanted
        self._classes = _class_names(dataset)
        # As in `to_roles`, another column that has the name of a role is removed.
        kept = [name for name in _names(dataset) if name not in by_role.values()]
        self.column_names = [*by_role, *(name for name in kept if name not in by_role)]
        self._parts = names_parts(self.column_names, by_role)

    def __iter__(self) -> Iterator[Row]:
        for row in self._source_rows():
            values = {role: self._value(role, row.get(n)) for role, n in self.by_role.items()}
            if self._parts:
                for role in (role for role in values if self.roles[role].kind == "audio"):
                    values[role] = with_part(values[role], values, end="end" in values)
            yield {n: values[n] if n in values else row.get(n) for n in self.column_names}

    def _source_rows(self) -> Iterator[Row]:
        """Yields the same rows under the source's names, with classes as names."""
        for row in self._rows():
            for name, names in self._classes.items():
                index = row.get(name)
                known = isinstance(index, int) and 0 <= index < len(names)
                row[name] = names[index] if known else None  # type: ignore[index]
            if self.wanted(row):
                yield row

    def _rows(self) -> Iterator[Row]:
        # The data set's own iterator would share its files among the workers of a loader, and give
        # the rows in another order than without workers.
        for batch in self.dataset.iter(batch_size=READ_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def shuffle(self, buffer: int, seed: int) -> Stream:
        """Returns the stream in another order, the same for the same seed: the files are shuffled,
        and the rows within a buffer of this size."""
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=buffer)
        return Stream(shuffled, self.by_role, self.roles, wanted=self.wanted)

    def head(self, count: int | None) -> Dataset:
        """Returns the first `count` rows (None: all) as a data set in memory.

        Raises:
            ValueError: there are no rows.
        """
        import datasets
        import pyarrow as pa

        rows = list(itertools.islice(self._source_rows(), count))
        if not rows:
            raise ValueError("there are no rows")
        features = self.dataset.features
        if features is None:
            few = datasets.Dataset(pa.Table.from_pylist(rows))
        else:
            features = datasets.Features(features)
            features |= dict.fromkeys(self._classes, datasets.Value("string"))
            table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
            few = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
        return to_roles(few, self.by_role, self.roles, None)

    def to_fit(self, count: int) -> Dataset:
        """Returns the rows to which a task is fitted, the first `count` ones, as a data set in
        memory.

        Raises:
            ValueError: there are no rows.
        """
        return self.head(count)

    def _value(self, role: str, value: Any) -> Any:
        if self.roles[role].kind != "text" or isinstance(value, list | dict):
            return value
        return "" if value is None else str(value)


def _joined(streams: Sequence[IterableDataset]) -> IterableDataset:
    import datasets

    return streams[0] if len(streams) == 1 else datasets.concatenate_datasets(list(streams))


def _names(dataset: IterableDataset) -> list[str]:
    return list(dataset.column_names or next(iter(dataset), {}))


def _class_names(dataset: IterableDataset) -> dict[str, list[str]]:
    import datasets

    features = dataset.features or {}
    return {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
