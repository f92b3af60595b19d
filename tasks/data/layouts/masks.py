"""Folders of images beside folders of masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from ..splits import KNOWN

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels")


def image_mask_pairs(
    files: Sequence[PurePosixPath],
) -> list[tuple[str, PurePosixPath, PurePosixPath | None]] | None:
    """Returns (split, image, its mask) for each image, or None without folders of images and masks.

    An image and its mask have equal paths but for the suffix.
    """
    images: dict[tuple[str, PurePosixPath], PurePosixPath] = {}
    masks: dict[tuple[str, PurePosixPath], PurePosixPath] = {}
    for file in files:
        # The split comes first or second: train/images/a.jpg, images/train/a.jpg.
        split, rest = cut_split(file.parts)
        if len(rest) < 2 or rest[0].lower() not in (*IMAGES, *MASKS):
            continue
        later, name = cut_split(rest[1:])
        key = (split or later, PurePosixPath(*name).with_suffix(""))
        (images if rest[0].lower() in IMAGES else masks)[key] = file
    if not images or not masks:
        return None
    if not images.keys() & masks.keys():
        raise ValueError(
            f"data.source: no image and mask have the same name ({min(images.values())}, "
            f"{min(masks.values())}): name them alike, or write a metadata.csv"
        )
    return [(key[0], image, masks.get(key)) for key, image in images.items()]


def cut_split(parts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Splits off the first folder if it has the name of a split: ("train", ("images", …))."""
    if parts and parts[0].lower() in KNOWN:
        return parts[0], parts[1:]
    return "", parts
