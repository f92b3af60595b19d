"""Decides how many of their 16 bits the pictures of a data set use.

Cameras of microscopes and X-ray detectors give 10 or 12 bits, and PNG and TIFF store them in 16.
Scaled from 65,535 such pictures are black. The range is decided once for a data set, from its
training pictures, and is saved with the adapter. A range for each picture would make all of them
equally bright, and a picture that is dark for a reason would look like the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config.schema import DataConfig
from ...core.errors import BadRow
from ...core.rows import Rows
from .images import DEEP, highest_value, read_image

if TYPE_CHECKING:
    from PIL import Image

# Numbers of bits that are recognised; pictures that use more are scaled from the whole range.
RANGES = (8, 10, 12)
LOOKED_AT = 32  # pictures by which the range is decided
FIRST = 4  # if none of so many has 16 bits, no others are looked at


def bits_in_use(highest: int) -> int:
    """Returns the bits of pictures with 16 bits a channel whose greatest value is this."""
    return next((bits for bits in RANGES if highest < 2**bits), DEEP)


def picture_bits(config: DataConfig, rows: Rows | None) -> dict[str, int]:
    """Returns {"bits": …}, the bits in use in pictures of 16 bits, as a part of a preprocessing.

    They are those of `data.bits`, or else those that a sample of the training pictures uses. It is
    empty if all 16 are in use, or if no picture has 16 bits.

    Args:
        rows: the training rows; None if nothing is trained.
    """
    if config.bits is not None:
        return {} if config.bits == DEEP else {"bits": config.bits}
    if rows is None or not hasattr(rows, "__len__") or "image" not in rows.column_names:
        return {}
    values = (rows[index]["image"] for index in spread(len(rows), LOOKED_AT))
    highest = _highest(values)
    bits = DEEP if highest is None else bits_in_use(highest)
    return {} if bits == DEEP else {"bits": bits}


def picture_to_show(value: Any) -> Image.Image:
    """Reads a picture for the eye: as `read_image`, with 16 bits scaled from the range that this
    picture itself uses.

    Raises:
        BadRow: the picture cannot be read.
    """
    highest = highest_value(value)
    return read_image(value, bits=None if highest is None else bits_in_use(highest))


def _highest(values: Iterable[Any]) -> int | None:
    highest: int | None = None
    for number, value in enumerate(values):
        if number >= FIRST and highest is None:
            return None
        try:
            value = highest_value(value)
        except BadRow:
            continue
        if value is not None:
            highest = max(value, highest or 0)
            if bits_in_use(highest) == DEEP:
                break
    return highest


def spread(rows: int, count: int) -> list[int]:
    """Returns numbers of at most `count` rows, in an order in which every first part is spread over
    all rows."""
    places = np.unique(np.linspace(0, max(rows - 1, 0), min(count, rows)).astype(int))
    return np.random.default_rng(0).permutation(places).tolist()
