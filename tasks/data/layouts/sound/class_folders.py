"""Folders of recordings whose names say the class, the speaker or the split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ...parts import Parts, Piece
from ...wanted import Wanted
from ..media_folders import every_file, from_rows, media_files
from ..passed_over import SOUNDS, unread_findings

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
NOISE = "_background_noise_"  # long recordings to mix with the others
_SPEAKER = re.compile(r"id\d{5}")
_VOXCELEB_SPLITS = {"1": "train", "2": "validation", "3": "test"}
_DIALECT = re.compile(r"dr[1-8]", re.IGNORECASE)
_SENTENCE = re.compile(r"(s[aix])\d+", re.IGNORECASE)
_UNREAD = (".m4a", ".aac")


def speech_commands(wanted: Wanted, path: Path) -> Parts | None:
    """Reads Speech Commands: a folder for each word, and lists of the files of two splits."""
    listed = {split: path / name for split, name in LISTS.items() if (path / name).is_file()}
    if not path.is_dir() or not listed:
        return None
    split_of: dict[str, str] = {}
    for split, file in listed.items():
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                split_of[line.strip()] = split
    there = (PurePosixPath(name) for name in media_files(path))
    words = {str(name) for name in there if len(name.parts) == 2}
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in ("train", *listed)}
    for name in sorted(words | split_of.keys()):
        word, _, file_name = name.partition("/")
        if word != NOISE:
            row = {"file_name": name, "label": word, "speaker": file_name.split("_nohash_")[0]}
            rows[split_of.get(name, "train")].append(row)
    return _pieces(wanted, rows, path)


def voxceleb(wanted: Wanted, path: Path) -> Parts | None:
    """Reads VoxCeleb: SPEAKER/VIDEO/FILE in any folder; iden_split.txt gives the splits.

    Raises:
        ValueError: the recordings are in a format that is not read.
    """
    if not path.is_dir() or not _below(path, 3, _SPEAKER):
        return None
    files = [PurePosixPath(name) for name in media_files(path)]
    rows: dict[str, list[dict[str, Any]]] = {}
    splits = _voxceleb_splits(path / "iden_split.txt")
    for file in files:
        if len(file.parts) < 3 or not _SPEAKER.fullmatch(file.parts[-3]):
            continue
        split = splits.get("/".join(file.parts[-3:]), "" if not splits else "unlisted")
        row = {"file_name": str(file), "label": file.parts[-3], "video": file.parts[-2]}
        rows.setdefault(split, []).append(row)
    if not rows:
        coded = next((f for f in path.rglob("*") if f.suffix.lower() in _UNREAD), None)
        if coded is None:
            return None
        raise ValueError(
            f"data.source: {coded} is in a format that libsndfile does not read: convert such "
            f"files, as by ffmpeg -i {coded.name} {coded.stem}.flac"
        )
    return _pieces(wanted, rows, path)


def _voxceleb_splits(file: Path) -> Mapping[str, str]:
    if not file.is_file():
        return {}
    lines = (line.split() for line in file.read_text(encoding="utf-8").split("\n"))
    return {c[1]: _VOXCELEB_SPLITS[c[0]] for c in lines if len(c) == 2 and c[0] in _VOXCELEB_SPLITS}


def timit(wanted: Wanted, path: Path) -> Parts | None:
    """Reads TIMIT: TRAIN/DR1/FCJF0/SA1.WAV beside SA1.TXT; cases of names do not matter.

    `sentence` is SA (read by every speaker), SI or SX; the SA ones are often left out.
    """
    if not path.is_dir() or not _below(path, 3, _DIALECT):
        return None
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in media_files(path):
        file = PurePosixPath(name)
        kind = _SENTENCE.match(file.name)
        if len(file.parts) < 3 or kind is None or not _DIALECT.fullmatch(file.parts[-3]):
            continue
        split = file.parts[-4].lower() if len(file.parts) > 3 else ""
        known = rows.setdefault(split, [])
        sentence = file.name.split(".")[0]
        row = {
            "file_name": name,
            "text": _timit_text(path / file.parent, sentence),
            "speaker": file.parts[-2],
            "dialect": file.parts[-3],
            "sentence": kind[1].upper(),
        }
        # Some copies hold SA1.WAV (NIST) and the same recording as SA1.WAV.wav.
        before = known[-1]["file_name"] if known else ""
        if before.split(".")[0] == str(file.parent / sentence):
            known.pop()
        known.append(row)
    return _pieces(wanted, rows, path) if rows else None


def _timit_text(folder: Path, sentence: str) -> str:
    for suffix in (".TXT", ".txt"):
        file = folder / f"{sentence}{suffix}"
        if file.is_file():  # "0 46797 She had your dark suit …": first and last sample, text
            return " ".join(file.read_text(encoding="utf-8").split()[2:])
    return ""


def _below(folder: Path, depth: int, name: re.Pattern[str]) -> bool:
    """Returns whether a folder of this name, itself holding folders, lies at most `depth` below."""
    inside = _folders(folder)[:1000]
    if any(name.fullmatch(place.name) and _folders(place) for place in inside):
        return True
    if depth == 1:
        return False
    # Class folders are many; folders of splits and formats are few.
    return any(_below(place, depth - 1, name) for place in inside[:10])


def _folders(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]


def _pieces(wanted: Wanted, rows: Mapping[str, list[dict[str, Any]]], folder: Path) -> Parts:
    unread = [f for f in every_file(folder) if PurePosixPath(f).suffix.lower() in SOUNDS]
    findings = unread_findings(folder, unread)
    root = wanted.root(folder)
    return {
        split: [Piece(lambda some=some: from_rows(some), root, findings=findings)]  # type: ignore[misc]
        for split, some in rows.items()
        if some
    }
