"""Loads the splits of a data set from any source, with columns named as a task reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..config.schema import SPLITS, DataConfig, Split
from ..core.rows import Column, Rows
from .columns import find_columns, to_roles
from .hub import hub_parts, hub_streams
from .layouts.find import local_parts
from .layouts.roots import check_inside, check_parts, check_root
from .parts import Parts, Piece
from .rows import RowSelection, by_values, cut, keep, limit
from .splits import find_splits
from .stream import read_streams
from .wanted import Wanted

BUILTIN = "builtin/"
SPLIT_COLUMN = "split"


def load_splits(
    config: DataConfig, columns: Mapping[str, Column], splits: Sequence[Split] = SPLITS
) -> dict[Split, Rows]:
    """Returns the rows of each of `splits` that the data has.

    Columns are renamed to roles; those without a role keep their names. Media are not decoded: a
    value is a dict of bytes and absolute path, which `media` reads. Text is never None. With
    `data.streaming` the training rows are a `Stream`, unless data.limit.train limits them.

    Args:
        columns: the task's columns by role.

    Raises:
        ValueError: the source, a split or a column does not exist or cannot be read; the message
            says what there is.
    """
    if config.streaming:
        _check_hub_only(Wanted(config, columns))
        return read_streams(hub_streams(config), config, columns, splits)
    source = _Source(config, columns)
    present = find_splits(config, source.names)
    shares = {s: share for s, share in config.fractions.items() if s not in present}
    selected: dict[Split, RowSelection] = {
        split: _filtered(source.split(names), split, config)
        for split, names in present.items()
        if split in splits or (split == "train" and shares)
    }
    if shares:
        if "train" not in selected:
            raise ValueError(
                f"data.fractions: there are no training rows to cut {', '.join(shares)} from; the "
                f"data has {', '.join(source.names)}"
            )
        parts = cut(selected["train"], shares, columns, seed=config.seed)
        selected["train"] = parts.pop("train")
        selected |= {split: _filtered(part, split, config) for split, part in parts.items()}
    return {
        split: limit(selected[split], config.limit.get(split), seed=config.seed).rows()
        for split in SPLITS
        if split in splits and split in selected
    }


def _filtered(part: RowSelection, split: Split, config: DataConfig) -> RowSelection:
    part = keep(part, split, config.keep.get(split, {}))
    return keep(part, split, config.drop.get(split, {}), drop=True)


class _Source:
    """The data of a config's source, each split read when it is asked for.

    Attributes:
        names: the source's names of its splits; if it names none, all rows are "train".
    """

    def __init__(self, config: DataConfig, columns: Mapping[str, Column]) -> None:
        self.config, self.columns = config, columns
        self.parts = _parts(Wanted(config, columns))
        self.whole: Mapping[str, RowSelection] = {}
        if len(self.parts) > 1 and config.split_column is not None:
            raise ValueError(
                f"data.split_column: the data comes in splits already, {', '.join(self.parts)}"
            )
        if len(self.parts) == 1:
            name, pieces = next(iter(self.parts.items()))
            self.whole = self._by_column(name or "train", self._read(pieces))
        self.names = list(self.whole or self.parts)

    def split(self, names: Sequence[str]) -> RowSelection:
        """Reads the splits with these names in the source, one after the other."""
        if not self.whole:
            return self._read([piece for name in names for piece in self.parts[name]])
        indices = np.sort(np.concatenate([self.whole[name].indices for name in names]))
        return replace(self.whole[names[0]], indices=indices)

    def _by_column(self, name: str, whole: RowSelection) -> Mapping[str, RowSelection]:
        column = self.config.split_column
        if column is not None:
            return by_values(whole, whole.resolve(column, "data.split_column"))
        if SPLIT_COLUMN in whole.dataset.column_names and SPLIT_COLUMN not in self.columns:
            return by_values(whole, SPLIT_COLUMN)
        return {name: whole}

    def _read(self, pieces: Sequence[Piece]) -> RowSelection:
        import datasets

        parts = []
        for piece in pieces:
            dataset = piece.read()
            known = {role: name for role, name in piece.columns.items() if role in self.columns}
            mapping = {**known, **self.config.columns}
            names = find_columns(self.columns, mapping, dataset.column_names)
            check_parts(dataset, names, self.columns)
            check_root(dataset, names, self.columns, piece.folder)
            check_inside(dataset, names, self.columns, piece.folder, trust=self.config.trust_paths)
            parts.append(to_roles(dataset, names, self.columns, piece.folder))
        whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
        if not len(whole):
            raise ValueError(f"data.source: {self.config.source} has no rows")
        return RowSelection(whole, np.arange(len(whole)), names)


def _parts(wanted: Wanted) -> Parts:
    config = wanted.config
    if config.source.startswith(BUILTIN):
        from .sources import builtin_parts

        _check_local(config)
        _check_tables(config)
        return builtin_parts(config.source.removeprefix(BUILTIN), config.options)
    if config.options:
        raise ValueError(f"data.options are for builtin sources, and {config.source} is none")
    local = local_parts(wanted)
    if local is None:
        _check_tables(config)
        return hub_parts(config)
    _check_local(config)
    return local


def _check_local(config: DataConfig) -> None:
    for setting in ("name", "revision"):
        if getattr(config, setting) is not None:
            raise ValueError(
                f"data.{setting} is for hub data sets, and {config.source} is on this machine"
            )


def _check_tables(config: DataConfig) -> None:
    if config.root is not None:
        raise ValueError(f"data.root is for tables on this machine, and {config.source} is none")


def _check_hub_only(wanted: Wanted) -> None:
    config = wanted.config
    _check_tables(config)
    if config.source.startswith(BUILTIN) or local_parts(wanted) is not None:
        raise ValueError(
            f"data.streaming is for hub data sets, and {config.source} is on this machine"
        )
    if config.split_column is not None:
        raise ValueError("data.split_column needs the whole data set: not with data.streaming")
