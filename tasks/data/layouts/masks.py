"""The words by which folders of images, of masks and of splits are told apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..splits import ALIASES, KNOWN

# Folders of pictures that tables and documents name, too.
IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "annotations", "labels")

_IMAGE_WORDS = frozenset(
    (
        *IMAGES,
        *("picture", "pictures", "photo", "photos", "rgb", "original", "originals"),
        *("input", "inputs"),
    )
)
_MASK_WORDS = frozenset(
    (
        *MASKS,
        *("annotation", "ann", "anns", "annot", "annots", "label", "lbl", "gt", "truth"),
        *("groundtruth", "seg", "segs", "segmentation", "segmentations", "semantic"),
        *("target", "targets", "trimap", "trimaps", "matte", "mattes"),
    )
)
_SPLIT_WORDS = {**{name: name for name in KNOWN}, "tr": "train", "ts": "test"}
# imagesTr, JPEGImages, train_masks, img_dir
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ANNOT = re.compile(r"([a-z]+)annots?")

Role = Literal["images", "masks"]


@dataclass(frozen=True)
class FolderWords:
    """The words that the path of a folder says about its pictures.

    Attributes:
        role: images or masks, as the innermost name says it; None if no name does.
        split: the source's name of the split; "" for none.
        rest: the names that say neither.
    """

    role: Role | None
    split: str
    rest: tuple[str, ...]

    @property
    def part(self) -> str:
        """Our name of the split, so that training/ and train_masks/ are the same one."""
        lower = self.split.lower()
        return next((split for split, names in ALIASES.items() if lower in names), lower)


def folder_words(names: Sequence[str]) -> FolderWords:
    """Reads the names of the folders of a path, the outermost first."""
    role: Role | None = None
    split = ""
    rest = []
    for name in names:
        if name.lower() in KNOWN:
            split = split or name
            continue
        words = [word.lower() for word in _WORD.findall(name)]
        if glued := _ANNOT.fullmatch(name.lower()):  # trainannot
            words = [glued[1], "annot"]
        if _MASK_WORDS.isdisjoint(words) and _IMAGE_WORDS.isdisjoint(words):
            rest.append(name)
            continue
        role = "images" if _MASK_WORDS.isdisjoint(words) else "masks"
        split = split or next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
    return FolderWords(role, split, tuple(rest))


def cut_split(parts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Splits off the first folder if it has the name of a split: ("train", ("images", …))."""
    if parts and parts[0].lower() in KNOWN:
        return parts[0], parts[1:]
    return "", parts
