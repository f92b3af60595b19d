"""PASCAL VOC (Everingham et al. 2010), and data sets that are laid out like it.

| folder or file                      | content                                     |
|-------------------------------------|---------------------------------------------|
| JPEGImages/                         | pictures                                    |
| SegmentationClass/, SegmentationClassAug/, SegmentationClassPNG/ | masks: ids, 255 ignored |
| ImageSets/Segmentation/train.txt    | the names of a split                        |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....core.files import is_system_entry
from ...parts import Parts, Piece
from ...wanted import FILE, Wanted
from ..media_folders import from_rows, is_media
from .asked import check_reads
from .pairs import MASK

_IMAGES = "JPEGImages"
_MASKS = ("SegmentationClass", "SegmentationClassPNG", "SegmentationClassAug")
_LISTS = "ImageSets/Segmentation"


def voc(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a year of VOC; every list is a split. Lists without masks are passed over.

    Raises:
        ValueError: it has boxes alone, several years, or no pictures.
    """
    if not path.is_dir():
        return None
    places = _places(path)
    if not places:
        return None
    if len(places) > 1:
        raise ValueError(
            f"data.source: {path} holds {', '.join(p.name for p in places)}: say data.source: "
            f"{places[-1]}"
        )
    folder = places[0]
    masks = [folder / name for name in _MASKS if (folder / name).is_dir()]
    if not masks:
        raise ValueError(
            f"data.source: {folder} is laid out as PASCAL VOC, but has no SegmentationClass/: from "
            "the boxes in Annotations/ no masks can be made"
        )
    check_reads(wanted, path, "as PASCAL VOC", "mask")
    root = wanted.root(folder)
    images = _stems(root / _IMAGES if (root / _IMAGES).is_dir() else root)
    if not images:
        raise ValueError(
            f"data.source: {folder} has masks as PASCAL VOC has them, but {root / _IMAGES} has no "
            "pictures: say in data.root where JPEGImages/ lies"
        )
    of_masks: dict[str, Path] = {}
    for place in reversed(masks):
        of_masks |= _stems(place)
    lists = sorted(file for file in (folder / _LISTS).glob("*.txt") if file.name[0] != ".")
    splits = {file.stem: _names(file) for file in lists} or {"": sorted(images)}
    rows = {
        split: [_row(name, images, of_masks, root, folder) for name in names]
        for split, names in splits.items()
        if any(Path(name).stem in of_masks for name, _ in map(_cells, names))
    }
    if not rows:
        raise ValueError(
            f"data.source: no name in {folder / _LISTS} is that of a mask in {masks[0]}: name the "
            "masks as the lists do"
        )
    return {
        split: [Piece(lambda some=some: from_rows(some), root)]  # type: ignore[misc]
        for split, some in rows.items()
    }


def _places(path: Path) -> list[Path]:
    """Returns the folders that hold pictures and masks or boxes: the path or one below it."""
    near = [path, path / "VOCdevkit", *(p for p in (path / "VOCdevkit").glob("*")), *path.glob("*")]
    near = [place for place in dict.fromkeys(near) if _is_voc(place)]
    return near[:1] if near[:1] == [path] else sorted(near)


def _is_voc(folder: Path) -> bool:
    if is_system_entry(folder.name) or not folder.is_dir():
        return False
    inside = [*_MASKS, *([] if not (folder / _IMAGES).is_dir() else ["Annotations"])]
    pictures = (folder / _IMAGES).is_dir() or (folder / _LISTS).is_dir()
    return pictures and any((folder / name).is_dir() for name in inside)


def _stems(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    files = (file for file in sorted(folder.iterdir()) if not is_system_entry(file.name))
    return {file.stem: file for file in files if is_media(file.name)}


def _names(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _cells(line: str) -> tuple[str, str]:
    """Returns the picture and the mask of a line; the second is "" where a line has one name."""
    cells: Sequence[str] = line.split()
    return (cells[0], cells[1]) if len(cells) == 2 and "." in cells[1] else (line, "")


def _row(
    line: str, images: dict[str, Path], masks: dict[str, Path], root: Path, folder: Path
) -> dict[str, Any]:
    """Returns the row of a name; a picture or mask that is not there is told as a missing file."""
    name, mask = _cells(line)
    stem = Path(name).stem if mask else name
    missing = (root / _IMAGES / f"{stem}.jpg", folder / _MASKS[0] / f"{stem}.png")
    image = images.get(stem, missing[0]).absolute()
    label = masks.get(Path(mask).stem if mask else stem, missing[1]).absolute()
    return {FILE: str(image), MASK: str(label), "image_id": stem}
