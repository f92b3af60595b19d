"""Local data sets: tables (CSV, JSON lines, parquet) and folders of files.

| content of the folder                              | what is read                    |
|----------------------------------------------------|---------------------------------|
| what save_to_disk of `datasets` has written        | that data set                   |
| metadata.csv, .jsonl or .parquet                   | that table                      |
| a folder for each split with such a file in it     | those tables                    |
| train.csv, test-0.parquet, … (also in data/)       | those tables                    |
| images/ and masks/ and the like (see `pictures`)   | file_name, mask_file_name: paired by name |
| a folder for each class (CLASS/, train/CLASS/)     | file_name, label                |
"""

from __future__ import annotations

from pathlib import Path

from ...core.files import is_system_entry
from ..parts import Parts
from ..splits import KNOWN
from ..tables.read import TABLES
from ..wanted import Wanted
from .known import known_parts
from .media_folders import class_parts, every_file, is_media
from .passed_over import counted_suffixes, remedy
from .pictures.pairs import mask_parts
from .saved import saved_parts
from .table_files import split_of_file, table_parts, table_pieces

METADATA = tuple(f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet"))


def folder_parts(wanted: Wanted, folder: Path) -> Parts:
    """Returns the splits of a folder.

    Raises:
        ValueError: nothing in it can be read.
    """
    if (saved := saved_parts(wanted, folder)) is not None:
        return saved
    if metadata := _metadata(folder):
        parts = known_parts(wanted, metadata)
        return {"": table_pieces(wanted, [metadata])} if parts is None else parts
    parts = known_parts(wanted, folder)
    if parts is not None:
        return parts
    inside = sorted(path for path in folder.iterdir() if not is_system_entry(path.name))
    nested = {path.name: file for path in inside if path.is_dir() and (file := _metadata(path))}
    if any(name.lower() in KNOWN for name in nested):
        return {name: table_pieces(wanted, [file]) for name, file in nested.items()}
    for place in (folder, folder / "data"):
        tables = sorted(place.iterdir()) if place.is_dir() else []
        tables = [path for path in tables if path.suffix.lower() in TABLES]
        if named := [path for path in tables if split_of_file(path.name)]:
            return table_parts(wanted, named)
    files = every_file(folder)
    parts = mask_parts(wanted, folder, files)
    if parts is not None:
        return parts
    if parts := class_parts(wanted, folder, files):
        if wanted.config.root is not None:
            raise ValueError(
                f"data.root is for tables, and the folder {folder} has none: leave it out"
            )
        return parts
    names = ", ".join(path.name for path in inside[:5]) or "nothing"
    unread = [file for file in files if "/" in file and not is_media(file)]
    told = f" (its files are {counted_suffixes(unread)}: {remedy(unread[0])})" if unread else ""
    raise ValueError(
        f"data.source: the folder {folder} has no metadata.csv or .jsonl, no table for each split "
        f"(train.csv), no images/ with masks/ and no folder for each class{told}; it has {names}"
        + (", …" if len(inside) > 5 else "")
    )


def _metadata(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)
