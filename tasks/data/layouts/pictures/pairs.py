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
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from ....core.findings import Finding
from ...media import IMAGE_SUFFIXES
from ...parts import Parts, Piece
from ...wanted import FILE, Wanted
from ..masks import IMAGES, MASKS, FolderWords, cut_split, folder_words
from ..media_folders import every_file, from_rows
from ..passed_over import counted_suffixes, shown
from .siblings import holds_labels, sibling_masks
from .stems import chosen, cuts, mask_kind, picture_index, usual_ending

MASK = f"mask_{FILE}"
_FULL_ADE = re.compile(r"(.*/)?ADE_(train|val|frame)_\w+_seg\.png")


@dataclass(frozen=True)
class PictureFile:
    """A picture or a mask: its path relative to the source, and the words of its folder."""

    path: PurePosixPath
    words: FolderWords

    @property
    def stem(self) -> str:
        return self.path.name[: -len(self.path.suffix)]


@dataclass
class _Group:
    """Files whose folders have the same names but for the words that tell their roles."""

    images: list[PictureFile] = field(default_factory=list)
    masks: list[PictureFile] = field(default_factory=list)


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
    pictures = _with_roles(folder, files)
    if wanted.config.root is not None:
        inside = _files(every_file(root))
        pictures = [replace(p, words=replace(p.words, role="masks")) for p in pictures]
        pictures += [replace(p, words=replace(p.words, role="images")) for p in inside]
    pairs, alone = _paired(pictures)
    if not any(pairs.values()):
        raise ValueError(_no_pair(folder, files, pictures, alone))
    rows, findings = _rows(folder, pairs, alone)
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
    places: dict[tuple[str, ...], dict[str, list[PictureFile]]] = {}
    for image in images:
        # A mask without a split in its path may belong to a picture of any split.
        for part in {image.words.part, "any"}:
            stems = places.setdefault((part, *image.words.rest), {})
            stems.setdefault(image.stem, []).append(image)
    indices = {place: picture_index(list(stems)) for place, stems in places.items()}
    of_image: dict[PictureFile, dict[str, PictureFile]] = defaultdict(dict)
    alone = []
    for mask in masks:
        part = mask.words.part
        for place in ((part or "any", *mask.words.rest), ("", *mask.words.rest)):
            index = indices.get(place, {})
            if (cut := next((c for c in cuts(mask.stem) if c[0] in index), None)) is None:
                continue
            partners = places[place][index[cut[0]]]
            if len(partners) == 1:
                of_image[partners[0]].setdefault(cut[1], mask)
                break
        else:
            alone.append(mask)
    usual = usual_ending([end for ends in of_image.values() for end in ends])
    pairs: dict[PictureFile, PictureFile | None] = {}
    for image in images:
        ends = of_image.get(image, {})
        best = chosen(list(ends), usual)
        if len(best) > 1:
            raise ValueError(
                f"data.source: the picture {image.path} has several masks "
                f"({', '.join(str(ends[end].path) for end in best[:3])}): put all objects of a "
                "picture into one mask"
            )
        pairs[image] = ends[best[0]] if best else None
    return pairs, alone


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
                f"{len(left):,} pictures in {folder} are passed over, since nothing in their "
                f"folders has a mask ({_shown(left)})",
                "move them elsewhere, or name their masks like them",
            )
        )
    if alone:
        findings.append(
            Finding(
                f"{len(alone):,} masks in {folder} are passed over, since no picture has their "
                f"name ({_shown(alone)})",
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
        f"data.source: nothing in {folder} is a mask of a picture ({_shown(pictures)}): put the "
        "masks into a folder masks/ beside images/, under the names of the pictures, or write a "
        "metadata.csv with the columns file_name and mask_file_name"
    )


def _shown(pictures: Sequence[PictureFile]) -> str:
    return shown([str(picture.path) for picture in pictures])
