"""Checks that the paths in a table start from the right folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.rows import Column
from ..columns import MEDIA

if TYPE_CHECKING:
    from datasets import Dataset

# Folders in which published data sets keep the files that a table beside them names.
SIBLINGS = (
    *("clips", "wavs", "wav", "audio", "audios", "flac", "recordings"),
    *("images", "image", "imgs", "img", "pictures", "train_images", "media", "data", "files"),
)
LOOKED_AT = 10  # paths of a column


def check_root(
    dataset: Dataset, names: Mapping[str, str], roles: Mapping[str, Column], folder: Path | None
) -> None:
    """Checks the first paths of each column of media.

    Args:
        names: the source's column of each role.
        folder: the folder from which relative paths start.

    Raises:
        ValueError: none of them is there, but from another folder nearby one would be.
    """
    if folder is None:
        return
    for role, name in names.items():
        if roles[role].kind not in MEDIA:
            continue
        cells = dataset.data.column(name).slice(0, LOOKED_AT).to_pylist()
        paths = [path for path in cells if isinstance(path, str) and path]
        paths = [path for path in paths if not os.path.isabs(path) and "://" not in path]
        if not paths or any((folder / path).exists() for path in paths):
            continue
        for other in _nearby(folder):
            if (other / paths[0]).is_file():
                raise ValueError(
                    f"data.root: the column {name!r} names {paths[0]}, which is not in {folder} "
                    f"but in {other}: say data.root: {other}"
                )


def _nearby(folder: Path) -> Iterator[Path]:
    for start in (folder, folder.parent):
        yield from (start / sibling for sibling in SIBLINGS)
    yield from list(folder.absolute().parents)[:3]
