"""Opens the encoded files of pictures, masks and recordings."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmadapters.errors import first_line

from ...core.errors import BadRow
from ...core.files import open_file

# The endings of the files that are taken for pictures and recordings, in lower case.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".jfif", ".jpe", ".apng", ".dib", ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm"),
)
AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".snd"),
    *(".caf", ".w64", ".rf64", ".sph", ".nist", ".voc", ".ircam", ".avr", ".paf", ".pvf"),
    *(".wave", ".bwf", ".mp2", ".htk", ".iff", ".svx", ".8svx", ".sds", ".sf", ".wve"),
)
_IN_TAR = re.compile(r"tar://(.+)/(\d+)\+(\d+)/[^/]+", re.DOTALL)
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *AUDIO_SUFFIXES))


def media_name(value: Any) -> str | None:
    """Returns the file name of a row's picture or recording, with the start of its part in seconds
    if it is one, or None if it has no name."""
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str | Path) or not str(path):
        return None
    offset = value.get("offset") if isinstance(value, dict) else None
    return Path(path).name if offset is None else f"{Path(path).name} from {offset:g} s"


def tar_reference(tar: Path, name: str, start: int, size: int) -> str:
    """Returns the path of a picture or a recording that lies in a tar that is not compressed.

    Args:
        tar: an absolute path.
        name: of the member.
        start: of its bytes in the tar.
        size: of the member in bytes.
    """
    return f"tar://{tar.as_posix()}/{start}+{size}/{name.rpartition('/')[2]}"


def media_file(path: str) -> str:
    """Returns the file on this machine that holds the media at a path: the path, or its tar."""
    member = _IN_TAR.fullmatch(path)
    return path if member is None else member[1]


def media_digest(value: Any) -> str | None:
    """Returns a hash of the encoded picture or recording, equal for equal files; None if it cannot
    be read."""
    if isinstance(value, dict) and value.get("array") is not None:
        try:
            value = np.asarray(value["array"])
        except ValueError:  # lists of different lengths
            return None
    if isinstance(value, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
    try:
        with opened(value, "file") as file:
            if isinstance(file, ByteStream):
                return hashlib.blake2b(file.getbuffer(), digest_size=16).hexdigest()
            status = os.fstat(file.fileno())
            return _file_digest(file.name, status.st_size, status.st_mtime_ns)
    except (BadRow, OSError):
        return None


@functools.lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, modified: int) -> str:
    """Hashes a file once for all rows that name it, as parts of a long recording do."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class ByteStream(io.BytesIO):
    """A byte stream in which a seek before the start goes to the start.

    libsndfile seeks there in broken MP3 files, and an error in its callback would be printed with
    its stack.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.getbuffer().nbytes}
        return super().seek(max(start[whence] + offset, 0))


@contextmanager
def opened(value: Any, noun: str) -> Iterator[BinaryIO]:
    """Opens the encoded file as a stream."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise BadRow(f"the {noun} has no bytes")
        yield ByteStream(value)
        return
    if value is None or (isinstance(value, str) and not value):
        raise BadRow(f"there is no {noun}")
    if not isinstance(value, str | Path):
        raise BadRow(f"a value of type {type(value).__name__} is no {noun}")
    if (member := _IN_TAR.fullmatch(str(value))) is not None:
        yield _from_tar(member[1], int(member[2]), int(member[3]))
        return
    if "://" in str(value):
        yield _fetched(str(value))
        return
    with open_file(value) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise BadRow(f"the {noun} file is empty (0 bytes)")
        yield file


def _from_tar(tar: str, start: int, size: int) -> ByteStream:
    with open_file(tar) as file:
        file.seek(start)
        data = file.read(size)
    if len(data) < size:
        raise BadRow(f"{tar} is shorter than it was: it ends within a file that is read from it")
    if not data:
        raise BadRow(f"a file in {tar} is empty (0 bytes)")
    return ByteStream(data)


def _fetched(url: str) -> ByteStream:
    """Returns the bytes at a URL, such as the hf:// and zip:// paths of streamed data sets."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            data = file.read()
    except Exception as error:  # each file system has its own
        raise BadRow(f"cannot fetch {url}: {first_line(error)}") from None
    if not data:
        raise BadRow(f"there are no bytes at {url}")
    return ByteStream(data)
