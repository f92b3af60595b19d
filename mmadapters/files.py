"""Writing files and directories so that they are there whole or not at all.

Each is written under a temporary name in the same directory, then renamed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def replacing_file(path: Path, *, process: int | None = None) -> Iterator[Path]:
    """Yields a temporary path to write to; the file written there becomes `path` after the block.

    If the block raises, `path` is as it was and the temporary file is gone.

    Args:
        process: the id of the process, to be part of the temporary name where several processes may
            write the same file.
    """
    middle = "" if process is None else f"{process}."
    temporary = path.with_name(f".{path.name}.{middle}tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yields a fresh directory to write to, which becomes `path` after the block.

    The parent directory is made if it is missing. If the block or a rename raises, `path` is as it
    was and the fresh directory is gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = secrets.token_hex(4)
    fresh = path.with_name(f".{path.name}.{unique}")
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            _swap(fresh, path, old=path.with_name(f".{path.name}.old.{unique}"))
        else:
            os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, path: Path, *, old: Path) -> None:
    os.rename(path, old)
    try:
        os.rename(fresh, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
