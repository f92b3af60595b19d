"""Reads the members of tars.

Of a plain tar only the headers and the small texts are read; media become references to their bytes
in it. A compressed tar can only be read from its start, so its media are read with it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from mmadapters.errors import first_line

from ...media import tar_reference
from .members import Member

PLAIN = (".tar",)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_tar(file: Path) -> bool:
    """Returns whether a file is a tar by its name."""
    return file.name.lower().endswith((*PLAIN, *COMPRESSED))


def is_compressed(file: Path) -> bool:
    """Returns whether a tar is compressed by its name."""
    return file.name.lower().endswith(COMPRESSED)


def tar_members(file: Path) -> Iterator[Member]:
    """Yields the files of a tar in its order.

    Raises:
        ValueError: the tar is cut off or broken.
    """
    try:
        if is_compressed(file):
            with tarfile.open(file, "r|*") as tar:
                yield from _read(tar)
        else:
            with open(file, "rb") as data, tarfile.open(fileobj=data, mode="r:") as tar:
                yield from _referenced(file, tar, data)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"it is no complete tar: {first_line(error)}; copy or write it again"
        ) from None


def _referenced(file: Path, tar: tarfile.TarFile, data: BinaryIO) -> Iterator[Member]:
    place = file.resolve()
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would grow with every member
        if not info.isreg() or info.issparse():
            continue
        start, size = info.offset_data, info.size

        def read(start: int = start, size: int = size) -> bytes:
            before = data.tell()
            data.seek(start)
            read = data.read(size)
            data.seek(before)
            if len(read) < size:
                raise tarfile.ReadError("unexpected end of data")
            return read

        def refer(name: str = info.name, start: int = start, size: int = size) -> str:
            return tar_reference(place, name, start, size)

        yield Member(info.name, refer, read)
    data.seek(tar.offset)  # a tar ends with a block of zeros, or it was cut off between members
    if len(data.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has no end mark")


def _read(tar: tarfile.TarFile) -> Iterator[Member]:
    while (info := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]
        stream: IO[bytes] | None = tar.extractfile(info) if info.isreg() else None
        if stream is None:
            continue
        name = info.name.rpartition("/")[2]

        def media(stream: IO[bytes] = stream, name: str = name) -> dict[str, object]:
            return {"bytes": stream.read(), "path": name}

        yield Member(info.name, media, stream.read)
