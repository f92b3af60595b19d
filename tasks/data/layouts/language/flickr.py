"""Captions of Flickr8k (Hodosh et al. 2013) and Flickr30k (Young et al. 2014).

| file                                      | a line                          |
|-------------------------------------------|---------------------------------|
| results_20130124.token, Flickr8k.token.txt | picture#number, a tab, caption |
| results.csv                               | picture, bar, number, bar, caption |
| captions.txt                              | picture, comma, caption         |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...media import MEDIA_SUFFIXES
from ...parts import Parts, Piece
from ...tables.encodings import read_text
from ...wanted import FILE, Wanted
from ..media_folders import from_rows
from .documents import has_tables, head, is_mapped, reads
from .image_folders import image_paths

if TYPE_CHECKING:
    from datasets import Dataset

_FILES = ("results_20130124.token", "results.csv", "captions.txt", "Flickr8k.token.txt")
_SUFFIXES = (".token", ".txt", ".csv")
_LISTS = (("train", "train"), ("validation", "dev"), ("test", "test"))  # split, its list's name
_TOKEN = re.compile(r"([^\t]+)#\d+\t(.*)")
# A line of the published results.csv lacks its second bar.
_BARS = re.compile(r"([^|]+?)\s*\|\s*(?:\d+\s*\|?\s*)?(.*)")
_HEADER = re.compile(
    r"(image|image_name)\s*([|,])\s*(?:comment_number\s*\2\s*)?(caption|comment)\s*"
)


def flickr(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the rows of a file of captions, one for each picture with all its `captions`.

    The lists Flickr_8k.*Images.txt beside it name the pictures of each split.
    """
    if not reads(wanted, "caption", "captions") or is_mapped(
        wanted, "image", "caption", "captions"
    ):
        return None
    if has_tables(path):
        return None
    file = path if path.is_file() else _inside(path)
    if file is None or file.suffix.lower() not in _SUFFIXES or not _is_flickr(wanted, file):
        return None
    return {"": [Piece(lambda: _read(wanted, file), file.parent)]}


def _inside(folder: Path) -> Path | None:
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")]
    files = (place / name for place in places for name in _FILES)
    return next((file for file in files if file.is_file()), None)


def _is_flickr(wanted: Wanted, file: Path) -> bool:
    first = head(wanted, file).lstrip().partition("\n")[0].rstrip("\r")
    token = _TOKEN.fullmatch(first)
    if token is not None:
        return Path(token[1]).suffix.lower() in MEDIA_SUFFIXES
    header = _HEADER.fullmatch(first.lower())
    # Other .csv files are tables.
    return header is not None and (file.suffix.lower() != ".csv" or "| comment_number|" in first)


def _read(wanted: Wanted, file: Path) -> Dataset:
    captions: dict[str, list[str]] = {}
    for name, caption in _lines(file, read_text(file, wanted.config.encoding)):
        captions.setdefault(name, []).append(caption)
    splits = _splits(wanted, file)
    names = [name for names in splits.values() for name in names] if splits else list(captions)
    by_name = {name: split for split, names in splits.items() for name in names}
    rows: list[dict[str, Any]] = []
    for name, path in zip(names, image_paths(wanted, file, names), strict=True):
        row = {FILE: path, "captions": captions.get(name, []), "image_id": name}
        rows.append(row | ({"split": by_name[name]} if splits else {}))
    return from_rows(rows)


def _lines(file: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yields (picture, caption) for each line."""
    lines = text.split("\n")
    header = _HEADER.fullmatch(lines[0].strip().lower())
    mark = header[2] if header else "\t"
    numbered = header is not None and "comment_number" in header[0]
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip() or (number == 1 and header):
            continue
        if mark == ",":
            name, _, caption = line.partition(",")
            caption = caption.partition(",")[2] if numbered else caption
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
        else:
            match = (_TOKEN if mark == "\t" else _BARS).fullmatch(line)
            name, caption = match.groups() if match else ("", "")
        if Path(name).suffix.lower() not in {*MEDIA_SUFFIXES, ".1"}:  # one name of Flickr8k
            raise ValueError(
                f"{file}: line {number} begins with no name of a picture: {line[:60]!r}"
            )
        yield name, caption.strip()


def _splits(wanted: Wanted, file: Path) -> dict[str, list[str]]:
    """Returns the pictures of each split for which a list is beside the file.

    Raises:
        ValueError: a picture is in two lists.
    """
    if not file.name.startswith("Flickr8k") and file.name != "captions.txt":
        return {}
    lists = {split: file.parent / f"Flickr_8k.{name}Images.txt" for split, name in _LISTS}
    splits: dict[str, list[str]] = {}
    seen: dict[str, Path] = {}
    for split, place in lists.items():
        if place.is_file():
            splits[split] = read_text(place, wanted.config.encoding).split()
            if twice := [name for name in splits[split] if name in seen]:
                raise ValueError(f"{seen[twice[0]]} and {place.name} both name {twice[0]}")
            seen |= dict.fromkeys(splits[split], place)
    return splits
