"""LibriSpeech: SUBSET/SPEAKER/CHAPTER/*.flac with the transcripts of a chapter in one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...media import AUDIO_SUFFIXES
from ...parts import Parts, Piece
from ...splits import KNOWN
from ...wanted import Wanted
from ..media_folders import from_rows

TRANSCRIPTS = "*/*/*.trans.txt"


def librispeech(wanted: Wanted, path: Path) -> Parts | None:
    """Reads LibriSpeech, or one of its subsets.

    Every subset is a split (train-clean-100). The subsets of one kind together are another:
    train, dev and test.
    """
    if not path.is_dir():
        return None
    if _is_subset(path):
        return {"": [_piece(wanted, path)]}
    for folder in (path, path / "LibriSpeech"):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        subsets = [place for place in inside if place.is_dir() and _is_subset(place)]
        if subsets:
            break
    else:
        return None
    parts: Parts = {place.name: [_piece(wanted, place)] for place in subsets}
    for place in subsets:
        kind = place.name.split("-")[0].lower()
        if kind in KNOWN and kind != place.name:
            parts.setdefault(kind, []).append(_piece(wanted, place))
    return parts


def _is_subset(folder: Path) -> bool:
    return next(folder.glob(TRANSCRIPTS), None) is not None


def _piece(wanted: Wanted, folder: Path) -> Piece:
    return Piece(lambda: from_rows(list(_rows(folder))), wanted.root(folder))


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for each recording and each transcript, also where the other is missing."""
    chapters = {file.parent for file in folder.glob("*/*/*") if _is_recording(file)}
    chapters |= {file.parent for file in folder.glob(TRANSCRIPTS)}
    for chapter in sorted(chapters):
        texts = {}
        for file in sorted(chapter.glob("*.trans.txt")):
            for line in file.read_text(encoding="utf-8").split("\n"):
                name, _, text = line.strip().partition(" ")
                if name:
                    texts[name] = text
        files = {file.stem: file.name for file in chapter.iterdir() if _is_recording(file)}
        for name in sorted(files.keys() | texts.keys()):
            place = chapter.relative_to(folder).as_posix()
            yield {
                "audio": f"{place}/{files.get(name, f'{name}.flac')}",
                "text": texts.get(name, ""),
                "id": name,
                "speaker": chapter.parent.name,
                "chapter": chapter.name,
                "subset": folder.name,
            }


def _is_recording(file: Path) -> bool:
    return file.suffix.lower() in AUDIO_SUFFIXES and not file.name.startswith(".")
