"""Says which layout of segmentation is read, and whether the task can."""

from __future__ import annotations

from pathlib import Path

from ...wanted import Wanted


def has_mask_folder(path: Path) -> bool:
    """Returns whether a folder holds drawn masks, which are read in place of outlines."""
    return any((path / name).is_dir() for name in ("masks", "mask", "ann_dir"))


def check_reads(wanted: Wanted, path: Path, layout: str, role: str) -> None:
    """Checks that a task reads the masks or the segments of a layout.

    Args:
        layout: the words for it ("as PASCAL VOC").

    Raises:
        ValueError: it does not.
    """
    if role not in wanted.columns:
        raise ValueError(
            f"data.source: {path} is laid out {layout}, which task: segmentation reads, and this "
            f"task reads {', '.join(wanted.columns)}: give it a table, or a folder for each class"
        )
