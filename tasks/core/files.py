"""Files that users name, and true sentences about those that cannot be opened."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmadapters.errors import first_line

from .errors import BadRow


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
