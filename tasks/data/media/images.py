"""Reads pictures and masks from the values of a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmadapters.errors import first_line

from ...core.errors import BadRow
from .files import opened

if TYPE_CHECKING:
    from PIL import Image


def read_image(value: Any) -> Image.Image:
    """Reads a picture in RGB, upright (EXIF orientation applied), with transparency on white.

    16-bit and floating-point pictures are scaled from the range of their type ([0, 1] or [0, 255]
    for floats). Of several frames the first is read.

    Args:
        value: a path, a PIL image, `{"bytes", "path"}`, or an array: (H, W), (H, W, 1 | 3 | 4) or
            (3, H, W) of uint8, uint16, bool or floats.

    Raises:
        BadRow: the picture cannot be read.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        return _rgb(Image.fromarray(_picture_array(value)))
    with _decoded(value, "image") as image:
        return _rgb(image)


def read_mask(value: Any) -> np.ndarray:
    """Reads the labels of a mask as they are in the file, without palette or scaling.

    Returns:
        (H, W) int64 of class ids (indexed, grey, 1-bit and 16-bit masks), or (H, W, 3) uint8 of
        colours for RGB masks.

    Raises:
        BadRow: the mask cannot be read, or its values are not whole numbers.
    """
    if isinstance(value, np.ndarray):
        return _mask_array(value)
    with _decoded(value, "mask") as image:
        if image.mode == "LA":
            image = image.getchannel("L")
        elif image.mode == "PA":
            image = image.getchannel("P")
        elif image.mode not in ("P", "L", "1", "F") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        return _mask_array(np.asarray(image))


def image_size(value: Any) -> tuple[int, int] | None:
    """Returns the height and width of a picture in its file, from its header alone; None if the
    header cannot be read."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        return None
    try:
        if isinstance(value, Image.Image):
            return value.height, value.width
        with opened(value, "image") as file, Image.open(file) as image:
            return image.height, image.width
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return None


@contextmanager
def _decoded(value: Any, noun: str) -> Iterator[Image.Image]:
    """Gives the first frame, upright, in the mode of its file and fully decoded."""
    from PIL import Image

    if isinstance(value, Image.Image):
        yield _upright(value, noun)
        return
    with opened(value, noun) as file:
        yield _upright(file, noun)


def _upright(source: BinaryIO | Image.Image, noun: str) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
    except UnidentifiedImageError:
        raise BadRow(f"the {noun} file is in no format that can be read") from None
    except MemoryError:
        raise BadRow(f"the {noun} is too large for the memory") from None
    except Exception as error:  # PIL's plugins raise what their parsing happens to raise
        raise BadRow(f"the {noun} cannot be decoded: {first_line(error)}") from None
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF data that cannot be parsed hold no orientation
        return image


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_picture_array(np.asarray(image)))
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _picture_array(values: np.ndarray) -> np.ndarray:
    """Returns (H, W) or (H, W, 3 | 4) uint8, which PIL takes."""
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or values.size == 0 or values.shape[2:] not in ((), (3,), (4,)):
        raise BadRow(f"an array of shape {values.shape} is no image")
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise BadRow(f"an array of {values.dtype} is no image")
    if not np.isfinite(values).all():
        raise BadRow("the image holds values that are not finite numbers")
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype.kind == "f":
        full = 1.0 if high <= 1 else 255.0
    else:
        # PIL holds 16-bit files in 32-bit integers too.
        full = 255.0 if values.dtype.itemsize == 1 else 65535.0
    if low < 0 or high > full:
        raise BadRow(f"the image's {values.dtype} values, {low:g} to {high:g}, have no known range")
    return np.round(values * (255.0 / full)).astype(np.uint8)


def _mask_array(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.ndim != 2 or values.size == 0:
        raise BadRow(f"an array of shape {values.shape} and type {values.dtype} is no mask")
    if values.dtype.kind not in "biuf":
        raise BadRow(f"an array of {values.dtype} is no mask")
    if values.dtype.kind == "f" and not (np.isfinite(values) & (values == np.round(values))).all():
        raise BadRow("the mask's values are no whole numbers")
    return values.astype(np.int64)
