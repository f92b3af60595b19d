"""Reads the tables of a split into one data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmadapters.errors import first_line

from ..wanted import Wanted
from .delimited import WholeNumbers, as_numbers, read_csv
from .json_rows import read_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def read_tables(wanted: Wanted, files: Sequence[Path]) -> Dataset:
    """Reads files into one data set; rows of files without a column have no value in it."""
    import datasets
    import pyarrow as pa

    if files[0].suffix.lower() == ".parquet":
        return _read_parquet(files)
    tables = [_read_table(wanted, file) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"{files[0]} and the {len(files) - 1} other files differ in the kinds of their "
            f"columns: {first_line(error)}"
        ) from None
    if all_delimited(files):
        numbers = WholeNumbers()
        numbers.look_at(table)
        table = as_numbers(table, numbers.names)
    return datasets.Dataset(table)


def all_delimited(files: Sequence[Path]) -> bool:
    """Returns whether all files are tables of separated cells."""
    return all(file.suffix.lower() in (".csv", ".tsv") for file in files)


def is_json(file: Path) -> bool:
    """Returns whether a file is JSON by its name."""
    return file.suffix.lower() in (".json", ".jsonl")


def check_names(file: Path, names: Sequence[str]) -> None:
    """Checks the names of a table's columns.

    Raises:
        ValueError: one stands there twice.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} has more than one column {twice[0]!r}")


def _read_table(wanted: Wanted, file: Path) -> pa.Table:
    import pyarrow as pa

    reader = read_json if is_json(file) else read_csv
    try:
        table = reader(wanted, file)
    except (pa.ArrowException, OSError, ValueError) as error:  # bad JSON and UTF-8 are ValueErrors
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    check_names(file, table.column_names)
    return table


def _read_parquet(files: Sequence[Path]) -> Dataset:
    """Reads files through the cache of `datasets`, which memory-maps them."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    names = [str(file.resolve()) for file in files]
    try:
        return datasets.load_dataset("parquet", data_files={"train": names}, split="train")
    except (DatasetGenerationError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        what = f"{files[0]}" + (f" (or one of {len(files) - 1} more)" if len(files) > 1 else "")
        raise ValueError(f"{what} cannot be read: {first_line(cause)}") from None
