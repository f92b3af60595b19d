"""Turns masks and polygons that were drawn on the stored pixels of a picture.

Cameras store a picture as the sensor sees it, with an EXIF orientation that says how it is turned
for the eye. `read_image` turns it. A tool that ignores EXIF draws masks on the stored pixels, and
the mask file says nothing of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.errors import BadRow
from .decode import open_picture, orientation_of
from .files import opened

# The sides of the picture are exchanged by these orientations.
SIDEWAYS = (5, 6, 7, 8)


def exif_orientation(value: Any) -> int:
    """Returns the EXIF orientation of a picture, 1 to 8, from its header alone.

    It is 1 (upright) for arrays, for pictures without EXIF data, and if the header cannot be read.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        return 1
    if isinstance(value, Image.Image):
        return orientation_of(value)
    try:
        with opened(value, "image") as file, open_picture(file) as image:
            return orientation_of(image)
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return 1


def turned(values: np.ndarray, orientation: int) -> np.ndarray:
    """Returns stored pixels (H, W, …) turned upright, as `read_image` turns a picture.

    Args:
        orientation: the EXIF orientation of the picture, 1 to 8.
    """
    if orientation in SIDEWAYS:
        values = np.swapaxes(values, 0, 1)
    # After the exchange of the axes, each orientation is a mirror image along none, one or both.
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(values[::rows, ::columns])


def upright_size(value: Any) -> tuple[int, int] | None:
    """Returns the height and width of a picture as `read_image` gives it, from its header alone;
    None if the header cannot be read."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        from .images import read_image

        try:
            image = read_image(value)
        except BadRow:
            return None
        return image.height, image.width
    try:
        if isinstance(value, Image.Image):
            height, width, code = value.height, value.width, orientation_of(value)
        else:
            with opened(value, "image") as file, open_picture(file) as image:
                height, width, code = image.height, image.width, orientation_of(image)
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return None
    return (width, height) if code in SIDEWAYS else (height, width)
