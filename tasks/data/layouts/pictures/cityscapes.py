"""Cityscapes (Cordts et al. 2016): leftImg8bit/SPLIT/CITY/ beside gtFine/SPLIT/CITY/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...parts import Parts, Piece
from ...wanted import FILE, Wanted
from ..media_folders import from_rows
from .asked import check_reads
from .pairs import MASK

_IMAGES, _IMAGE_END = "leftImg8bit", "_leftImg8bit"
_MASKS = ("gtFine", "gtCoarse")
_KINDS = ("labelTrainIds", "labelIds")


def cityscapes(wanted: Wanted, path: Path) -> Parts | None:
    """Reads the fine masks, or the coarse ones where there are no fine ones; every split folder is
    a split.

    Masks of train ids are read if there are any, else those of label ids.

    Raises:
        ValueError: there are no such masks, or no pictures.
    """
    if not path.is_dir():
        return None
    folders = [path / name for name in _MASKS if (path / name).is_dir()]
    root = wanted.root(path)
    pictures = root / _IMAGES if (root / _IMAGES).is_dir() else root
    if not folders or not ((path / _IMAGES).is_dir() or wanted.config.root is not None):
        return None
    check_reads(wanted, path, "as Cityscapes", "mask")
    for folder in folders:
        kind = next((k for k in _KINDS if next(folder.glob(f"*/*/*_{k}.png"), None)), None)
        if kind is not None:
            break
    else:
        raise ValueError(
            f"data.source: {folders[0]} has no masks *_labelIds.png or *_labelTrainIds.png: unpack "
            "gtFine_trainvaltest.zip there, or make them by csCreateTrainIdLabelImgs of "
            "cityscapesscripts"
        )
    rows: dict[str, list[dict[str, Any]]] = {}
    for image in sorted(pictures.glob(f"*/*/*{_IMAGE_END}.*")):
        if image.name.startswith("."):
            continue
        split, city = image.parts[-3:-1]
        name = image.name[: image.name.rindex(_IMAGE_END)]
        mask = folder / split / city / f"{name}_{folder.name}_{kind}.png"
        rows.setdefault(split, []).append(
            {FILE: str(image.absolute()), MASK: str(mask.absolute()), "city": city}
        )
    if not rows:
        raise ValueError(
            f"data.source: {pictures} has no pictures SPLIT/CITY/*{_IMAGE_END}.png: say in "
            "data.root where leftImg8bit/ lies"
        )
    return {
        split: [Piece(lambda some=some: from_rows(some), root)]  # type: ignore[misc]
        for split, some in rows.items()
        if (folder / split).is_dir()
    }
