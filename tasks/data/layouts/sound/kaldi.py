"""Kaldi's data folders: wav.scp, text, utt2spk and segments.

Source: "Data preparation" of Kaldi's documentation, https://kaldi-asr.org/doc/data_prep.html.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...parts import Parts, Piece
from ...wanted import Wanted
from ..media_folders import from_rows

_ARCHIVE = re.compile(r"\.ark(:\d+)?$")
COLUMNS = {"utt2spk": "speaker", "utt2lang": "language"}  # file -> the column that it makes


def kaldi(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a data folder, or a folder of data folders, each a split."""
    if not path.is_dir():
        return None
    if (path / "wav.scp").is_file():
        return {"": [_piece(wanted, path)]}
    for place in (path, path / "data"):
        inside = sorted(place.iterdir()) if place.is_dir() else []
        folders = [folder for folder in inside if (folder / "wav.scp").is_file()]
        if folders:
            return {folder.name: [_piece(wanted, folder)] for folder in folders}
    return None


def _piece(wanted: Wanted, folder: Path) -> Piece:
    return Piece(lambda: from_rows(_rows(folder)), wanted.root(folder))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each utterance.

    Raises:
        ValueError: a file of the folder cannot be read so.
    """
    recordings = _read(folder / "wav.scp")
    for number, name, place in _lines(folder / "wav.scp"):
        where = f"{folder / 'wav.scp'}: line {number} gives {name}"
        if place.endswith("|") or place.startswith("|"):
            raise ValueError(
                f"{where} by a command ({place}), which is never run: run it yourself, and write "
                "the path of the file that it makes"
            )
        if _ARCHIVE.search(place):
            raise ValueError(
                f"{where} in an archive ({place}), which is not read: write the path of a file, "
                "such as wav-copy makes"
            )
    texts = _read(folder / "text") if (folder / "text").is_file() else None
    more = {
        column: _read(folder / name)
        for name, column in COLUMNS.items()
        if (folder / name).is_file()
    }
    parts = _segments(folder / "segments", recordings)
    rows = []
    for name in {**parts, **(texts or {})} if parts else {**recordings, **(texts or {})}:
        row: dict[str, Any] = {"id": name, "audio": recordings.get(name)}
        if parts:
            recording, offset, duration = parts.get(name, (None, None, None))
            row["audio"] = recordings.get(recording or "")
            row |= {"recording": recording, "offset": offset, "duration": duration}
        if texts is not None:
            row["text"] = texts.get(name, "")
        rows.append(row | {column: values.get(name) for column, values in more.items()})
    return rows


def _segments(file: Path, recordings: dict[str, str]) -> dict[str, tuple[str, float, float | None]]:
    """Returns (recording, offset, duration in seconds) of each utterance; a duration of None goes
    on to the end."""
    parts: dict[str, tuple[str, float, float | None]] = {}
    for number, name, rest in _lines(file) if file.is_file() else ():
        cells = rest.split()
        try:
            recording, (start, end) = cells[0], map(float, cells[1:3])
        except (IndexError, ValueError):
            raise ValueError(
                f"{file}: line {number} is {name} {rest}, and not an utterance, a recording, its "
                "start and its end in seconds"
            ) from None
        if recording not in recordings:
            raise ValueError(f"{file}: line {number} names {recording}, which is not in wav.scp")
        # An end of −1 is that of the recording. The offset stands alone then.
        parts[name] = (recording, start, None if end == -1 else round(end - start, 6))
    return parts


def _read(file: Path) -> dict[str, str]:
    values: dict[str, str] = {}
    for number, name, value in _lines(file):
        if name in values:
            raise ValueError(f"{file}: line {number} names {name} a second time")
        values[name] = value
    return values


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yields (number of the line from 1, first word, rest of the line)."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not in UTF-8: convert it, as with iconv") from None
    for number, line in enumerate(lines, 1):
        if cells := line.split(maxsplit=1):
            yield number, cells[0], cells[1].strip() if len(cells) > 1 else ""
