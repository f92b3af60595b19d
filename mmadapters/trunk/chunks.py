"""Where the chunks of a `TrunkStore` are kept: in memory, or as files that processes share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from ..files import replacing_file


class Chunks(Protocol):
    """Where chunks are kept, by number."""

    def read(self, number: int) -> np.ndarray | None:
        """Its (bytes,) uint8, None where it is not there."""

    def write(self, number: int, parts: Iterable[Any]) -> None:
        """Keeps the bytes, whole or not at all."""

    def drop(self, number: int) -> None: ...

    def claim(self, number: int) -> bool:
        """Whether this process may fill it; others may not until `release`."""

    def release(self, number: int) -> None: ...


class MemoryChunks:
    """Chunks of this process."""

    def __init__(self) -> None:
        self._data: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray | None:
        return self._data.get(number)

    def write(self, number: int, parts: Iterable[Any]) -> None:
        self._data[number] = np.frombuffer(bytearray().join(parts), dtype=np.uint8)

    def drop(self, number: int) -> None:
        self._data.pop(number, None)

    def claim(self, number: int) -> bool:
        return True

    def release(self, number: int) -> None:
        return


class DiskChunks:
    """Chunks as memory-mapped files of a folder; locks end with the process that holds them."""

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
            # Copied on write: torch wants memory that it could write to.
            return np.memmap(path, dtype=np.uint8, mode="c")
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
        # Of a process that was killed: nobody else writes while the lock is held.
        for left in self.folder.glob(f".{self._path(number).name}.*.tmp"):
            left.unlink(missing_ok=True)
        return True

    def release(self, number: int) -> None:
        lock = self._locks.pop(number, None)
        if lock is not None:
            lock.release()
