"""Folders of pictures and masks without a table, paired by name.

| data set                | pictures                     | masks                                |
|-------------------------|------------------------------|--------------------------------------|
| any                     | images/, images/train/, train/images/ | masks/, labels/, … likewise |
| mmsegmentation          | img_dir/train/               | ann_dir/train/, also _labelTrainIds  |
| ADE20K (scene parsing)  | images/training/             | annotations/training/                |
| Carvana                 | train/                       | train_masks/ (_mask.gif)             |
| any two sibling folders | files of the same names      | the one whose files have one channel |
| one folder              | a.jpg                        | a_mask.png, a.png                    |
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ....core.findings import Finding
from ...media import IMAGE_SUFFIXES
from ...parts import Parts, Piece
from ...wanted import FILE, Wanted
from ..masks import IMAGES, MASKS, FolderWords, cut_split, folder_words
from ..media_folders import every_file, from_rows
from ..passed_over import counted_suffixes, passed, shown, unread_findings
from .siblings import holds_labels, sibling_masks
from .stems import chosen, cuts, is_strange, mask_kind, picture_index, usual_ending

MASK = f"mask_{FILE}"
_FULL_ADE = re.compile(r"(.*/)?ADE_(train|val|frame)_\w+_seg\.png")

# The split and the other names of a folder of pictures.
_Place = tuple[str, ...]
_ANY = "/any"  # the pictures of all splits, for masks whose path names none
_BESIDE = "/beside"  # a folder of any name beside that of the masks


@dataclass(frozen=True)
class PictureFile:
    """A picture or a mask: its path relative to the source, and the words of its folder."""

    path: PurePosixPath
    words: FolderWords

    @property
    def stem(self) -> str:
        return self.path.name[: -len(self.path.suffix)]


def mask_parts(wanted: Wanted, folder: Path, files: Sequence[str]) -> Parts | None:
    """Returns a row for each picture, with its mask or None, by split; None if the task reads no
    masks, and no folders are called images and masks.

    With `data.root`, the pictures are those in that folder.

    Raises:
        ValueError: no picture has a mask, or one has several.
    """
    reads = not wanted.columns.keys().isdisjoint(("mask", "segments"))
    if not reads and not _is_named(files):
        return None
    if coded := next((file for file in files if _FULL_ADE.fullmatch(file)), None):
        raise ValueError(
            f"data.source: {coded} is a mask of the full ADE20K, which holds classes in two "
            "channels: use the release ADEChallengeData2016, with data.reduce_zero_label: true"
        )
    root = wanted.root(folder)
    if wanted.config.root is None:
        pictures = _with_roles(folder, files)
    else:
        inside = _files(every_file(root))
        pictures = [replace(p, words=replace(p.words, role="masks")) for p in _files(files)]
        pictures += [replace(p, words=replace(p.words, role="images")) for p in inside]
    pairs, alone = _paired(pictures)
    if not any(pairs.values()):
        raise ValueError(_no_pair(folder, files, pictures, alone))
    rows, findings = _rows(folder, pairs, alone)
    findings += unread_findings(folder, _unread(files, pairs))
    if wanted.config.root is not None:
        start = folder.absolute().as_posix()
        for row in (row for some in rows.values() for row in some if row[MASK] is not None):
            row[MASK] = f"{start}/{row[MASK]}"
    return {
        split: [Piece(lambda some=some: from_rows(some), root, findings=findings)]  # type: ignore[misc]
        for split, some in rows.items()
    }


def _is_named(files: Iterable[str]) -> bool:
    """Returns whether folders of files are called images and masks."""
    tops = {rest[0].lower() for f in files if (rest := cut_split(PurePosixPath(f).parts[:-1])[1])}
    return not tops.isdisjoint((*IMAGES, "img_dir")) and not tops.isdisjoint((*MASKS, "ann_dir"))


def _files(files: Iterable[str]) -> list[PictureFile]:
    words = cache(folder_words)
    paths = (PurePosixPath(file) for file in files)
    return [
        PictureFile(path, words(path.parts[:-1]))
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]


def _with_roles(folder: Path, files: Sequence[str]) -> list[PictureFile]:
    """Returns the pictures and masks; where no folder is called masks, other things tell them."""
    pictures = _files(files)
    if any(picture.words.role == "masks" for picture in pictures):
        return pictures
    by_folder: dict[PurePosixPath, dict[str, list[PictureFile]]] = defaultdict(dict)
    for picture in pictures:
        by_folder[picture.path.parent].setdefault(picture.stem, []).append(picture)
    words: dict[PurePosixPath, FolderWords] = {}
    known: dict[tuple[str, ...], int | None] = {}
    for stems in by_folder.values():
        for stem, same in stems.items():
            if mask_kind(stem, stems):
                words |= {p.path: replace(p.words, role="masks") for p in same}
            elif len(same) == 2 and (mask := _labels(folder, same, known)):  # a.jpg and a.png
                words[mask.path] = replace(mask.words, role="masks")
    words = words or sibling_masks(folder, [(p.path, p.words) for p in pictures])
    return [replace(p, words=words.get(p.path, p.words)) for p in pictures]


def _labels(
    folder: Path, same: Sequence[PictureFile], known: dict[tuple[str, ...], int | None]
) -> PictureFile | None:
    """Returns the mask of two files of the same stem, or None; the first two of each pair of
    suffixes are opened.

    Args:
        known: the place of the mask by the suffixes; it is added to.
    """
    suffixes = tuple(picture.path.suffix.lower() for picture in same)
    if suffixes not in known:
        labels = [holds_labels(folder / picture.path) for picture in same]
        known[suffixes] = labels.index(True) if labels.count(True) == 1 else None
    place = known[suffixes]
    return None if place is None else same[place]


def _paired(
    pictures: Iterable[PictureFile],
) -> tuple[dict[PictureFile, PictureFile | None], list[PictureFile]]:
    """Returns the mask of each picture, and the masks that belong to none.

    Raises:
        ValueError: a picture has several masks.
    """
    images = [picture for picture in pictures if picture.words.role != "masks"]
    masks = [picture for picture in pictures if picture.words.role == "masks"]
    places: dict[_Place, dict[str, list[PictureFile]]] = {}
    for image in images:
        words = image.words
        for part in {words.part, _ANY}:
            rests = [(part, *words.rest)]
            if words.role is None and words.rest:
                rests.append((part, _BESIDE, *words.rest[1:]))
            for place in rests:
                places.setdefault(place, {}).setdefault(image.stem, []).append(image)
    indices = {place: picture_index(list(stems)) for place, stems in places.items()}
    of_image: dict[PictureFile, dict[str, list[PictureFile]]] = defaultdict(dict)
    alone = []
    for mask in masks:
        partners, ending = _partners(mask, places, indices)
        if len(partners) > 1:
            raise ValueError(
                f"data.source: the mask {mask.path} fits several pictures "
                f"({shown(_names(partners))}): leave one of them there"
            )
        if partners:
            of_image[partners[0]].setdefault(ending, []).append(mask)
        else:
            alone.append(mask)
    usual = usual_ending([end for ends in of_image.values() for end in ends])
    pairs: dict[PictureFile, PictureFile | None] = {}
    for image in images:
        ends = of_image.get(image, {})
        best = [mask for end in chosen(list(ends), usual) for mask in ends[end]]
        if len(best) > 1:
            raise ValueError(
                f"data.source: the picture {image.path} has several masks "
                f"({shown(_names(best))}): put all objects of a picture into one mask"
            )
        pairs[image] = best[0] if best else None
        alone += [mask for end in ends if is_strange(end, usual) for mask in ends[end]]
    return pairs, alone


def _partners(
    mask: PictureFile,
    places: Mapping[_Place, Mapping[str, list[PictureFile]]],
    indices: Mapping[_Place, Mapping[str, str]],
) -> tuple[list[PictureFile], str]:
    """Returns the pictures that a mask fits, and the ending of its name."""
    parts = (mask.words.part or _ANY, "")
    rest = mask.words.rest
    for place in (*((p, *rest) for p in parts), *((p, _BESIDE, *rest) for p in parts)):
        index = indices.get(place, {})
        for base, ending in cuts(mask.stem):
            if base in index:
                return places[place][index[base]], ending
    return [], ""


def _rows(
    folder: Path,
    pairs: Mapping[PictureFile, PictureFile | None],
    alone: Sequence[PictureFile],
) -> tuple[dict[str, list[dict[str, Any]]], tuple[Finding, ...]]:
    """Returns the rows by split, and what is suspicious about files that are in none."""
    with_masks = {image.path.parent for image, mask in pairs.items() if mask is not None}
    split_of = {
        image: image.words.split or (mask.words.split if mask else "")
        for image, mask in pairs.items()
    }
    masked = {split_of[image] for image, mask in pairs.items() if mask is not None}
    rows: dict[str, list[dict[str, Any]]] = {}
    left: list[PictureFile] = []
    for image, mask in pairs.items():
        split = split_of[image]
        part = image.words.part
        if split not in masked and part in ("test", "validation"):
            continue  # published without masks
        if mask is None and image.words.role is None and image.path.parent not in with_masks:
            left.append(image)
            continue
        row = {FILE: str(image.path), MASK: None if mask is None else str(mask.path)}
        rows.setdefault(split, []).append(row)
    findings = []
    if left:
        findings.append(
            Finding(
                passed("picture", folder, _names(left), "nothing in the same folder has a mask"),
                "move them elsewhere, or name their masks like them",
            )
        )
    if alone:
        findings.append(
            Finding(
                passed("mask", folder, _names(alone), "no picture has such a name"),
                "name each picture like its mask",
            )
        )
    return rows, tuple(findings)


def _no_pair(
    folder: Path,
    files: Sequence[str],
    pictures: Sequence[PictureFile],
    masks: Sequence[PictureFile],
) -> str:
    """Returns the sentence for a folder in which no picture has a mask."""
    images = [picture for picture in pictures if picture.words.role != "masks"]
    if images and masks:
        several = len(masks) > len(images)
        advice = "put all objects of a picture into one mask of its name, " if several else ""
        return (
            f"data.source: no image and mask have the same name ({images[0].path}, "
            f"{masks[0].path}): {advice or 'name them alike, '}or write a metadata.csv"
        )
    if not pictures:
        there = f"; it has {counted_suffixes(files)}" if files else ""
        return f"data.source: the folder {folder} holds no picture that can be read{there}"
    return (
        f"data.source: nothing in {folder} is a mask of a picture ({shown(_names(pictures))})"
        f"{_unread_masks(files)}: put the masks into a folder masks/ beside images/, under the "
        "names of the pictures, or write a metadata.csv with the columns file_name and "
        "mask_file_name"
    )


def _unread(files: Sequence[str], pairs: Mapping[PictureFile, PictureFile | None]) -> list[str]:
    """Returns the files that are no pictures, in folders of pictures and masks that are read."""
    read = {p for pair in pairs.items() if pair[1] is not None for p in pair if p is not None}
    folders = {str(picture.path.parent) for picture in read}
    return [
        file
        for file in files
        if file.rpartition("/")[0] in folders and not file.lower().endswith(IMAGE_SUFFIXES)
    ]


def _unread_masks(files: Sequence[str]) -> str:
    """Returns the words for files in folders of masks that are no pictures, or ""."""
    unread = [
        file
        for file in files
        if folder_words(PurePosixPath(file).parts[:-1]).role == "masks"
        and PurePosixPath(file).suffix.lower() not in IMAGE_SUFFIXES
    ]
    return f"; {counted_suffixes(unread)} among the masks are not read" if unread else ""


def _names(pictures: Sequence[PictureFile]) -> list[str]:
    return [str(picture.path) for picture in pictures]
