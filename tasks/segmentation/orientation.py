"""Decides whether masks and polygons were drawn on the stored pixels of a picture or upright.

A picture with an EXIF orientation is read upright. Tools that ignore EXIF draw on the pixels as
they are stored, and such masks have to be turned with the picture. Where the picture lies on its
side, sizes tell the two apart. Where it is square, mirrored or upside down, nothing does, and
`data.drawn_on` says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data.media import SIDEWAYS, exif_orientation, turned
from .coco import segments_extent

DrawnOn = Literal["auto", "stored", "upright"]
Size = tuple[int, int]


@dataclass(frozen=True)
class Drawn:
    """How the mask or the segments of a row were drawn.

    Attributes:
        orientation: the EXIF orientation of the picture, 1 to 8; 1 if its mask was drawn upright.
        size: (H, W) of the pixels that they were drawn on.
        decided: whether sizes or the config say so; false if it is a guess.
    """

    orientation: int
    size: Size
    decided: bool = True

    def upright(self, values: np.ndarray) -> np.ndarray:
        """Returns the drawn values, (H, W, …), turned as the picture is."""
        return values if self.orientation == 1 else turned(values, self.orientation)


def drawn_mask(
    row: Mapping[str, Any], shape: Size, size: Size, drawn_on: DrawnOn, *, guesses: bool = False
) -> Drawn:
    """Returns how a row's mask was drawn.

    Args:
        shape: (H, W) of the mask.
        size: (H, W) of the upright picture.
        guesses: also say whether it is a guess, which takes a look at the picture's header.
    """
    upright = Drawn(1, size)
    if drawn_on == "upright" or (drawn_on == "auto" and shape == size and not guesses):
        return upright
    code = exif_orientation(row.get("image"))
    # A mask with an orientation of its own was turned when it was read.
    if code == 1 or exif_orientation(row["mask"]) != 1:
        return upright
    return _drawn(code, shape, size, drawn_on)


def drawn_segments(
    row: Mapping[str, Any], size: Size, drawn_on: DrawnOn, *, guesses: bool = False
) -> Drawn:
    """Returns how a row's COCO segments were drawn.

    The size that they were drawn on is that of a run-length encoding, or of the row's `height` and
    `width` as COCO has them, or else the one of the two into which all polygons fit.

    Args:
        size: (H, W) of the upright picture.
        guesses: also say whether it is a guess, which takes a look at the picture's header.

    Raises:
        BadRow: the segments cannot be read.
    """
    if drawn_on == "upright":
        return Drawn(1, size)
    stated, least = segments_extent(row["segments"])
    stated = stated or _stated(row)
    fits = stated == size if stated else least[0] <= size[0] + 1 and least[1] <= size[1] + 1
    if drawn_on == "auto" and fits and not guesses:
        return Drawn(1, size)
    code = exif_orientation(row.get("image"))
    if code == 1:
        return Drawn(1, size)
    if stated is None and not fits and least[0] <= size[1] + 1 and least[1] <= size[0] + 1:
        stated = size[::-1]
    return _drawn(code, stated, size, drawn_on)


def _drawn(code: int, shape: Size | None, size: Size, drawn_on: DrawnOn) -> Drawn:
    stored = size[::-1] if code in SIDEWAYS else size
    if drawn_on == "stored":
        return Drawn(code, stored)
    if shape is None or stored == size:
        return Drawn(1, size, decided=False)
    return Drawn(code, stored) if shape == stored else Drawn(1, size)


def _stated(row: Mapping[str, Any]) -> Size | None:
    height, width = row.get("height"), row.get("width")
    if isinstance(height, int | float) and isinstance(width, int | float) and height and width:
        return int(height), int(width)
    return None
