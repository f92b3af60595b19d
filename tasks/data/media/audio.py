"""Reads recordings from the values of a row."""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmadapters.errors import first_line
from mmadapters.limits import RATE, SECONDS

from ...core.errors import BadRow
from .files import ByteStream, media_name, opened

if TYPE_CHECKING:
    from soundfile import SoundFile
    from torchaudio.transforms import Resample

# A WAV file that was written to a pipe announces the largest possible size.
UNKNOWN_SIZE = 0x7FFF0000
# A windowed sinc has as many taps as the product of the reduced rates. Usual rates need at most
# 3e5; 44,101 to 16,000 Hz would need gigabytes and is resampled in the spectrum instead.
LARGEST_FILTERS = 1_000_000
# Samples lie within [-1, 1]. Floats may go somewhat beyond, and some programs write integers as
# floats; squares and sums of anything larger are no longer finite in float32.
LOUDEST = 2.0**32
PIECE = 600  # seconds that are read and resampled at once
_SEEN = 7  # the filter sees so many samples on both sides, at the lower of both rates
_UNKNOWN_FRAMES = 1 << 48  # libsndfile gives a greater number where the header does not say it
LOST = 0.01  # a recording that lacks more than this share of its announced length was cut off
ROUNDED = 0.05  # seconds by which a table's times may pass the end of a recording
# Compressed formats that libsndfile does not read.
UNREAD_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".amr", ".3gp", ".webm")
_ANNOUNCED = re.compile(r"^\s*(?:data|SSND)\s*:\s*(\d+)\s*\(should be (\d+)\)", re.MULTILINE)


def read_audio(value: Any, rate: int) -> np.ndarray:
    """Reads a recording as (T,) float32 samples at `rate` Hz, the mean of its channels.

    It is resampled by torchaudio's windowed sinc, at unusual ratios in the spectrum. Integer
    samples are scaled to [−1, 1].

    Args:
        value: a path, `{"bytes", "path"}`, or `{"array", "sampling_rate"}` with (T,), (C, T) or
            (T, C) samples. Files may have an `offset` and a `duration` in seconds beside them: only
            this part is read.

    Raises:
        BadRow: the recording cannot be read, was cut off, is empty, is longer than the limit, or
            holds NaN, infinity or samples beyond `LOUDEST`.
    """
    if isinstance(value, dict) and value.get("array") is not None:
        samples, original = _audio_array(value)
        _check_length(len(samples), original)
        return np.ascontiguousarray(_resample(_mono(samples), original, rate))
    return np.ascontiguousarray(_audio_file(value, part_of(value), rate))


def audio_samples(value: Any, rate: int) -> int:
    """Returns about how many samples a recording has at `rate` Hz, from its header alone; 0 if the
    header cannot be read."""
    import soundfile

    if isinstance(value, dict) and value.get("array") is not None:
        return round(len(value["array"]) * rate / value["sampling_rate"])
    try:
        part = part_of(value)
        if part is not None and part[1] is not None:
            return round(part[1] * rate)
        with opened(value, "audio") as file:
            info = soundfile.info(file if isinstance(file, ByteStream) else file.name)
    except (BadRow, RuntimeError, OSError, TypeError):
        return 0
    samples = round(info.frames * rate / info.samplerate)
    return samples if part is None else max(samples - round(part[0] * rate), 0)


def part_of(value: Any) -> tuple[float, float | None] | None:
    """Returns (offset, duration) in seconds of the part of a recording that a row names, or None
    for the whole of it. A duration of None goes on to the end.

    Raises:
        BadRow: they are no such numbers.
    """
    if not isinstance(value, dict):
        return None
    offset, duration = value.get("offset"), value.get("duration")
    if duration is None and not offset:
        return None
    try:
        offset = float(offset or 0.0)
        duration = None if duration is None else float(duration)
    except (TypeError, ValueError):
        raise BadRow(f"offset {offset!r} and duration {duration!r} are no seconds") from None
    if duration is None:
        if not (math.isfinite(offset) and offset >= 0):
            raise BadRow(f"offset {offset:g} s names no part of a recording: it is 0 or more")
    elif not (math.isfinite(offset) and math.isfinite(duration) and offset >= 0 and duration > 0):
        raise BadRow(
            f"offset {offset:g} s and duration {duration:g} s name no part of a recording: an "
            "offset is 0 or more, a duration above 0"
        )
    return offset, duration


def _audio_file(value: Any, part: tuple[float, float | None] | None, rate: int) -> np.ndarray:
    """Returns (T,) float32 samples at `rate` Hz, read and resampled in pieces.

    Args:
        part: the (offset, duration) in seconds that is read; None reads the whole.
    """
    import soundfile

    with opened(value, "audio") as file:
        # libsndfile inspects the start of a file that it opens by name, not by descriptor.
        source = file if isinstance(file, ByteStream) else file.name
        try:
            with soundfile.SoundFile(source) as sound:
                announced, info, original = sound.frames, sound.extra_info, sound.samplerate
                count = None if part is None else _seek_part(sound, *part)
                if announced < _UNKNOWN_FRAMES or count is not None:
                    _check_length(announced if count is None else count, original)
                samples, there = _read_pieces(sound, count, rate)
        except BadRow:
            raise
        except Exception as error:  # soundfile raises RuntimeError, TypeError and its own
            if (remedy := _conversion(value)) is not None:
                raise BadRow(remedy) from None
            reason = first_line(error).removeprefix(f"Error opening {source!r}: ")
            reason = re.sub(r"^Error opening <.*?>: ", "", reason)
            raise BadRow(f"the audio cannot be decoded: {reason}") from None
    said = announced
    if (match := _ANNOUNCED.search(info)) and int(match[1]) < UNKNOWN_SIZE and int(match[2]):
        said = round(there * int(match[1]) / int(match[2]))
    if part is None and there and there < (1 - LOST) * said:
        raise BadRow(
            f"the audio is cut off: {there / original:.2f} s are there of {said / original:.2f} s"
        )
    if not there:
        raise BadRow("the recording is empty (no samples)")
    return samples


