"""Reads pictures and masks from the values of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import BadRow
from .decode import StoredPicture, open_picture, orientation_of, stored
from .files import opened

if TYPE_CHECKING:
    from PIL import Image

DEEP = 16  # bits of a value for which `bits` may say that fewer are in use


def read_image(value: Any, *, bits: int | None = None) -> Image.Image:
    """Reads a picture in RGB, upright (EXIF orientation applied), with transparency on white.

    16-bit and floating-point pictures are scaled from the range of their type ([0, 1] or [0, 255]
    for floats). Of several frames the first is read.

    Args:
        value: a path, a PIL image, `{"bytes", "path"}`, or an array: (H, W), (H, W, 1 | 3 | 4) or
            (3, H, W) of uint8, uint16, bool or floats.
        bits: the number of bits in use in pictures with 16 bits a channel (12 for most cameras of
            microscopes and X-ray detectors); None means all 16. Pictures of 8 bits ignore it.

    Raises:
        BadRow: the picture cannot be read, or has a value above the bits in use.
    """
    from PIL import Image

    if isinstance(value, np.ndarray):
        return _rgb(Image.fromarray(_picture_array(value, bits)))
    with stored(value, "image", deep=True) as picture:
        return _upright(picture, bits)


def read_mask(value: Any) -> np.ndarray:
    """Reads the labels of a mask as they are in the file, without palette or scaling.

    Returns:
        (H, W) int64 of class ids (indexed, grey, 1-bit and 16-bit masks), or (H, W, 3) uint8 of
        colours for RGB masks.

    Raises:
        BadRow: the mask cannot be read, or its values are not whole numbers.
    """
    from PIL import ImageOps

    if isinstance(value, np.ndarray):
        return _mask_array(value)
    with stored(value, "mask") as picture:
        image = picture.image
        if orientation_of(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode == "LA":
            image = image.getchannel("L")
        elif image.mode == "PA":
            image = image.getchannel("P")
        elif image.mode not in ("P", "L", "1", "F") and not image.mode.startswith("I"):
            image = image.convert("RGB")
        return _mask_array(np.asarray(image))


def highest_value(value: Any) -> int | None:
    """Returns the greatest value of a picture with 16 bits a channel; None for all others.

    Raises:
        BadRow: the picture cannot be read.
    """
    if not isinstance(value, np.ndarray):
        with stored(value, "image", deep=True) as picture:
            if picture.deep is not None:
                colours = 3 if picture.deep.shape[2] >= 3 else 1
                return int(picture.deep[:, :, :colours].max())
            if not picture.image.mode.startswith("I"):
                return None
            value = np.asarray(picture.image)
    if value.dtype.kind not in "iu" or value.dtype.itemsize == 1 or not value.size:
        return None
    return int(value.max())


def image_size(value: Any) -> tuple[int, int] | None:
    """Returns the height and width of a picture in its file, from its header alone; None if the
    header cannot be read."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        return None
    try:
        if isinstance(value, Image.Image):
            return value.height, value.width
        with opened(value, "image") as file, open_picture(file) as image:
            return image.height, image.width
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return None


def _upright(picture: StoredPicture, bits: int | None) -> Image.Image:
    from PIL import Image, ImageOps

    image = picture.image
    if picture.deep is None:
        # EXIF data that cannot be parsed hold no orientation.
        return _rgb(ImageOps.exif_transpose(image) if orientation_of(image) != 1 else image, bits)
    values = _scaled(picture.deep, bits)
    deep = Image.fromarray(values)
    if (clear := image.info.get("transparency")) is not None:
        shown = np.where((picture.deep == clear).all(axis=2), 0, 255).astype(np.uint8)
        deep.putalpha(Image.fromarray(shown))
    deep.info["exif"] = image.info.get("exif", b"")
    return _rgb(ImageOps.exif_transpose(deep) if orientation_of(deep) != 1 else deep)


def _rgb(image: Image.Image, bits: int | None = None) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values, clear = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray(_picture_array(values, bits))
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _picture_array(values: np.ndarray, bits: int | None = None) -> np.ndarray:
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
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return _scaled(values, bits)


def _scaled(values: np.ndarray, bits: int | None) -> np.ndarray:
    """Returns values of 16 bits or floats as uint8, scaled from the range in use."""
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        full = 1.0 if high <= 1 else 255.0
    elif values.dtype.itemsize == 1:
        full = 255.0
    else:
        # PIL holds 16-bit files in 32-bit integers too.
        full = 2.0 ** (bits or DEEP) - 1
        if bits is not None and full < high < 2**DEEP:
            raise BadRow(
                f"the image holds {high:.0f}, above {full:.0f}, the greatest value of {bits} bits: "
                "say the number of bits in use by data.bits"
            )
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
