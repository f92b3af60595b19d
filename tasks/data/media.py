"""Reads pictures, masks and recordings from the values of a row, in one form for every task.

A value is a path, the `{"bytes", "path"}` of an undecoded `datasets.Image` or `Audio` column, or
a decoded picture or recording. Every problem with a value is a `BadRow`: decoders raise some twenty
different errors on broken files, and none of them may end a run.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmadapters.errors import first_line

from ..core.errors import BadRow
from ..core.files import open_file

if TYPE_CHECKING:
    from PIL import Image
    from torchaudio.transforms import Resample

# The endings of the files that are taken for pictures and recordings, in lower case.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm"),
)
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
MEDIA_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *AUDIO_SUFFIXES))

# A WAV file that was written to a pipe announces the largest possible size.
UNKNOWN_SIZE = 0x7FFF0000
# A windowed sinc has as many taps as the product of the reduced rates. Usual rates need at most
# 3e5; 44,101 to 16,000 Hz would need gigabytes and is resampled in the spectrum instead.
LARGEST_FILTERS = 1_000_000
LOST = 0.01  # a recording that lacks more than this share of its announced length was cut off
_ANNOUNCED = re.compile(r"^\s*(?:data|SSND)\s*:\s*(\d+)\s*\(should be (\d+)\)", re.MULTILINE)


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


def read_audio(value: Any, rate: int) -> np.ndarray:
    """Reads a recording as (T,) float32 samples at `rate` Hz, the mean of its channels.

    It is resampled by torchaudio's windowed sinc, at unusual ratios in the spectrum. Integer
    samples are scaled to [−1, 1].

    Args:
        value: a path, `{"bytes", "path"}`, or `{"array", "sampling_rate"}` with (T,), (C, T) or
            (T, C) samples.

    Raises:
        BadRow: the recording cannot be read, was cut off, is empty, or holds NaN or infinity.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        samples, original = _audio_array(value)
    else:
        samples, original = _audio_file(value)
    if samples.shape[0] == 0:
        raise BadRow("the recording is empty (no samples)")
    if not np.isfinite(samples).all():
        raise BadRow("the recording holds samples that are not finite numbers")
    mono = samples.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(_resample(mono, original, rate))


def audio_samples(value: Any, rate: int) -> int:
    """Returns about how many samples a recording has at `rate` Hz, from its header alone; 0 if the
    header cannot be read."""
    import soundfile

    if isinstance(value, dict) and value.get("array") is not None:
        return round(len(value["array"]) * rate / value["sampling_rate"])
    try:
        with _opened(value, "audio") as file:
            info = soundfile.info(file if isinstance(file, _Bytes) else file.name)
    except (BadRow, RuntimeError, OSError, TypeError):
        return 0
    return round(info.frames * rate / info.samplerate)


def image_size(value: Any) -> tuple[int, int] | None:
    """Returns the height and width of a picture in its file, from its header alone; None if the
    header cannot be read."""
    from PIL import Image

    if isinstance(value, np.ndarray):
        return None
    try:
        if isinstance(value, Image.Image):
            return value.height, value.width
        with _opened(value, "image") as file, Image.open(file) as image:
            return image.height, image.width
    except Exception:  # PIL's plugins raise what their parsing happens to raise
        return None


def media_name(value: Any) -> str | None:
    """Returns the file name of a row's picture or recording, or None if it has none."""
    path = value.get("path") if isinstance(value, dict) else value
    return Path(path).name if isinstance(path, str | Path) and str(path) else None


def media_digest(value: Any) -> str | None:
    """Returns a hash of the encoded picture or recording, equal for equal files; None if it cannot
    be read."""
    if isinstance(value, dict) and value.get("array") is not None:
        try:
            value = np.asarray(value["array"])
        except ValueError:  # lists of different lengths
            return None
    if isinstance(value, np.ndarray):
        return hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
    try:
        with _opened(value, "file") as file:
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    except BadRow:
        return None


