"""Folders that img2dataset has written, in its formats webdataset, files and parquet.

Source: https://github.com/rom1504/img2dataset, "Output format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...parts import Parts, Piece, Shard
from ...tables.read import read_tables
from ...tables.shards import table_shards
from ...wanted import Wanted
from .shards import archive_piece

if TYPE_CHECKING:
    from datasets import Dataset

_STATS = re.compile(r"(\d+)_stats\.json")
_PICTURES = ("jpg", "png", "webp")  # the column of the pictures, called as their format


def img2dataset(wanted: Wanted, path: Path) -> Parts | None:
    """Reads the pictures that were downloaded, with all that is known of them.

    Raises:
        ValueError: a shard is not finished, or there are no pictures.
    """
    if not path.is_dir():
        return None
    shards = sorted(m[1] for p in path.iterdir() if (m := _STATS.fullmatch(p.name)))
    if not shards:
        return None
    tars = sorted(p for p in path.glob("*.tar") if p.stem.isdecimal())
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name.isdecimal())
    tables = sorted(p for p in path.glob("*.parquet") if p.stem.isdecimal())
    if places := tars or folders:
        _check_finished(places, shards)
        return {"": [archive_piece(wanted, places)]}
    if tables and (picture := _picture_column(tables[0])):
        _check_finished(tables, shards)
        return {"": [_table_piece(wanted, tables, picture)]}
    raise ValueError(
        f"data.source: {path} is a folder of img2dataset without pictures: let it write them with "
        "--output_format webdataset, files or parquet"
    )


def _check_finished(places: Sequence[Path], shards: Sequence[str]) -> None:
    if open_ones := [place for place in places if place.stem not in shards]:
        raise ValueError(
            f"data.source: img2dataset has not finished {open_ones[0]}, which has no "
            f"{open_ones[0].stem}_stats.json: run it again to the end, or remove that shard"
        )


def _picture_column(table: Path) -> str | None:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(table)
    except (pa.ArrowException, OSError):
        return None
    return next((name for name in _PICTURES if name in schema.names), None)


@dataclass(frozen=True)
class _Downloaded:
    """The rows of a table whose picture was downloaded."""

    shard: Shard
    picture: str

    def blocks(self) -> Iterator[Dataset]:
        import datasets

        for block in self.shard.blocks():
            table = block.data.table
            there = table.filter(table.column(self.picture).is_valid())
            yield datasets.Dataset(there, info=block.info)


def _table_piece(wanted: Wanted, tables: Sequence[Path], picture: str) -> Piece:
    def read() -> Dataset:
        rows = read_tables(wanted, tables)
        there = np.flatnonzero(rows.data.column(picture).is_valid().to_numpy())
        return rows if len(there) == len(rows) else rows.select(there).flatten_indices()

    def shards() -> Sequence[Shard]:
        return [_Downloaded(shard, picture) for shard in table_shards(wanted, tables)]

    return Piece(read, None, {"image": picture}, shards=shards)
