"""Writing files and directories so that they are there whole or not at all.

Each is written under a temporary name in the same directory, then renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_TRIES = 100  # of reading a directory that is exchanged meanwhile
ABANDONED = 600.0  # seconds without a change after which a dead process's directory is removed


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

    If `path` is a link, the file that it points to is replaced. If the block raises, `path` is as
    it was and the temporary file is gone.

    Args:
        process: the id of the process, to be part of the temporary name where several processes may
            write the same file.
    """
    path = path.resolve() if path.is_symlink() else path
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

    The parent directory is made if it is missing. If `path` is a link, the directory that it points
    to is replaced. If the block or a rename raises, `path` is as it was and the fresh directory is
    gone. What a killed process has left of an earlier attempt is removed.
    """
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    fresh.mkdir()
    try:
        yield fresh
        if path.exists():
            exchange(fresh, path)  # the old directory is removed below
        else:
            os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_directory(path: str | os.PathLike, read: Callable[[], T]) -> T:
    """Returns what `read` returns, of one state of a directory.

    A writer may exchange the directory for another (`replacing_directory`) while it is read: then
    some files would be of the old state and some of the new one, or gone. It is read again then.

    Args:
        path: the directory.
        read: reads its files and changes nothing else.

    Raises:
        OSError, ValueError, …: as `read`, if it raises on a directory that stays as it is; or a
            `ValueError` if the directory was exchanged again and again.
    """
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            result = read()
        except Exception:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return result
    raise ValueError(f"{os.fspath(path)} is written again and again while it is read")


@contextlib.contextmanager
def same_directory(path: str | os.PathLike) -> Iterator[None]:
    """Raises an error after the block if the directory was exchanged for another in it.

    Raises:
        ValueError: it was.
    """
    before = _identity(path)
    yield
    if _identity(path) != before:
        raise ValueError(f"{os.fspath(path)} was written while it was read")


def _identity(path: str | os.PathLike) -> tuple[int, ...]:
    """Returns numbers that differ after a directory was exchanged for another."""
    try:
        known = os.stat(path)
    except OSError:
        return ()
    # A new directory may have the number of one that was removed, but not its times.
    return known.st_dev, known.st_ino, known.st_mtime_ns, known.st_ctime_ns


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary directories of `path` whose processes have ended.

    A process of another machine may have the same parent directory. So a directory is removed only
    if nothing was written to it for a while.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    for other in path.parent.iterdir():
        match = pattern.fullmatch(other.name)
        if match is None or _lives(int(match[1])):
            continue
        with contextlib.suppress(OSError):  # another process may remove it at the same time
            if time.time() - other.stat().st_mtime > ABANDONED:
                shutil.rmtree(other)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def exchange(one: Path, two: Path) -> None:
    """Exchanges two directories of one file system.

    Linux does it in one step, so that both names exist at every moment. Elsewhere three renames
    are needed; if one of them raises, the two directories are as they were.
    """
    if exchange_at_once(one, two):
        return
    between = two.with_name(f".{two.name}.old.{secrets.token_hex(4)}")
    os.rename(two, between)
    try:
        os.rename(one, two)
    except BaseException:
        os.rename(between, two)
        raise
    os.rename(between, one)


def exchange_at_once(one: Path, two: Path) -> bool:
    """Exchanges two paths by one call of the system; returns False where it has none."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    call = getattr(library, "renameat2", None)
    if call is None:
        return False
    here, both = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return call(here, os.fsencode(one), here, os.fsencode(two), both) == 0