def _check_length(frames: int, rate: int) -> None:
    """Raises BadRow for a recording with more seconds or a higher rate than the limits allow."""
    if (reason := RATE.passed(rate)) is not None:
        raise BadRow(f"the recording has {reason}")
    if (reason := SECONDS.passed(frames / rate)) is not None:
        raise BadRow(f"the recording has {reason}")


def _mono(samples: np.ndarray) -> np.ndarray:
    """samples: (T, C) -> (T,) float32, the mean of the channels."""
    if samples.shape[0] == 0:
        raise BadRow("the recording is empty (no samples)")
    if not np.isfinite(samples).all():
        raise BadRow("the recording holds samples that are not finite numbers")
    if (loudest := max(float(samples.max()), -float(samples.min()))) > LOUDEST:
        raise BadRow(
            f"the recording holds samples of {loudest:.3g}, and the largest is 1: its header names "
            "another type than that of its samples, or it is damaged"
        )
    return samples.mean(axis=1, dtype=np.float32)


def _read_pieces(sound: SoundFile, count: int | None, rate: int) -> tuple[np.ndarray, int]:
    """Reads `count` samples, or all that are left, resamples them, and returns how many they were.

    A recording of one piece is resampled as a whole. Pieces of longer ones overlap by as much as
    the filter of the resampler sees, so that the result is the same.
    """
    original = sound.samplerate
    ratio = Fraction(original, rate)
    period = ratio.numerator
    overlap = (_SEEN * max(ratio.numerator, ratio.denominator) // period + 2) * period
    size = max(-(-PIECE * original // period), 1) * period + 2 * overlap
    apart = original == rate or ratio.numerator * ratio.denominator <= LARGEST_FILTERS
    left = size if count is None else count
    first = _mono(sound.read(min(size, left), dtype="float32", always_2d=True))
    there = len(first)
    if there < size or there == count or not apart:
        rest = _rest(sound, count, there) if not apart and there == size else []
        whole = np.concatenate([first, *rest]) if rest else first
        return _resample(whole, original, rate), len(whole)
    pieces: list[np.ndarray] = []
    start = 0  # samples at the head of `first` that are only seen
    while True:
        wanted = size - 2 * overlap if count is None else min(size - 2 * overlap, count - there)
        more = sound.read(wanted, dtype="float32", always_2d=True) if wanted else np.zeros((0, 1))
        last = not len(more)
        new = _resample(first, original, rate)
        out = len(first) - (0 if last else overlap)  # the tail is resampled with the next piece
        at = slice(
            start * ratio.denominator // period, None if last else out * ratio.denominator // period
        )
        pieces.append(new[at].copy())
        if last:
            return np.concatenate(pieces), there
        there += len(more)
        _check_length(there, original)
        keep = (len(first) - 2 * overlap) // period * period
        start = len(first) - overlap - keep
        first = np.concatenate([first[keep:], _mono(more)])


def _rest(sound: SoundFile, count: int | None, there: int) -> list[np.ndarray]:
    """Reads what is left of a recording in pieces, without resampling."""
    pieces = []
    size = PIECE * sound.samplerate
    while wanted := size if count is None else min(size, count - there):
        more = sound.read(wanted, dtype="float32", always_2d=True)
        if not len(more):
            break
        there += len(more)
        _check_length(there, sound.samplerate)
        pieces.append(_mono(more))
    return pieces


def _conversion(value: Any) -> str | None:
    """Returns the way to read a file of a format that libsndfile does not know, or None."""
    name = media_name({**value, "offset": None} if isinstance(value, dict) else value)
    if name is None or Path(name).suffix.lower() not in UNREAD_SUFFIXES:
        return None
    new = Path(name).with_suffix(".flac").name
    return (
        f"{Path(name).suffix.lower()} files are not read (libsndfile does not know them): convert "
        f"it by ffmpeg -i {name} {new}, and name that file"
    )


def _seek_part(sound: SoundFile, offset: float, duration: float | None) -> int:
    """Goes to the sample at `offset` and returns how many are to be read from there."""
    rate = sound.samplerate
    if duration is None:
        duration = sound.frames / rate - offset
        if duration <= 0:
            raise BadRow(
                f"the part from {offset:g} s on starts after the recording, which has "
                f"{sound.frames / rate:.2f} s"
            )
    start, count = round(offset * rate), max(round(duration * rate), 1)
    missing = start + count - sound.frames
    if missing > max(LOST * count, ROUNDED * rate):
        raise BadRow(
            f"the part from {offset:g} to {offset + duration:g} s ends after the recording, which "
            f"has {sound.frames / rate:.2f} s"
        )
    sound.seek(start)
    return count


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
