"""Folders of media without a table: a folder for each class, or folders of images and masks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..media import MEDIA_SUFFIXES
from ..parts import Parts, Piece
from .links import is_circle
from .masks import cut_split, image_mask_pairs

if TYPE_CHECKING:
    from datasets import Dataset


def media_parts(folder: Path) -> Parts:
    files = [PurePosixPath(name) for name in sorted(media_files(folder))]
    pairs = image_mask_pairs(files)
    rows: dict[str, list[dict[str, Any]]] = {}
    if pairs is not None:
        for split, image, mask in pairs:
            row = {"file_name": str(image), "mask_file_name": None if mask is None else str(mask)}
            rows.setdefault(split, []).append(row)
    else:
        for file in files:
            split, rest = cut_split(file.parts[:-1])
            if rest:
                row = {"file_name": str(file), "label": "/".join(rest)}
                rows.setdefault(split, []).append(row)
    return {
        split: [Piece(lambda some=some: from_rows(some), folder)]  # type: ignore[misc]
        for split, some in rows.items()
    }


def media_files(folder: Path) -> Iterator[str]:
    """Yields the paths of media relative to the folder, with forward slashes.

    A link to a folder around it is not followed: every file would be read again below it.
    """
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_circle(os.path.join(place, name))]
        relative = Path(place).relative_to(folder)
        for name in names:
            if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES and not name.startswith("."):
                yield (relative / name).as_posix()


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Returns a data set of rows; its columns are the keys of all of them."""
    import datasets
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset(pa.table({name: [row.get(name) for row in rows] for name in names}))
