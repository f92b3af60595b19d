"""Reads the tables of a split as a stream: in blocks, with the columns and types of all of them.

CSV, TSV, JSON lines and parquet are looked through once, and then read in blocks. One JSON list is
read as a whole, since its rows have no lines of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmadapters.errors import first_line

from ..wanted import Wanted
from .delimited import DelimitedTable, WholeNumbers, as_numbers, delimited_table
from .json_lines import JsonLines, json_lines
from .json_rows import read_json
from .read import all_delimited, check_names, is_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

CHARACTERS = 1 << 20  # in a block of a table of separated cells
BYTES = 4 << 20  # in a block of a parquet file
MOST_ROWS = 1000  # in a block of a parquet file


class _Blocks(Protocol):
    def blocks(self) -> Iterator[pa.Table]: ...


@dataclass(frozen=True)
class TableShard:
    """A table whose columns are those of all tables of its split.

    Attributes:
        file: the table, for messages.
        table: reads it in blocks.
        schema: the columns of all tables.
        numbers: the columns of texts that become whole numbers.
    """

    file: Path
    table: _Blocks
    schema: pa.Schema
    numbers: frozenset[str] = frozenset()

    def blocks(self) -> Iterator[Dataset]:
        import datasets
        import pyarrow as pa

        try:
            for table in self.table.blocks():
                yield datasets.Dataset(as_numbers(_cast(table, self.schema), self.numbers))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{self.file} cannot be read: {first_line(error)}") from None


@dataclass(frozen=True)
class ParquetShard:
    """A parquet file.

    Attributes:
        features: of the first file of the split.
    """

    file: Path
    features: Features

    def blocks(self) -> Iterator[Dataset]:
        import datasets
        import pyarrow as pa
        from datasets.table import table_cast

        schema = self.features.arrow_schema
        info = datasets.DatasetInfo(features=self.features)
        try:
            with _parquet(self.file) as file:
                about = file.metadata
                size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
                rows = BYTES * about.num_rows // max(size, 1)
                rows = min(max(rows, 1), MOST_ROWS)
                for batch in file.iter_batches(batch_size=rows, use_threads=False):
                    table = pa.Table.from_batches([batch]).select(schema.names)
                    yield datasets.Dataset(table_cast(table, schema), info=info.copy())
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self.file} cannot be read: {first_line(error)}") from None


@dataclass(frozen=True)
class _Delimited:
    table: DelimitedTable

    def blocks(self) -> Iterator[pa.Table]:
        return self.table.blocks(CHARACTERS)


@dataclass(frozen=True)
class _InMemory:
    table: pa.Table

    def blocks(self) -> Iterator[pa.Table]:
        for start in range(0, len(self.table), MOST_ROWS):
            yield self.table.slice(start, MOST_ROWS)


def table_shards(
    wanted: Wanted, files: Sequence[Path]
) -> Sequence[TableShard] | Sequence[ParquetShard]:
    """Looks through the tables of a split; their rows are those that `read_tables` gives.

    Raises:
        ValueError: a table cannot be read, or the tables differ in the kinds of their columns.
    """
    import pyarrow as pa

    if files[0].suffix.lower() == ".parquet":
        return _parquet_shards(files)
    numbers = WholeNumbers()
    tables: list[tuple[Path, Any, pa.Schema]] = []
    for file in files:
        try:
            tables.append((file, *_looked_through(wanted, file, numbers)))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    try:
        schema = pa.unify_schemas([s for _, _, s in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"{files[0]} and the {len(files) - 1} other files differ in the kinds of their "
            f"columns: {first_line(error)}"
        ) from None
    chosen = numbers.names if all_delimited(files) else frozenset()
    return [TableShard(file, table, schema, chosen) for file, table, _ in tables]


def _looked_through(wanted: Wanted, file: Path, numbers: WholeNumbers) -> tuple[_Blocks, pa.Schema]:
    import pyarrow as pa

    if is_json(file):
        lines: JsonLines | None = json_lines(wanted, file)
        if lines is not None:
            return lines, pa.schema(dict(lines.types))
        whole = read_json(wanted, file)
        check_names(file, whole.column_names)
        return _InMemory(whole), whole.schema
    table = delimited_table(wanted, file)
    check_names(file, table.names)
    for block in table.blocks(CHARACTERS):
        numbers.look_at(block)
    return _Delimited(table), pa.schema([(name, pa.string()) for name in table.names])


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Returns a table with the columns of a schema that holds its own ones."""
    import pyarrow as pa

    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _parquet_shards(files: Sequence[Path]) -> Sequence[ParquetShard]:
    import datasets
    import pyarrow as pa

    schemas = []
    for file in files:
        try:
            with _parquet(file) as opened:
                schemas.append(opened.schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    for file, schema in zip(files, schemas, strict=True):
        if set(schema.names) != set(schemas[0].names):
            raise ValueError(
                f"{file} has the columns {', '.join(schema.names)}, and {files[0]} has "
                f"{', '.join(schemas[0].names)}: they cannot be one data set"
            )
    features = datasets.Features.from_arrow_schema(schemas[0])
    return [ParquetShard(file, features) for file in files]


def _parquet(file: Path) -> Any:
    from pyarrow import parquet

    # Memory-mapped and not buffered before: a row group may be larger than the memory.
    return parquet.ParquetFile(file, memory_map=True, pre_buffer=False)
