"""Files that users name, and true sentences about those that cannot be opened."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from mmadapters.errors import first_line

from .errors import BadRow

# Files and folders that systems and programs put beside those of a user, in lower case.
_SYSTEM = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"),
        *("system volume information", "lost+found", "icon\r", "__pycache__"),
    )
)


def is_system_entry(name: str) -> bool:
    """Returns whether a file or a folder of this name is hidden, or is there for a system and not
    for its user (`.DS_Store`, `._a.png`, `Thumbs.db`, `__MACOSX`)."""
    return name.startswith(".") or name.lower() in _SYSTEM


def open_file(path: str | Path) -> BinaryIO:
    """Opens a regular file to read.

    Raises:
        BadRow: it cannot be opened. The message says what is there: nothing, a folder, a link to
            nothing, a file that this user may not read, or something that is no regular file.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BadRow(f"cannot open {path}: Is a directory, and a file is needed")
        if not stat.S_ISREG(mode):  # to open a pipe would wait for its other end
            raise BadRow(f"{path} is no regular file but a pipe, a socket or a device")
        return open(path, "rb")
    except BadRow:
        raise
    except ValueError:
        raise BadRow(f"no such file: {str(path)!r} (no path has a null character)") from None
    except OSError as error:
        raise BadRow(why_unopened(path, error)) from None


def output_names(inputs: Sequence[str]) -> list[str]:
    """Returns a name, without a suffix, for what is written about each input file.

    It is the path of the file below the folder that all of them have in common. No two names are
    equal, also where upper and lower case are the same: a second "a" becomes "a_2", unless another
    input has that name.
    """
    paths = [os.path.abspath(name) for name in inputs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    plain = [os.path.splitext(os.path.relpath(path, common))[0] for path in paths]
    taken = {name.casefold() for name in plain}
    given: set[str] = set()
    names = []
    for name in plain:
        unique, count = name, 1
        while unique.casefold() in given or (count > 1 and unique.casefold() in taken):
            count += 1
            unique = f"{name}_{count}"
        given.add(unique.casefold())
        names.append(unique)
    return names


def why_unopened(path: str | Path, error: OSError) -> str:
    """Returns a sentence about the error with which a file could not be opened."""
    if error.errno == errno.ENOENT and os.path.islink(path):
        return f"{path} is a link to {os.readlink(path)}, where there is no file"
    if error.errno == errno.ENOENT:
        return f"no such file: {path}"
    if error.errno == errno.ENOTDIR:
        return f"no such file: {path} (a part of this path is a file and no folder)"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be opened: this user has no permission to read it"
    if error.errno == errno.ENAMETOOLONG:
        return f"{str(path)[:80]}… is longer than a path may be"
    if error.errno == errno.ELOOP:
        return f"{path} is a link that leads in a circle"
    return f"{path} cannot be opened: {error.strerror or first_line(error)}"


def check_readable(path: str | Path) -> None:
    """Raises PermissionError if a folder of a path, or the path itself, may not be read.

    Python says of such paths that they are not there.
    """
    whole = Path(os.path.abspath(path))
    for folder in (*reversed(whole.parents), whole):
        if not os.path.isdir(folder):
            return
        needed = os.X_OK if folder != whole else os.R_OK | os.X_OK
        if not os.access(folder, needed):
            raise PermissionError(
                f"{folder} cannot be opened: this user has no permission to read it"
            )