class _Bytes(io.BytesIO):
    """A byte stream in which a seek before the start goes to the start.

    libsndfile seeks there in broken MP3 files, and an error in its callback would be printed with
    its stack.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.getbuffer().nbytes}
        return super().seek(max(start[whence] + offset, 0))


@contextmanager
def _opened(value: Any, noun: str) -> Iterator[BinaryIO]:
    """Opens the encoded file as a stream."""
    if isinstance(value, dict):
        data = value.get("bytes")
        value = value.get("path") if data is None else data
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise BadRow(f"the {noun} has no bytes")
        yield _Bytes(value)
        return
    if value is None or (isinstance(value, str) and not value):
        raise BadRow(f"there is no {noun}")
    if not isinstance(value, str | Path):
        raise BadRow(f"a value of type {type(value).__name__} is no {noun}")
    if "://" in str(value):
        yield _fetched(str(value))
        return
    with open_file(value) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise BadRow(f"the {noun} file is empty (0 bytes)")
        yield file


def _fetched(url: str) -> _Bytes:
    """Returns the bytes at a URL, such as the hf:// and zip:// paths of streamed data sets."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            data = file.read()
    except Exception as error:  # each file system has its own
        raise BadRow(f"cannot fetch {url}: {first_line(error)}") from None
    if not data:
        raise BadRow(f"there are no bytes at {url}")
    return _Bytes(data)


@contextmanager
def _decoded(value: Any, noun: str) -> Iterator[Image.Image]:
    """Gives the first frame, upright, in the mode of its file and fully decoded."""
    from PIL import Image

    if isinstance(value, Image.Image):
        yield _upright(value, noun)
        return
    with _opened(value, noun) as file:
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


def _audio_file(value: Any) -> tuple[np.ndarray, int]:
    """Returns (T, C) float32 samples and their rate in Hz."""
    import soundfile

    with _opened(value, "audio") as file:
        # libsndfile inspects the start of a file that it opens by name, not by descriptor.
        source = file if isinstance(file, _Bytes) else file.name
        try:
            with soundfile.SoundFile(source) as sound:
                samples = sound.read(dtype="float32", always_2d=True)
                announced, info, rate = sound.frames, sound.extra_info, sound.samplerate
        except Exception as error:  # soundfile raises RuntimeError, TypeError and its own
            reason = first_line(error).removeprefix(f"Error opening {source!r}: ")
            reason = re.sub(r"^Error opening <.*?>: ", "", reason)
            raise BadRow(f"the audio cannot be decoded: {reason}") from None
    there, said = samples.shape[0], announced
    if (match := _ANNOUNCED.search(info)) and int(match[1]) < UNKNOWN_SIZE and int(match[2]):
        said = round(there * int(match[1]) / int(match[2]))
    if there and there < (1 - LOST) * said:
        raise BadRow(f"the audio is cut off: {there / rate:.2f} s are there of {said / rate:.2f} s")
    return samples, rate


def _audio_array(value: dict[str, Any]) -> tuple[np.ndarray, int]:
    rate = value.get("sampling_rate")
    if not isinstance(rate, int | np.integer) or rate <= 0:
        raise BadRow(f"samples need a sampling_rate above 0, got {rate!r}")
    try:
        samples = np.asarray(value["array"])
    except ValueError as error:
        raise BadRow(f"the samples are no array: {first_line(error)}") from None
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "iuf":
        raise BadRow(f"samples of shape {samples.shape} and type {samples.dtype} are no recording")
    if samples.dtype.kind == "u":
        raise BadRow("unsigned samples are ambiguous: give signed integers or floats")
    if samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    if samples.ndim == 1:
        samples = samples[:, None]
    elif samples.shape[0] < samples.shape[1]:
        samples = samples.T
    return samples.astype(np.float32), int(rate)


def _resample(samples: np.ndarray, original: int, rate: int) -> np.ndarray:
    """Resamples (T,) at `original` Hz to (ceil(T · rate / original),) at `rate` Hz."""
    import torch

    if original == rate:
        return samples
    x_T = torch.from_numpy(samples)
    ratio = Fraction(original, rate)
    with torch.inference_mode():
        if ratio.numerator * ratio.denominator <= LARGEST_FILTERS:
            return _resampler(ratio)(x_T).numpy()
        # Zeros fill a whole number of periods of the two rates, so the ratio is exact, and the
        # transform wraps the ends around into silence.
        periods = -(-(len(x_T) + original // 10) // ratio.numerator)
        spectrum = torch.fft.rfft(x_T, n=periods * ratio.numerator)
        wrapped = torch.fft.irfft(spectrum, n=periods * ratio.denominator)
        return (wrapped[: -(-len(x_T) * rate // original)] / float(ratio)).numpy()


@functools.lru_cache(maxsize=16)
def _resampler(ratio: Fraction) -> Resample:
    """Caches resamplers, since making the filters takes longer than using them."""
    from torchaudio.transforms import Resample

    return Resample(ratio.numerator, ratio.denominator)
