"""Decodes the files of pictures and masks, as they are stored."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmadapters.errors import first_line
from mmadapters.limits import PIXELS, RATIO

from ...core.errors import BadRow
from .files import opened

if TYPE_CHECKING:
    from PIL import Image

_ORIENTATION = 0x0112  # the EXIF tag
_LONG = 2_048  # pixels; shorter sides may have any ratio
# PIL's names of the formats that are read: those that hold pixels and start no other program.
FORMATS = (
    *("PNG", "JPEG", "JPEG2000", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "ICO", "CUR"),
    *("ICNS", "TGA", "PCX", "DCX", "PSD", "SGI", "SUN", "DDS", "QOI", "XBM", "XPM", "IM", "FITS"),
)


@dataclass(frozen=True)
class StoredPicture:
    """The first frame of a picture as it is stored, fully decoded.

    Attributes:
        image: in the mode of its file. PIL keeps only the upper 8 bits of colours of 16 bits.
        deep: (H, W, 2 | 3 | 4) uint16, all bits of such colours; None for all other pictures, and
            where they were not asked for.
    """

    image: Image.Image
    deep: np.ndarray | None = None


@contextmanager
def stored(value: Any, noun: str, *, deep: bool = False) -> Iterator[StoredPicture]:
    """Decodes a path, `{"bytes", "path"}`, bytes or a PIL image.

    Args:
        noun: the word for the value in messages.
        deep: whether colours of 16 bits are also read with all their bits.

    Raises:
        BadRow: it cannot be decoded.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        yield StoredPicture(_loaded(value, noun))
        return
    with opened(value, noun) as file:
        image = open_picture(file, noun)
        wide = deep and _has_deep_colours(image)
        image = _loaded(image, noun)
        yield StoredPicture(image, _deep_colours(file) if wide else None)


def orientation_of(image: Image.Image) -> int:
    """Returns the EXIF orientation of a picture, 1 to 8; 1 (upright) if it has none."""
    try:
        code = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be parsed hold no orientation
        return 1
    return code if code in range(2, 9) else 1


def open_picture(file: BinaryIO, noun: str = "image") -> Image.Image:
    """Reads the header of a picture. Only the formats of `FORMATS` are tried: PIL would start
    Ghostscript for PostScript, whatever the name of the file.

    Raises:
        BadRow: it is in no such format, or has more pixels or another shape than the limits allow.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if PIXELS.value > PIXELS.default:  # PIL refuses twice its own limit
            Image.MAX_IMAGE_PIXELS = PIXELS.value // 2
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise BadRow(f"the {noun} file is in no format that can be read") from None
    except Image.DecompressionBombError as error:
        raise BadRow(f"the {noun} cannot be decoded: {first_line(error)}") from None
    except Exception as error:  # PIL's plugins raise what their parsing happens to raise
        raise BadRow(f"the {noun} cannot be decoded: {first_line(error)}") from None
    width, height = image.size
    if (reason := PIXELS.passed(width * height)) is not None:
        raise BadRow(f"the {noun} has {reason}")
    long, short = max(width, height), max(min(width, height), 1)
    if long > _LONG and (reason := RATIO.passed(long / short)) is not None:
        raise BadRow(f"the {noun} of {width} × {height} pixels is {reason}")
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this version of PIL knows."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _loaded(image: Image.Image, noun: str) -> Image.Image:
    try:
        image.load()
    except MemoryError:
        raise BadRow(f"the {noun} is too large for the memory") from None
    except Exception as error:  # PIL's plugins raise what their parsing happens to raise
        raise BadRow(f"the {noun} cannot be decoded: {first_line(error)}") from None
    return image


def _has_deep_colours(image: Image.Image) -> bool:
    """Returns whether a PNG file that is not loaded yet has several channels of 16 bits."""
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA", "LA"):
        return False
    tiles: list[Any] = list(getattr(image, "tile", ()))
    return bool(tiles) and str(tiles[0][3]).endswith(";16B")


def _deep_colours(file: BinaryIO) -> np.ndarray | None:
    import torch

    file.seek(0)
    data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # torchvision announces that its decoders will move to another package.
            warnings.simplefilter("ignore", DeprecationWarning)
            from torchvision.io import ImageReadMode, decode_png

            values_CHW = decode_png(data, mode=ImageReadMode.UNCHANGED)
    except (ImportError, RuntimeError):  # PIL has read it: its 8 bits are used
        return None
    return np.moveaxis(values_CHW.numpy(), 0, 2) if values_CHW.dtype == torch.uint16 else None
