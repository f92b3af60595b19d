"""Local data sets: tables (CSV, JSON lines, parquet) and folders of files.

| content of the folder                              | what is read                    |
|----------------------------------------------------|---------------------------------|
| metadata.csv, .jsonl or .parquet                   | that table                      |
| a folder for each split with such a file in it     | those tables                    |
| train.csv, test-0.parquet, … (also in data/)       | those tables                    |
| images/ and masks/ (train/images/, images/train/)  | file_name, mask_file_name: paired by name |
| a folder for each class (CLASS/, train/CLASS/)     | file_name, label                |
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mmadapters.errors import first_line
from mmadapters.suggest import nearest

from .media import MEDIA_SUFFIXES
from .parts import Parts, Piece
from .splits import KNOWN

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))
IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels")
_JSON_BLOCK = 64 << 20  # bytes; one row must fit into a block
_INTEGERS = r"^(0|-?[1-9]\d{0,17})?$"  # only numbers that Python writes in the same way


def local_parts(source: str) -> Parts | None:
    """Returns the splits of a local source, or None if `source` is not a local path.

    Raises:
        ValueError: it is a local path, but nothing at it can be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder_parts(path)
    if path.is_file():
        return _table_parts([path])
    if files := sorted(Path(name) for name in glob.glob(str(path), recursive=True)):
        return _table_parts([file for file in files if file.is_file()])
    pattern = re.search(r"[*?\[]", source)
    if pattern or path.suffix.lower() in TABLES or source.startswith((".", "~", os.sep)):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if pattern else nearest(path.name, beside)
        raise ValueError(f"data.source: no file is at {source}{hint}")
    return None


def _table_parts(files: Sequence[Path]) -> Parts:
    """Returns the splits of the tables of one data set: those that the file names begin with, or
    one split if some name begins with none."""
    if odd := [file for file in files if file.suffix.lower() not in TABLES]:
        raise ValueError(
            f"data.source: {odd[0]} is none of {', '.join(TABLES)}; a folder of media needs a "
            f"metadata.csv with a column {'file_name'!r}"
        )
    named = [_split_of_file(file.name) for file in files]
    if len(files) == 1 or None in named:
        return {"": _table_pieces(files)}
    parts: dict[str, list[Path]] = {}
    for name, file in zip(named, files, strict=True):
        parts.setdefault(str(name), []).append(file)
    return {name: _table_pieces(some) for name, some in parts.items()}


def _split_of_file(name: str) -> str | None:
    first = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return first if first in KNOWN else None


def _table_pieces(files: Sequence[Path]) -> list[Piece]:
    by_folder: dict[Path, list[Path]] = {}
    for file in files:
        by_folder.setdefault(file.parent, []).append(file)
    return [
        Piece(lambda some=tuple(some): _read_tables(some), folder)  # type: ignore[misc]
        for folder, some in by_folder.items()
    ]


def _folder_parts(folder: Path) -> Parts:
    if metadata := _metadata(folder):
        return {"": _table_pieces([metadata])}
    inside = sorted(folder.iterdir())
    nested = {path.name: file for path in inside if path.is_dir() and (file := _metadata(path))}
    if any(name.lower() in KNOWN for name in nested):
        return {name: _table_pieces([file]) for name, file in nested.items()}
    for place in (folder, folder / "data"):
        tables = sorted(place.iterdir()) if place.is_dir() else []
        tables = [path for path in tables if path.suffix.lower() in TABLES]
        if named := [path for path in tables if _split_of_file(path.name)]:
            return _table_parts(named)
    if parts := _media_parts(folder):
        return parts
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    raise ValueError(
        f"data.source: the folder {folder} has no metadata.csv or .jsonl, no table for each split "
        f"(train.csv), no images/ with masks/ and no folder for each class; it has {names}"
        + (", …" if len(inside) > 5 else "")
    )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def _media_parts(folder: Path) -> Parts:
    files = [PurePosixPath(name) for name in sorted(_media_files(folder))]
    pairs = _pairs(files)
    rows: dict[str, list[dict[str, Any]]] = {}
    if pairs is not None:
        for split, image, mask in pairs:
            row = {"file_name": str(image), "mask_file_name": None if mask is None else str(mask)}
            rows.setdefault(split, []).append(row)
    else:
        for file in files:
            split, rest = _cut_split(file.parts[:-1])
            if rest:
                row = {"file_name": str(file), "label": "/".join(rest)}
                rows.setdefault(split, []).append(row)
    return {
        split: [Piece(lambda some=some: _from_rows(some), folder)]  # type: ignore[misc]
        for split, some in rows.items()
    }


