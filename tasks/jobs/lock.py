"""A lock on a run directory, so that two runs never write to one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from mmadapters.files import write_text


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a run directory inside the block.

    The lock is the file `.NAME.lock` beside the directory. The operating system frees it when its
    process ends, so a process that was killed blocks nobody. `.NAME.holder` says who holds it.

    Raises:
        ValueError: another process, or another run of this one, holds the lock.
    """
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    holder = folder.with_name(f".{folder.name}.holder")
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"{folder} is being written by {_holder(holder)}: wait until it has ended, or choose "
            "another output=…"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        facts = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        write_text(holder, json.dumps(facts))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(file: Path) -> str:
    """Returns a description of the process that holds a lock."""
    try:
        facts = json.loads(file.read_text("utf-8"))
        return f"process {facts['process']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it was written just now, or is gone
        return "another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
