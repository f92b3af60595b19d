"""A program that fills a store of `test_store` in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path


def fill(folder: Path, kill_at: int, pause: float, told: Connection) -> None:
    """Opens the store, says so, waits to be told to begin, and sends the chunks that it made.

    Args:
        kill_at: After so many chunks the process kills itself, in the middle of the next one.
        pause: Seconds between claiming a chunk and writing it.
    """
    from trunk.test_store import entry, store

    kept, made = store(folder, per_chunk=2), []
    told.send("ready")
    told.recv()
    while missing := kept.missing():
        for chunk in missing:
            if not kept.claim(chunk):
                continue
            if len(made) == kill_at:
                (kept.chunks.folder / f".{chunk:05d}.states.{os.getpid()}.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(pause)
            kept.put(chunk, [entry(place) for place in kept.places(chunk).tolist()])
            kept.release(chunk)
            made.append(chunk)
        time.sleep(0.02)
    told.send(made)