def _media_files(folder: Path) -> Iterator[str]:
    """Yields the paths of media relative to the folder, with forward slashes."""
    for place, _, names in os.walk(folder, followlinks=True):
        relative = Path(place).relative_to(folder)
        for name in names:
            if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES and not name.startswith("."):
                yield (relative / name).as_posix()


def _pairs(
    files: Sequence[PurePosixPath],
) -> list[tuple[str, PurePosixPath, PurePosixPath | None]] | None:
    """Returns (split, image, its mask) for each image, or None without folders of images and masks.

    An image and its mask have equal paths but for the suffix.
    """
    images: dict[tuple[str, PurePosixPath], PurePosixPath] = {}
    masks: dict[tuple[str, PurePosixPath], PurePosixPath] = {}
    for file in files:
        # The split comes first or second: train/images/a.jpg, images/train/a.jpg.
        split, rest = _cut_split(file.parts)
        if len(rest) < 2 or rest[0].lower() not in (*IMAGES, *MASKS):
            continue
        later, name = _cut_split(rest[1:])
        key = (split or later, PurePosixPath(*name).with_suffix(""))
        (images if rest[0].lower() in IMAGES else masks)[key] = file
    if not images or not masks:
        return None
    if not images.keys() & masks.keys():
        raise ValueError(
            f"data.source: no image and mask have the same name ({min(images.values())}, "
            f"{min(masks.values())}): name them alike, or write a metadata.csv"
        )
    return [(key[0], image, masks.get(key)) for key, image in images.items()]


def _cut_split(parts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Splits off the first folder if it has the name of a split: ("train", ("images", …))."""
    if parts and parts[0].lower() in KNOWN:
        return parts[0], parts[1:]
    return "", parts


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    import datasets
    import pyarrow as pa

    return datasets.Dataset(pa.Table.from_pylist(rows))


def _read_tables(files: Sequence[Path]) -> Dataset:
    """Reads files into one data set; rows of files without a column have no value in it."""
    import datasets
    import pyarrow as pa

    if files[0].suffix.lower() == ".parquet":
        return _read_parquet(files)
    tables = [_read_table(file) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"{files[0]} and the {len(files) - 1} other files differ in the kinds of their "
            f"columns: {first_line(error)}"
        ) from None
    if all(file.suffix.lower() in (".csv", ".tsv") for file in files):
        table = _whole_numbers(table)
    return datasets.Dataset(table)


def _read_table(file: Path) -> pa.Table:
    import pyarrow as pa

    reader = _read_json if file.suffix.lower() in (".json", ".jsonl") else _read_csv
    try:
        table = reader(file)
    except (pa.ArrowException, OSError, ValueError) as error:  # bad JSON and UTF-8 are ValueErrors
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{file} has more than one column {twice[0]!r}")
    return table


def _read_csv(file: Path) -> pa.Table:
    """Reads all cells as text, so that "NA", dates and 007 stay as they are."""
    from pyarrow import csv, string

    with open(file, encoding="utf-8-sig") as lines:
        header = next(lines, "")
    separators = [mark for mark in ",;\t" if mark in header]
    separator = "," if "," in separators or not separators else separators[0]
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(names, string()), strings_can_be_null=False
    )
    return csv.read_csv(file, parse_options=parse, convert_options=convert)


def _whole_numbers(table: pa.Table) -> pa.Table:
    """Turns columns whose cells are all whole numbers (or empty) into numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for i, name in enumerate(table.column_names):
        cells = table.column(i)
        if not pc.all(pc.match_substring_regex(cells, _INTEGERS)).as_py():
            continue
        filled = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
        if filled.null_count < len(cells):
            table = table.set_column(i, name, filled.cast(pa.int64()))
    return table


def _read_json(file: Path) -> pa.Table:
    """Reads JSON lines, or one JSON list of objects."""
    import pyarrow as pa
    from pyarrow import json as lines

    with open(file, encoding="utf-8-sig") as text:
        start = text.read(4096).lstrip()
        if start.startswith("["):
            text.seek(0)
            rows = json.load(text)
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("its list holds values that are not objects")
            return pa.Table.from_pylist(rows)
    if not start:
        raise ValueError("it is empty")
    return lines.read_json(file, read_options=lines.ReadOptions(block_size=_JSON_BLOCK))


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
