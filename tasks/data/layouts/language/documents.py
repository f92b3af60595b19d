"""JSON files of captions and questions: recognises them by their first characters, reads them."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.errors import first_line

from ...parts import Parts, Piece
from ...splits import KNOWN
from ...tables.encodings import read_text
from ...tables.json_rows import invalid_json, short_json, written
from ...wanted import Wanted
from ..table_files import split_of_file

if TYPE_CHECKING:
    from datasets import Dataset

_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_HEAD = 1 << 16  # characters
_NAMES = {"validate": "validation", "restval": "train"}  # of SLAKE and of Karpathy's splits


def reads(wanted: Wanted, *roles: str) -> bool:
    """Returns whether the task reads one of these roles."""
    return not wanted.columns.keys().isdisjoint(roles)


def is_mapped(wanted: Wanted, *roles: str) -> bool:
    """Returns whether data.columns fills one of these roles, so that the file is a plain table."""
    return not wanted.config.columns.keys().isdisjoint(roles)


def has_tables(path: Path, suffixes: Sequence[str] = _TABLES) -> bool:
    """Returns whether a path is a folder with a table for each split, which comes before files of
    captions that lie beside it."""
    places = [place for place in (path, path / "data") if place.is_dir()]
    return any(
        file.suffix.lower() in suffixes and split_of_file(file.name)
        for place in places
        for file in place.iterdir()
    )


def head(wanted: Wanted, file: Path) -> str:
    """Returns the first characters of a text file; "" if it cannot be read, which is told later."""
    try:
        with file.open(encoding=wanted.config.encoding or "utf-8-sig", errors="replace") as stream:
            return stream.read(_HEAD)
    except (OSError, LookupError):
        return ""


def json_files(path: Path, *suffixes: str) -> list[Path]:
    """Returns the file itself, or the files of a folder, if they end as JSON (or as `suffixes`)."""
    suffixes = suffixes or (".json",)
    several = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in several if file.suffix.lower() in suffixes and file.is_file()]


def document(wanted: Wanted, file: Path) -> Any:
    """Returns the value of a JSON file, or the list of those of JSON lines.

    Numbers with a fraction become texts, as they are written.

    Raises:
        ValueError: it is not valid JSON.
    """
    try:
        text = read_text(file, wanted.config.encoding)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    try:
        return json.loads(text, parse_float=str)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"{file} cannot be read: {invalid_json(error)}") from None
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line, parse_float=str)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} cannot be read: {invalid_json(error, number)}") from None
    return values


def objects(file: Path, document: Any, key: str | None, *needed: str) -> list[dict[str, Any]]:
    """Returns a list of objects out of a document.

    Args:
        key: where it stands; None if the document is the list.
        needed: the keys of each object.

    Raises:
        ValueError: there is no such list, or an object lacks a key.
    """
    values = document if key is None else document.get(key)
    where = f"{key} " if key else "row "
    if not isinstance(values, list):
        raise ValueError(f"{file} has no list {key!r}" if key else f"{file} holds no list of rows")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(
                f"{file}: {where}{number} is {short_json(value)}, and no object with keys"
            )
        if missing := [name for name in needed if name not in value]:
            raise ValueError(f"{file}: {where}{number} has no {missing[0]!r}: {short_json(value)}")
    return values


def as_text(value: Any) -> str:
    """Returns a value of JSON as text; "" for null."""
    return written(value) or ""


def split_name(name: str) -> str:
    """Returns the usual name of a split that has another name in these data sets."""
    return _NAMES.get(name.lower(), name)


def split_in(stem: str) -> str:
    """Returns the split that is a word of a file's name (captions_val2014), or ""."""
    words = [split_name(word) for word in re.split(r"[^a-z]+", stem.lower())]
    return next((word for word in words if word in KNOWN), "")


def file_parts(files: Sequence[Path], read: Callable[[Path], Dataset]) -> Parts:
    """Returns the splits of files, each read by `read`; relative paths start from its folder.

    Raises:
        ValueError: see `by_split`.
    """
    return {
        split: [Piece(functools.partial(read, file), file.parent)]
        for split, file in by_split(files).items()
    }


def by_split(files: Sequence[Path]) -> dict[str, Path]:
    """Returns the files by the splits in their names; a single file has the split "".

    Raises:
        ValueError: several files have the same split, or one has none.
    """
    if len(files) == 1:
        return {"": files[0]}
    splits: dict[str, Path] = {}
    for file in files:
        split = split_in(file.stem)
        if not split or split in splits:
            other = splits.get(split, next(some for some in files if some != file))
            raise ValueError(
                f"data.source: {other} and {file.name} are not a file for each split: give one of "
                "them as data.source, or name them train, validation and test"
            )
        splits[split] = file
    return splits
