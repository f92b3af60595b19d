"""Tells folders of masks from folders of pictures by their files, where their names do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path, PurePosixPath

from ...splits import KNOWN
from ..masks import FolderWords

_SHARED = 0.5  # least share of the smaller folder's files that have a partner in the other
_LOSSY = (".jpg", ".jpeg", ".jfif", ".jpe")


def sibling_masks(
    folder: Path, pictures: Iterable[tuple[PurePosixPath, FolderWords]]
) -> dict[PurePosixPath, FolderWords]:
    """Returns the words of all files of two sibling folders that hold files of the same names; {}
    if there are no such folders.

    The masks are the files with one channel.

    Raises:
        ValueError: more than two folders hold files of the same names, or nothing tells the masks.
    """
    by_name: dict[str, dict[tuple[str, ...], tuple[PurePosixPath, FolderWords]]] = {}
    images: set[str] = set()
    for path, words in pictures:
        name = next((part for part in path.parts[:-1] if part.lower() not in KNOWN), None)
        if name is None:
            continue
        rest = words.rest[1:] if name in words.rest[:1] else words.rest
        key = (words.part, *rest, path.name[: -len(path.suffix)])
        by_name.setdefault(name, {})[key] = path, replace(words, rest=rest)
        if words.role == "images":
            images.add(name)
    pairs = [
        (one, other)
        for one, other in combinations(by_name, 2)
        if _share(by_name[one], by_name[other]) >= _SHARED
    ]
    if not pairs:
        return {}
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    masks = [name for name in names if name not in images]
    if len(masks) > 1:
        masks = [n for n in masks if holds_labels(folder / next(iter(by_name[n].values()))[0])]
    if len(names) > 2 or len(masks) != 1:
        raise ValueError(
            f"data.source: the folders {', '.join(names)} of {folder} hold files of the same "
            "names, and nothing tells the pictures from the masks: rename two of them to images "
            "and masks, and move other ones elsewhere"
        )
    return {
        path: replace(words, role="masks" if name == masks[0] else "images")
        for name in names
        for path, words in by_name[name].values()
    }


def holds_labels(file: Path) -> bool:
    """Returns whether a file has one channel, in a format that does not change values."""
    from PIL import Image

    if file.suffix.lower() in _LOSSY:
        return False
    try:
        with Image.open(file) as image:
            return image.mode in ("1", "L", "P") or image.mode.startswith("I")
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return False


def _share(one: Mapping[tuple[str, ...], object], other: Mapping[tuple[str, ...], object]) -> float:
    return len(one.keys() & other.keys()) / min(len(one), len(other))
