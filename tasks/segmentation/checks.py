"""Counts the classes in masks, and draws the conclusions about a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..config.schema import Split
from ..core.capabilities import Tally
from ..core.errors import BadRow
from ..core.findings import Finding, Places, named_rows, quoted
from ..core.results import Table
from ..core.rows import Rows
from ..data.media import upright_size
from .config import SegmentationDataConfig
from .labels import Labels
from .orientation import Drawn

IGNORED = 0.01  # share of ignored pixels below which nobody asks what they are


@dataclass
class MaskCounts(Tally):
    """Counts over the masks of a split.

    Attributes:
        pixels: (C + 1,) pixels of each class; the last are ignored.
        images: (C + 1,) masks that have the class.
        masks: number of masks that could be read.
        guessed: the rows whose masks were perhaps drawn before the picture was turned by EXIF.
        turned: number of rows whose masks were turned with the picture.
    """

    pixels: np.ndarray
    images: np.ndarray
    masks: int = 0
    guessed: Places = field(default_factory=Places)
    turned: int = 0

    @classmethod
    def none(cls, labels: Labels) -> MaskCounts:
        """Returns the counts of no mask."""
        number = len(labels.classes) + 1
        return cls(np.zeros(number, np.int64), np.zeros(number, np.int64))

    def add(self, index: int, mask: np.ndarray, drawn: Drawn) -> None:
        """Adds the classes (H, W) of a row's mask."""
        # The ignore index is above all classes.
        highest = len(self.pixels) - 1
        of_mask = np.bincount(np.minimum(mask.ravel(), highest), minlength=highest + 1)
        self.pixels += of_mask
        self.images += of_mask > 0
        self.masks += 1
        if not drawn.decided:
            self.guessed.add(index)
        elif drawn.orientation != 1:
            self.turned += 1

    def merge(self, later: MaskCounts) -> None:
        """Adds the counts of rows that come after these."""
        self.pixels += later.pixels
        self.images += later.images
        self.masks += later.masks
        self.guessed.merge(later.guessed)
        self.turned += later.turned

    def table(self, classes: Sequence[str]) -> Table:
        """Returns the pixels and images of each class."""
        total = max(int(self.pixels.sum()), 1)
        body = [
            [name, int(pixels), round(100 * int(pixels) / total, 2), int(images)]
            for name, pixels, images in zip(
                [*classes, "(ignored)"], self.pixels, self.images, strict=True
            )
        ]
        columns = ["class", "pixels", "% of pixels", "images"]
        return Table("Classes in the masks", columns, body, f"{self.masks} masks that can be used.")


def count_masks(labels: Labels, rows: Rows) -> MaskCounts:
    """Reads the masks of rows; rows that cannot be used are left out."""
    counts = MaskCounts.none(labels)
    for index in range(len(rows)):
        row = rows[index]
        size = upright_size(row.get("image"))
        if size is None:
            continue
        try:
            mask = labels.read(row, size)
            drawn = labels.drawn(row, size, guesses=True)
        except BadRow:
            continue
        counts.add(index, mask, drawn)
    return counts


def mask_findings(
    config: SegmentationDataConfig,
    labels: Labels,
    counts: Mapping[Split, MaskCounts],
    *,
    whole: bool,
) -> list[Finding]:
    """Returns what is suspicious about the masks of the splits, or makes them unusable.

    Args:
        counts: of the splits.
        whole: whether the splits are there with all rows. In a sample, a class counts as absent if
            one of half the share that all have on average would show there.
    """
    results = []
    for split, seen in counts.items():
        if not seen.masks:
            continue
        number = "only mask" if seen.masks == 1 else f"{seen.masks:,} masks"
        where = f"in the {number} {'of' if whole else 'looked at in'} {split}"
        absent = []
        if split == "train" and (whole or seen.masks >= 6 * len(labels.classes)):
            absent = [c for c in range(len(labels.classes)) if not seen.pixels[c]]
        results += _classes(config, labels, seen, where, absent, counts, whole=whole)
        results += _orientation(seen, split)
    return results


def _classes(
    config: SegmentationDataConfig,
    labels: Labels,
    seen: MaskCounts,
    where: str,
    absent: list[int],
    counts: Mapping[Split, MaskCounts],
    *,
    whole: bool,
) -> list[Finding]:
    names = labels.classes
    parts = []
    if absent:
        verb = "occur" if len(absent) > 1 else "occurs"
        text = f"{quoted([names[c] for c in absent])} never {verb}"
        elsewhere = [s for s, other in counts.items() if any(other.images[c] for c in absent)]
        parts.append(text + (f" (but in {' and '.join(elsewhere)})" if elsewhere else ""))
    ignored = _ignored(config, names, seen)
    if ignored:
        parts.append(ignored)
    if not parts:
        return []
    counted = sum(bool(seen.pixels[c]) for c in range(len(names)))
    unusable = whole and bool(absent) and counted < 2
    return [
        Finding(
            f"{where} {', and '.join(parts)}",
            _remedy(config, names, seen, absent, ignored=bool(ignored)),
            "unusable" if unusable else "suspicious",
        )
    ]


def _ignored(config: SegmentationDataConfig, names: tuple[str, ...], seen: MaskCounts) -> str:
    """Returns the words for ignored pixels that may be the object, or "".

    Borders and unlabelled parts are ignored rightly, but they are less than all objects together.
    """
    objects = [c for c, name in enumerate(names) if name != config.background]
    ignored, total = int(seen.pixels[-1]), int(seen.pixels.sum())
    there = int(seen.pixels[objects].sum())
    if ignored <= max(there, IGNORED * total):
        return ""
    which = "0" if config.reduce_zero_label else str(config.ignore_index)
    ids = "" if config.label_map or config.palette else f" (id {which})"
    than = " but the background" if config.background in names else ""
    return (
        f"{100 * ignored / total:.1f} % of the pixels are ignored{ids}, more than all classes"
        f"{than} have together ({100 * there / total:.1f} %)"
    )


def _remedy(
    config: SegmentationDataConfig,
    names: tuple[str, ...],
    seen: MaskCounts,
    absent: list[int],
    *,
    ignored: bool,
) -> str:
    if config.palette:
        return "check the colours of data.palette"
    if config.label_map:
        return "check which ids data.label_map gives to which class"
    if ignored and config.reduce_zero_label:
        return "if id 0 is a class, set data.reduce_zero_label: false"
    if ignored:
        objects = absent or [c for c, name in enumerate(names) if name != config.background]
        known = [f"{c}: {names[c]}" for c in range(len(names)) if seen.pixels[c]][:3]
        table = ", ".join([*known, f"{config.ignore_index}: {names[objects[0]]}"])
        return f"if {config.ignore_index} is a class, say which one: data.label_map: {{{table}}}"
    present = ", ".join(str(c) for c in range(len(names)) if seen.pixels[c])
    return (
        f"the ids in the masks are {present}: correct data.classes, or say what the ids mean in "
        "data.label_map"
    )


def _orientation(seen: MaskCounts, split: Split) -> list[Finding]:
    if not seen.guessed:
        return []
    turned = ""
    if seen.turned:
        turned = f"; those of {seen.turned:,} others were drawn before it, as sizes show"
    return [
        Finding(
            f"{len(seen.guessed):,} pictures of {split} are turned by their EXIF data, and sizes "
            f"do not say whether their masks were drawn before or after it "
            f"({named_rows(seen.guessed)}){turned}",
            "look at one, and set data.drawn_on: stored if its mask does not lie on it, or upright "
            "if it does",
        )
    ]
