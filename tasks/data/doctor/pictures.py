"""Looks at pictures for what no decoder complains about: blank ones, and bits that are not used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.findings import Finding, Places, named_rows
from ..media import bits_in_use, highest_value, picture_to_show
from ..media.decode import open_picture, stored
from ..media.files import opened
from ..media.images import DEEP
from .results import RowPlace

if TYPE_CHECKING:
    from PIL import Image

SPREAD = 2  # of 255: values of a blank picture that was saved as JPEG differ by as much
SIDE = 64  # pixels to which JPEG files may be reduced while they are decoded
DARK = 14  # pictures that use so many bits of 16 have a quarter of the brightness


@dataclass(frozen=True)
class PictureFacts:
    """Facts about a picture.

    Attributes:
        blank: whether all pixels have one colour.
        highest: the greatest value of a picture with 16 bits a channel; None for all others.
    """

    blank: bool
    highest: int | None


def picture_facts(value: Any) -> PictureFacts:
    """Decodes a picture and returns what is seen in it.

    Raises:
        BadRow: it cannot be read.
    """
    reduced = _reduced_jpeg(value)
    if reduced is not None:
        return PictureFacts(_is_blank(reduced), None)
    if isinstance(value, np.ndarray):
        return PictureFacts(_is_blank(picture_to_show(value)), highest_value(value))
    with stored(value, "image", deep=True) as picture:
        if picture.deep is None:
            value = picture.image  # decoded, so that it is not decoded anew below
        return PictureFacts(_is_blank(picture_to_show(value)), highest_value(value))


def _reduced_jpeg(value: Any) -> Image.Image | None:
    """Decodes a JPEG file at an eighth of its size or so, which takes a fraction of the time."""
    from PIL import Image

    if isinstance(value, np.ndarray | Image.Image):
        return None
    try:
        with opened(value, "image") as file, open_picture(file) as image:
            if image.format != "JPEG":
                return None
            image.draft("RGB", (SIDE, SIDE))
            return image.convert("RGB")
    except Exception:  # the full decoder says what is wrong
        return None


def _is_blank(image: Image.Image) -> bool:
    return all(high - low <= SPREAD for low, high in image.convert("RGB").getextrema())  # type: ignore[misc]


@dataclass
class PictureTally:
    """Adds up the facts of pictures.

    Attributes:
        blank: the rows of blank pictures.
        deep: number of pictures with 16 bits a channel.
        highest: the greatest value in one of those.
    """

    blank: Places = field(default_factory=Places)
    deep: int = 0
    highest: int = 0

    def add(self, index: int, fact: PictureFacts, place: Callable[[int], RowPlace]) -> None:
        """Adds the picture of a row."""
        if fact.blank:
            self.blank.add(index, place)
        if fact.highest is not None:
            self.deep += 1
            self.highest = max(self.highest, fact.highest)


def picture_findings(
    tally: PictureTally, *, where: str, bits: int | None, train: bool
) -> list[Finding]:
    """Returns what is suspicious about pictures.

    Args:
        tally: of the pictures.
        where: the words for the rows that were looked at ("of the 40 pictures of train").
        bits: `data.bits` of the config.
        train: whether they are those by which the bits in use are decided.
    """
    results = []
    blank = tally.blank
    if blank:
        results.append(
            Finding(
                f"{len(blank):,} {where} {'is' if len(blank) == 1 else 'are'} of one colour "
                f"({named_rows(blank)})",
                "look at them, and leave out those that show nothing",
            )
        )
    if tally.deep and bits is None and train:
        low = _low_range(tally.deep, tally.highest, where)
        results += [low] if low else []
    return results


def _low_range(pictures: int, highest: int, where: str) -> Finding | None:
    used = bits_in_use(highest)
    said = f"{pictures:,} {where} have 16 bits a channel, and no value above {highest:,}"
    if used < DEEP:
        return Finding(
            f"{said}: they are scaled from {2**used - 1:,}, the range of {used} bits",
            f"write data.bits: {used} if that is right, or data.bits: 16 if they are meant to be "
            "dark",
        )
    if highest < 2**DARK:
        return Finding(
            f"{said}: scaled from 65,535 they are dark",
            f"say the number of bits in use, such as data.bits: {highest.bit_length()}, or "
            "data.bits: 16 if they are meant to be dark",
        )
    return None
