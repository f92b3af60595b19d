"""Carvana: train/ beside train_masks/, and tables about other things."""

from __future__ import annotations

from pathlib import Path

from ...parts import Parts
from ...tables.read import TABLES
from ...wanted import Wanted
from ..media_folders import every_file
from .asked import check_reads
from .pairs import mask_parts

_TABLES = ("metadata.csv", "train_masks.csv", "sample_submission.csv")  # cars, and RLEs of masks


def carvana(wanted: Wanted, path: Path) -> Parts | None:
    """Reads the masks in train_masks/; the tables beside it are not read."""
    folder = path.parent if path.name == "metadata.csv" else path
    if not (folder / "train").is_dir() or not (folder / "train_masks").is_dir():
        return None
    tables = [p.name for p in folder.iterdir() if p.suffix.lower() in TABLES and p.name[0] != "."]
    if not set(tables) <= {*_TABLES} or (path != folder and not _is_about_cars(path)):
        return None
    check_reads(wanted, folder, "as Carvana", "mask")
    return mask_parts(wanted, folder, every_file(folder))


def _is_about_cars(file: Path) -> bool:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        return next(lines, "").startswith("id,year,make")
