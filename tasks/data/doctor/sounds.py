"""Listens to recordings for what no decoder complains about: silence, clipping, wrong ranges.

It also compares a column of durations with the files.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...core.errors import BadRow
from ...core.findings import Finding, Places, named_rows
from ..media import audio_samples
from ..media.audio import part_of
from ..media.files import ByteStream, opened
from .results import RowPlace

SECONDS = 60  # of a long recording, so many are listened to
SILENT = 1e-3  # of full scale (−60 dB): speech and noise of any use are louder
FULL_SCALE = 0.98  # of full scale: a recording whose peak is below was not clipped
CLIPPED = 0.005  # share of samples on flat tops; loud but whole recordings have far fewer
INT16 = 256.0  # floats above this were integers
DURATIONS = ("duration", "durations", "duration_s", "duration_seconds", "duration[ms]", "seconds")
UNITS = {1.0: "s", 1e3: "ms", 1e6: "µs", 8e3: "samples", 16e3: "samples", 22_050.0: "samples"}
UNITS |= {44.1e3: "samples", 48e3: "samples"}
TOLERANCE, LEAST = 0.05, 0.15  # share of the duration, and seconds, by which files may differ


@dataclass(frozen=True)
class SoundFacts:
    """Facts about a recording.

    Attributes:
        silent: whether nothing is heard.
        clipped: the share of samples that were cut off at full scale, 0 to 1.
        range: the greatest absolute value of a recording that is stored as floats; None for all
            others. Floats of a recording lie between −1 and 1.
    """

    silent: bool
    clipped: float
    range: float | None


def sound_facts(value: Any) -> SoundFacts:
    """Decodes the first minute of a recording and returns what is heard in it.

    If the row is about a part of the file, it is the first minute of this part.

    Raises:
        BadRow: it cannot be read.
    """
    samples, floats = _samples(value)
    if not samples.size or not np.isfinite(samples).all():
        raise BadRow("the recording has no samples, or such as are not finite")
    peak = float(np.abs(samples).max())
    # A constant offset is not heard.
    heard = float(np.abs(samples - samples.mean(axis=0)).max())
    return SoundFacts(heard < SILENT, _clipped(samples, peak), peak if floats else None)


def _samples(value: Any) -> tuple[np.ndarray, bool]:
    """Returns (T, C) samples, integers scaled to [−1, 1], and whether they are stored as floats."""
    import soundfile

    if isinstance(value, dict) and value.get("array") is not None:
        try:
            samples = np.asarray(value["array"])
        except ValueError:
            raise BadRow("the samples are no array") from None
        if samples.ndim not in (1, 2) or samples.dtype.kind not in "if":
            raise BadRow("the samples are no recording")
        if samples.dtype.kind == "i":
            return _by_time(samples / -float(np.iinfo(samples.dtype).min)), False
        return _by_time(samples.astype(np.float64)), True
    with opened(value, "audio") as file:
        source = file if isinstance(file, ByteStream) else file.name
        try:
            with soundfile.SoundFile(source) as sound:
                floats = sound.subtype in ("FLOAT", "DOUBLE")
                start, length = part_of(value) or (0.0, None)
                sound.seek(min(round(start * sound.samplerate), sound.frames))
                frames = round(min(length or SECONDS, SECONDS) * sound.samplerate)
                return sound.read(frames, always_2d=True), floats
        except Exception:  # soundfile raises RuntimeError, TypeError and its own
            raise BadRow("the audio cannot be decoded") from None


def _by_time(samples: np.ndarray) -> np.ndarray:
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def _clipped(samples: np.ndarray, peak: float) -> float:
    """Returns the share of samples that stay at the peak from one to the next."""
    if peak < FULL_SCALE:
        return 0.0
    top = np.abs(samples) >= peak * (1 - 1e-4)
    same = np.sign(samples[1:]) == np.sign(samples[:-1])
    return float((top[1:] & top[:-1] & same).mean()) if len(samples) > 1 else 0.0


@dataclass
class SoundTally:
    """Adds up the facts of recordings.

    Attributes:
        silent, clipped, loud: the rows of recordings that are silent, are clipped, or are stored as
            floats outside of −1 to 1.
        highest: the greatest absolute value of a loud one.
    """

    silent: Places = field(default_factory=Places)
    clipped: Places = field(default_factory=Places)
    loud: Places = field(default_factory=Places)
    highest: float = 0.0

    def add(self, index: int, fact: SoundFacts, place: Callable[[int], RowPlace]) -> None:
        """Adds the recording of a row."""
        if fact.silent:
            self.silent.add(index, place)
        if fact.clipped > CLIPPED:
            self.clipped.add(index, place)
        if fact.range is not None and fact.range > 1:
            self.loud.add(index, place)
            self.highest = max(self.highest, fact.range)


def sound_findings(tally: SoundTally, *, where: str) -> list[Finding]:
    """Returns what is suspicious about recordings.

    Args:
        tally: of the recordings.
        where: the words for the rows that were listened to ("of the 40 recordings of train").
    """
    results = []

    def add(places: Places, words: str, remedy: str) -> None:
        if places:
            be = "is" if len(places) == 1 else "are"
            text = f"{len(places):,} {where} {words.format(be=be)} ({named_rows(places)})"
            results.append(Finding(text, remedy))

    add(
        tally.silent,
        "{be} silent",
        "listen to them, and leave out those that hold nothing",
    )
    add(
        tally.clipped,
        "{be} clipped: many samples stand at the greatest value",
        "record them at a lower level, or leave them out",
    )
    if tally.loud:
        remedy = "scale them into −1 to 1"
        if tally.highest > INT16:
            remedy = "they were 16-bit integers: divide them by 32768, or save them as integers"
        add(
            tally.loud,
            f"{{be}} stored as floats that go up to {tally.highest:,.4g} and not to 1",
            remedy,
        )
    return results


def duration_column(names: Sequence[str]) -> str | None:
    """Returns the column that states durations, or None."""
    return next((name for name in names if name.lower() in DURATIONS), None)


def seconds_of(value: Any) -> float:
    """Returns the seconds of a recording from its header; 0 if it cannot be read."""
    return audio_samples(value, 1000) / 1000


@dataclass
class Durations:
    """The durations of recordings as a column states them and as the files have them, in 24 bytes
    for each."""

    rows: array = field(default_factory=lambda: array("Q"))
    stated: array = field(default_factory=lambda: array("d"))
    seconds: array = field(default_factory=lambda: array("d"))

    def add(self, index: int, stated: Any, seconds: float) -> None:
        """Adds a row, unless one of its durations is unknown (0 seconds, or no number)."""
        if seconds > 0 and _is_number(stated):
            self.rows.append(index)
            self.stated.append(float(stated))
            self.seconds.append(seconds)


def duration_findings(
    durations: Durations, place: Callable[[int], RowPlace], *, column: str, where: str
) -> list[Finding]:
    """Compares a column of durations, in any usual unit, with the files.

    Args:
        durations: of both.
        place: names a row.
        column: its name.
        where: the words for the rows ("of the 40 recordings of train").
    """
    if not durations.rows:
        return []
    stated, seconds = np.array(durations.stated), np.array(durations.seconds)
    unit = _unit(stated / seconds)
    off = np.flatnonzero(abs(stated / unit - seconds) > np.maximum(TOLERANCE * seconds, LEAST))
    if not len(off):
        return []
    places = Places()
    for number in off.tolist():
        places.add(durations.rows[number], place)
    said, there = stated[off[0]] / unit, seconds[off[0]]
    return [
        Finding(
            f"{len(off):,} {where} have another duration than the column {column!r} says: "
            f"{said:.2f} s are stated and {there:.2f} s are there ({named_rows(places)})",
            "the files were cut or exchanged, or the column is of other files: mend the column, or "
            "the files",
        )
    ]


def _is_number(value: Any) -> bool:
    try:
        return float(value) > 0
    except (TypeError, ValueError):
        return False


def _unit(ratios: np.ndarray) -> float:
    """Returns the unit of the column in parts of a second: the usual one next to most ratios."""
    middle = float(np.median(ratios))
    unit = min(UNITS, key=lambda unit: abs(np.log(middle / unit)))
    return unit if abs(middle / unit - 1) <= TOLERANCE else 1.0
