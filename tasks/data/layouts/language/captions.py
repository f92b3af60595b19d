"""Captions of COCO (Chen et al. 2015), and the splits of Karpathy and Fei-Fei (2015)."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...parts import Parts, Piece
from ...wanted import FILE, Wanted
from ..media_folders import from_rows
from .documents import (
    as_text,
    document,
    file_parts,
    has_tables,
    head,
    is_mapped,
    json_files,
    objects,
    reads,
    split_name,
)
from .image_folders import image_paths

if TYPE_CHECKING:
    from datasets import Dataset


def coco_captions(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the splits of captions_*.json, in a folder or in its folder annotations, or those of
    one such file of any name: a row for each picture with all its `captions`."""
    if not reads(wanted, "caption", "captions") or has_tables(path):
        return None
    if path.is_dir():
        for place in (path / "annotations", path):
            files = json_files(place) if place.is_dir() else []
            if files := [file for file in files if file.name.lower().startswith("captions_")]:
                break
    else:
        files = [file for file in json_files(path) if _is_coco(wanted, file)]
    if not files:
        return None
    return file_parts(files, partial(_coco, wanted))


def _is_coco(wanted: Wanted, file: Path) -> bool:
    start = head(wanted, file)
    if not start.lstrip().startswith("{") or '"sentences"' in start:
        return False
    if '"images"' not in start and '"annotations"' not in start and '"info"' not in start:
        return False
    whole = file.read_bytes()  # the captions may stand behind all pictures
    return all(key in whole for key in (b'"images"', b'"annotations"', b'"caption"'))


def _coco(wanted: Wanted, file: Path) -> Dataset:
    content = document(wanted, file)
    images = objects(file, content, "images", "id", "file_name")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
    notes = objects(file, content, "annotations", "image_id", "caption")
    for number, note in enumerate(notes):
        if note["image_id"] not in captions:
            raise ValueError(
                f"{file}: annotation {number} is of the image {note['image_id']}, and no image has "
                "that id"
            )
        captions[note["image_id"]].append(as_text(note["caption"]))
    names = [as_text(image["file_name"]) for image in images]
    paths = image_paths(wanted, file, names, [Path(name).name for name in names])
    return from_rows(
        [
            {FILE: path, "captions": captions[image["id"]], "image_id": as_text(image["id"])}
            for image, path in zip(images, paths, strict=True)
        ]
    )


def karpathy(wanted: Wanted, path: Path) -> Parts | None:
    """Returns the rows of Karpathy's dataset_*.json, which names the split of each picture."""
    if (
        not reads(wanted, "caption", "captions")
        or is_mapped(wanted, "captions")
        or has_tables(path)
    ):
        return None
    files = json_files(path)
    if path.is_dir():
        files = [file for file in files if file.name.startswith("dataset")]
    files = [file for file in files if _is_karpathy(head(wanted, file))]
    if not files:
        return None
    if len(files) > 1:
        raise ValueError(
            f"data.source: {path} has {files[0].name} and {files[1].name}: give one of them as "
            "data.source, and the folder of its pictures as data.root"
        )
    return {"": [Piece(lambda: _karpathy(wanted, files[0]), files[0].parent)]}


def _is_karpathy(start: str) -> bool:
    return start.lstrip().startswith("{") and '"images"' in start and '"sentences"' in start


def _karpathy(wanted: Wanted, file: Path) -> Dataset:
    images = objects(file, document(wanted, file), "images", "filename", "sentences", "split")
    rows: dict[str, list[Any]] = defaultdict(list)
    for number, image in enumerate(images):
        sentences = image["sentences"]
        if not isinstance(sentences, list) or not all(
            isinstance(some, dict) and isinstance(some.get("raw"), str) for some in sentences
        ):
            raise ValueError(f"{file}: images {number} has sentences without the text 'raw'")
        rows["captions"].append([sentence["raw"] for sentence in sentences])
        rows["image_id"].append(as_text(image.get("cocoid", image.get("imgid", number))))
        rows["split"].append(split_name(as_text(image["split"])))
    flat = [as_text(image["filename"]) for image in images]
    nested = [
        "/".join(filter(None, (as_text(image.get("filepath")), name)))
        for image, name in zip(images, flat, strict=True)
    ]
    rows[FILE] = image_paths(wanted, file, nested, flat)
    return from_rows(
        [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    )
