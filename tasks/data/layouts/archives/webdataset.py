"""webdataset: tars whose members are the columns of rows.

Source: https://github.com/webdataset/webdataset.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...media import MEDIA_SUFFIXES
from ...parts import Parts
from ...splits import KNOWN
from ...tables.read import TABLES
from ...wanted import Wanted
from ..table_files import split_of_file
from .shards import archive_piece
from .tars import is_tar

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def webdataset(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a tar, a folder of tars (or data/ in it), or a folder for each split with tars.

    A folder that also has media, tables of its splits or other folders is laid out in another way:
    its tars are taken for the archives from which it was unpacked.
    """
    if path.is_file():
        return tar_parts(wanted, [path]) if is_tar(path) else None
    inside = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    folders = [p for p in inside if p.is_dir()]
    stems = {p.stem for p in inside if is_tar(p)}
    tables = [p for p in inside if p.suffix.lower() in TABLES and split_of_file(p.name)]
    if any(p.suffix.lower() in MEDIA_SUFFIXES for p in inside):
        return None
    if any(table.stem not in stems for table in tables):
        return None
    if [p.name for p in folders] == ["data"] and not stems:
        return webdataset(wanted, folders[0])
    if not folders:
        tars = [p for p in inside if is_tar(p)]
        return tar_parts(wanted, tars) if tars else None
    if not all(p.name.lower() in KNOWN for p in folders):
        return None
    parts = {p.name: [f for f in sorted(p.iterdir()) if is_tar(f)] for p in folders}
    if not all(parts.values()):
        return None
    return {name: [archive_piece(wanted, tars)] for name, tars in parts.items()}


def tar_parts(wanted: Wanted, tars: Sequence[Path]) -> Parts:
    """Returns the splits of tars: those that their names begin with, or one split if some name
    begins with none."""
    named = [split_of_file(tar.name) for tar in tars]
    if None in named:
        return {"": [archive_piece(wanted, tars)]}
    pairs = sorted(zip(map(str, named), tars, strict=True))
    by_split = itertools.groupby(pairs, key=lambda pair: pair[0])
    return {split: [archive_piece(wanted, [tar for _, tar in some])] for split, some in by_split}


def braced_parts(wanted: Wanted) -> Parts | None:
    """Reads tars that webdataset's braces name, {000000..000009}.tar; None for another source.

    Raises:
        ValueError: one of them does not exist.
    """
    source = str(wanted.path)
    if not is_tar(wanted.path) or not _BRACES.search(source):
        return None
    tars = [Path(name) for name in expanded(source)]
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise ValueError(
            f"data.source: {source} names {len(tars)} tars, and there is no file {missing[0]}"
        )
    return tar_parts(wanted, tars)


def expanded(source: str) -> Iterator[str]:
    """Yields the names that braces stand for: {08..10} for 08, 09 and 10, and {a,b} for a and b."""
    braces = _BRACES.search(source)
    if braces is None:
        yield source
        return
    span = _RANGE.fullmatch(braces[1])
    if span is None:
        words = braces[1].split(",")
    else:
        width = len(span[1])
        words = [f"{number:0{width}}" for number in range(int(span[1]), int(span[2]) + 1)]
    for word in words:
        yield from expanded(source[: braces.start()] + word + source[braces.end() :])
