"""Folders of media without a table: a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ...core.files import is_system_entry
from ..media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, MEDIA_SUFFIXES
from ..parts import Parts, Piece
from ..wanted import Wanted
from .links import is_circle
from .masks import cut_split
from .passed_over import lost_classes, unread_findings

if TYPE_CHECKING:
    from datasets import Dataset


def class_parts(wanted: Wanted, folder: Path, files: Sequence[str]) -> Parts:
    """Returns a row for each picture or recording of the folders of classes, by split.

    A task that reads pictures alone passes recordings over, and the other way round.

    Args:
        files: all files below the folder, from `every_file`.
    """
    kinds = {column.kind for column in wanted.columns.values()}
    suffixes = (
        *(IMAGE_SUFFIXES if "image" in kinds or "audio" not in kinds else ()),
        *(AUDIO_SUFFIXES if "audio" in kinds or "image" not in kinds else ()),
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    classes: dict[str, set[str]] = {}
    unread: dict[str, list[str]] = {}
    for name in files:
        split, rest = cut_split(PurePosixPath(name).parts[:-1])
        label = "/".join(rest)
        if not rest:
            continue
        if name.lower().endswith(suffixes):
            rows.setdefault(split, []).append({"file_name": name, "label": label})
            classes.setdefault(split, set()).add(label)
        else:
            unread.setdefault(f"{split}/{label}", []).append(name)
    findings = (
        *lost_classes(classes, unread),
        *unread_findings(folder, [name for some in unread.values() for name in some]),
    )
    return {
        split: [Piece(lambda some=some: from_rows(some), folder, findings=findings)]  # type: ignore[misc]
        for split, some in rows.items()
    }


def every_file(folder: Path) -> list[str]:
    """Returns the paths of all files relative to the folder, sorted, with forward slashes.

    Hidden files and folders and those of systems are left out. A link to a folder around it is not
    followed: every file would be read again below it.
    """
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not is_system_entry(name) and not is_circle(os.path.join(place, name))
        ]
        start = Path(place).relative_to(folder).as_posix()
        prefix = "" if start == "." else f"{start}/"
        files += [prefix + name for name in names if not is_system_entry(name)]
    return sorted(files)


def media_files(folder: Path) -> Iterator[str]:
    """Yields the paths of media relative to the folder, sorted, with forward slashes."""
    yield from filter(is_media, every_file(folder))


def is_media(name: str) -> bool:
    """Returns whether a file is a picture or a recording that can be read, by its suffix."""
    return os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Returns a data set of rows; its columns are the keys of all of them."""
    import datasets
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset(pa.table({name: [row.get(name) for row in rows] for name in names}))
