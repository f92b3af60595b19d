"""Finds the splits of a local source: a file, a glob of files, or a folder."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from mmadapters.suggest import nearest

from ...core.files import check_readable
from ..parts import Parts
from ..tables.read import TABLES
from ..wanted import Wanted
from .archives.tars import is_tar
from .archives.webdataset import braced_parts, tar_parts
from .folder import folder_parts
from .known import known_parts
from .links import is_circle
from .table_files import table_parts


def local_parts(wanted: Wanted) -> Parts | None:
    """Returns the splits of a local source, or None if the source is not a local path.

    Raises:
        ValueError: it is a local path, but nothing at it can be read.
        PermissionError: this user may not read a folder of the path.
    """
    source, path = wanted.config.source, wanted.path
    check_readable(path)
    if path.is_dir():
        return folder_parts(wanted, path)
    if path.is_file():
        parts = known_parts(wanted, path)
        return table_parts(wanted, [path]) if parts is None else parts
    if (parts := braced_parts(wanted)) is not None:
        return parts
    if files := sorted(Path(name) for name in glob.glob(str(path), recursive=True)):
        if "**" in source:  # it follows links to folders
            files = [file for file in files if not any(is_circle(str(p)) for p in file.parents)]
        files = [file for file in files if file.is_file()]
        if files and all(map(is_tar, files)):
            return tar_parts(wanted, files)
        return table_parts(wanted, files)
    pattern = re.search(r"[*?\[]", source)
    if pattern or path.suffix.lower() in TABLES or source.startswith((".", "~", os.sep)):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if pattern else nearest(path.name, beside)
        raise ValueError(f"data.source: no file is at {source}{hint}")
    return None
