"""Finds the folder of the pictures that a file of captions or questions names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...wanted import Wanted
from ..masks import IMAGES

_LOOKED_AT = 8  # pictures by which a folder is recognised
_ROOTED = re.compile(r"/|\\|[A-Za-z]:[\\/]|\w+://")


def image_paths(wanted: Wanted, file: Path, *namings: Sequence[str | None]) -> list[str | None]:
    """Returns the path of the picture of each row; None where a row has none.

    The folder and the naming are taken with which the most of a few pictures are there.

    Args:
        file: the file that names the pictures.
        namings: the names of the pictures of all rows, (N,), in each way that is possible.

    Raises:
        ValueError: none of the pictures is in a folder beside the file, or in data.root.
    """
    if not namings[0]:
        raise ValueError(f"data.source: {file} names no picture")
    folders = list(_folders(wanted, file))
    best, most = (folders[0], namings[0]), 0
    for names in namings:
        named = [name for name in names if name and not _ROOTED.match(name)]
        if not named:
            return list(names)
        step = max(len(named) // _LOOKED_AT, 1)
        some = named[::step][:_LOOKED_AT]
        for folder in folders:
            count = sum((folder / name).is_file() for name in some)
            if count > most:
                best, most = (folder, names), count
        if most == len(some):
            break
    if not most:
        raise ValueError(
            f"data.source: {file} names the picture {named[0]}, which is neither in "
            f"{folders[0]} nor in a folder beside it: say in data.root where the pictures lie"
        )
    folder, names = best
    start = os.path.abspath(folder)
    return [None if not name else os.path.join(start, name) for name in names]


def _folders(wanted: Wanted, file: Path) -> Iterator[Path]:
    """Yields the folders in which pictures may lie, the likeliest first."""
    if wanted.config.root is not None:
        starts = [wanted.root(file.parent)]
    else:
        starts = [file.absolute().parent]
        if starts[0] != wanted.path.absolute():  # not above the folder that is the source
            starts.append(starts[0].parent)
    words = re.findall(r"[a-z]+\d*", file.stem.lower())
    for start in starts:
        yield start
        below = list(_below(start))
        for folder in list(below):
            if folder.name.lower() in (*IMAGES, start.name.lower(), folder.parent.name.lower()):
                below += _below(folder)
        # The pictures of captions_val2014.json are those in val2014.
        yield from sorted(below, key=lambda folder: folder.name.lower() not in words)


def _below(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as inside:
            names = [e.name for e in inside if not e.name.startswith(".") and e.is_dir()]
    except PermissionError:
        return []
    return [folder / name for name in sorted(names)]
