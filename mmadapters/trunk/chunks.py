"""Containers for the chunks of a `TrunkStore`: in memory, or as files that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from ..files import replacing_file


class Chunks(Protocol):
    """A container that keeps chunks by number."""

    def read(self, number: int) -> np.ndarray | None:
        """Returns the chunk, (bytes,) uint8, or None if it is not there."""

    def size(self, number: int) -> int | None:
        """Returns the bytes of the chunk as it is now, or None if it is not there."""

    def write(self, number: int, parts: Iterable[Any]) -> None:
        """Keeps the bytes of `parts`, one after another, completely or not at all."""

    def drop(self, number: int) -> None:
        """Deletes the chunk, if it is there."""

    def claim(self, number: int) -> bool:
        """Says whether this process may fill the chunk. If so, no other may until `release`."""

    def release(self, number: int) -> None:
        """Lets other processes fill the chunk again."""


class MemoryChunks:
    """Chunks in the memory of this process."""

    def __init__(self) -> None:
        self._data: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray | None:
        return self._data.get(number)

    def size(self, number: int) -> int | None:
        data = self._data.get(number)
        return None if data is None else len(data)

    def write(self, number: int, parts: Iterable[Any]) -> None:
        self._data[number] = np.frombuffer(bytearray().join(parts), dtype=np.uint8)

    def drop(self, number: int) -> None:
        self._data.pop(number, None)

    def claim(self, number: int) -> bool:
        return True

    def release(self, number: int) -> None:
        return


class DiskChunks:
    """Chunks as memory-mapped files of a folder.

    A lock ends with the process that holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locks: dict[int, FileLock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_locks": {}}

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.states"

    def read(self, number: int) -> np.ndarray | None:
        path = self._path(number)
        try:
            if path.stat().st_size == 0:
                return np.empty(0, dtype=np.uint8)
            # Copied on write, as torch asks for memory that it can write to.
            return np.memmap(path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            return None

    def size(self, number: int) -> int | None:
        try:
            return os.stat(self._path(number)).st_size
        except FileNotFoundError:
            return None

    def write(self, number: int, parts: Iterable[Any]) -> None:
        with (
            replacing_file(self._path(number), process=os.getpid()) as temporary,
            open(temporary, "wb") as file,
        ):
            file.writelines(parts)

    def drop(self, number: int) -> None:
        self._path(number).unlink(missing_ok=True)

    def claim(self, number: int) -> bool:
        lock = FileLock(self._path(number).with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._locks[number] = lock
        # Left by a process that was killed: no other writes while the lock is held.
        for left in self.folder.glob(f".{self._path(number).name}.*.tmp"):
            left.unlink(missing_ok=True)
        return True

    def release(self, number: int) -> None:
        lock = self._locks.pop(number, None)
        if lock is not None:
            lock.release()
