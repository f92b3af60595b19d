"""The size that a cache of states may have, and the folder in which it lies by default."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

GIB = 2**30
_SPARE = 0.05  # share of a disk that a cache leaves free


def check_room(
    needed: int, *, records: int, views: int, budget: float, folder: Path | None
) -> None:
    """Refuses a cache that is larger than its budget or than the free space.

    Args:
        needed: the size of the cache in bytes.
        records: how many records it would hold.
        views: how many views of each record it would hold.
        budget: the largest size in GiB.
        folder: the folder in which it would lie; None for memory.

    Raises:
        ValueError: the cache is larger; says what would make it smaller.
    """
    place = "memory" if folder is None else f"the disk of {folder}"
    what = f"it would take {needed / GIB:.2f} GiB for {records:,} records"
    what += f" in {views} views" if views > 1 else ""
    help_ = "keep fewer views, keep states as bf16, let adapters begin at a higher block"
    if needed > budget * GIB:
        raise ValueError(f"{what}, more than the budget of {budget:g} GiB: {help_}, or allow more")
    free = free_memory() if folder is None else free_disk(folder)
    if needed > free:
        raise ValueError(f"{what}, and {place} has {free / GIB:.2f} GiB to spare: {help_}")


def free_disk(folder: Path) -> int:
    """Returns how many bytes a cache may take in `folder`."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return max(usage.free - int(_SPARE * usage.total), 0)


def free_memory() -> int:
    """Returns how many bytes a cache may take in memory.

    That is three quarters of what is left to this machine or to this process's control group,
    whichever is less.
    """
    free = []
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        inactive = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        if limit != "max":
            free.append(int(limit) - used + int(inactive.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(int(0.75 * min(free)), 0) if free else sys.maxsize


def cache_folder() -> Path:
    """Returns the default folder of caches: `MMADAPTERS_CACHE` or the user's folder for caches."""
    if given := os.environ.get("MMADAPTERS_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mmadapters"
