"""Outlines of objects in COCO's JSON (Lin et al. 2014), as published and as tools export it.

| source                                  | splits                                    |
|-----------------------------------------|-------------------------------------------|
| annotations/instances_*.json            | train2017, val2017, …, also by their kind |
| train/_annotations.coco.json (Roboflow) | train, valid, test                        |
| other .json files in annotations/ or in the folder | by the split in their names    |
| one such file                           | one                                       |
"""

from __future__ import annotations

import json
import mmap
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapters.errors import first_line

from ....core.files import is_system_entry
from ...parts import Parts, Piece
from ...splits import KNOWN
from ...tables.encodings import read_text
from ...tables.json_rows import invalid_json
from ...wanted import FILE, Wanted
from ..language.documents import as_text, has_tables, is_mapped, objects, split_in
from ..language.image_folders import image_paths
from ..media_folders import from_rows
from .asked import check_reads, has_mask_folder

if TYPE_CHECKING:
    from datasets import Dataset

ROBOFLOW = "_annotations.coco.json"
_OTHERS = ("person_keypoints_", "captions_", "image_info_", "panoptic_", "stuff_", "deprecated-")
_KEYS = (b'"images"', b'"annotations"', b'"categories"')
_OUTLINE = b'"segmentation"'
_FEW = 20  # more JSON files in one folder are one for each picture


def coco_instances(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a row for each picture, with its `segments`.

    Raises:
        ValueError: the task reads no segments, or the files hold boxes alone.
    """
    if is_mapped(wanted, "image", "segments", "mask"):
        return None
    files = _files(path)
    if not files or (path.is_dir() and (has_tables(path) or has_mask_folder(path))):
        return None
    check_reads(wanted, path, "as COCO's instances", "segments")
    named = {_name(path, file): file for file in files}
    if len(named) < len(files):
        raise ValueError(
            f"data.source: {path} has several files of outlines for one split: give one of "
            f"{', '.join(str(file.relative_to(path)) for file in files[:3])} as data.source"
        )
    pieces = {
        name: [Piece(partial(_read, wanted, file), wanted.root(file.parent))]
        for name, file in named.items()
    }
    if len(pieces) == 1 and not _is_split(path, files[0]):
        return {"": next(iter(pieces.values()))}
    # train2017 alone of its kind is also the split train.
    kinds = {name: split_in(name) for name in pieces}
    counts = Counter(kinds.values())
    aliases = {
        kind: pieces[name]
        for name, kind in kinds.items()
        if kind and counts[kind] == 1 and kind not in pieces
    }
    return pieces | aliases


def _is_split(path: Path, file: Path) -> bool:
    return path.is_dir() and file.parent != path and file.parent.name.lower() in KNOWN


def _files(path: Path) -> list[Path]:
    """Returns the files of outlines: the path itself, or those of a folder."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and _is_coco(path) else []
    splits = [p for p in sorted(path.iterdir()) if p.name.lower() in KNOWN and p.is_dir()]
    if exports := [p / ROBOFLOW for p in (*splits, path) if (p / ROBOFLOW).is_file()]:
        return exports
    for places in ([path / "annotations"], [path], splits):
        files = [file for place in places for file in json_files(place)]
        if named := [file for file in files if file.name.startswith("instances_")]:
            return named
        files = [file for file in files if not file.name.startswith(_OTHERS)]
        if files := [file for file in files if len(files) <= _FEW and _is_coco(file)]:
            return files
    return []


def json_files(folder: Path) -> list[Path]:
    """Returns the JSON files of a folder; none if there is no such folder."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [f for f in inside if f.suffix.lower() == ".json" and not is_system_entry(f.name)]


def _name(path: Path, file: Path) -> str:
    """Returns the name of the split of a file."""
    if path.is_file():
        return ""
    return file.parent.name if _is_split(path, file) else file.stem.removeprefix("instances_")


def _is_coco(file: Path) -> bool:
    """Returns whether a file has the keys of outlines; they may stand at its end."""
    try:
        with (
            open(file, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
                return False
            boxes = data.find(b'"bbox"') >= 0
            return all(data.find(k) >= 0 for k in _KEYS) and (boxes or data.find(_OUTLINE) >= 0)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return False


def _read(wanted: Wanted, file: Path) -> Dataset:
    """Returns the rows of a file; `categories` are the classes that a picture has, and its feature
    holds the names of all."""
    import datasets

    content = _document(wanted, file)
    images = objects(file, content, "images", "id", "file_name")
    notes = objects(file, content, "annotations", "image_id", "category_id")
    names = {
        c["id"]: as_text(c["name"]) for c in objects(file, content, "categories", "id", "name")
    }
    segments: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    outlined = False
    for number, note in enumerate(notes):
        where = f"{file}: annotations {number}"
        if note["image_id"] not in segments:
            raise ValueError(
                f"{where} is of the image {note['image_id']}, and no image has that id"
            )
        if note["category_id"] not in names:
            raise ValueError(
                f"{where} has the category {note['category_id']}, and no category has that id"
            )
        outline = note.get("segmentation") or []
        outlined = outlined or bool(outline)
        segments[note["image_id"]].append(
            {
                "category_id": note["category_id"],
                "category_name": names[note["category_id"]],
                "segmentation": outline,
                "iscrowd": int(bool(note.get("iscrowd"))),
            }
        )
    if notes and not outlined:
        raise ValueError(
            f"data.source: {file} has boxes alone, from which no masks can be made: export "
            "instance segmentation in COCO's format"
        )
    # Roboflow's category 0 is a heading of the others.
    there = {note["category_id"] for note in notes}
    headings = {c["id"] for c in content["categories"] if c.get("supercategory") == "none"}
    kept = {number: n for number, n in names.items() if number in there or number not in headings}
    classes = list(dict.fromkeys(kept[number] for number in sorted(kept)))
    paths = image_paths(wanted, file, *_namings(images))
    numbers = {name: number for number, name in enumerate(classes)}
    table = from_rows(
        [
            {
                FILE: path,
                "segments": json.dumps(segments[image["id"]]),
                "image_id": as_text(image["id"]),
                "height": _side(image.get("height")),
                "width": _side(image.get("width")),
                "categories": sorted({numbers[s["category_name"]] for s in segments[image["id"]]}),
            }
            for image, path in zip(images, paths, strict=True)
        ]
    )
    feature = datasets.List(datasets.ClassLabel(names=classes))
    return table.cast_column("categories", feature) if classes else table


def _document(wanted: Wanted, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(file, wanted.config.encoding))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {invalid_json(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no object with images, annotations and categories")
    return content


def _namings(images: list[dict[str, Any]]) -> list[list[str | None]]:
    """Returns the names that the pictures may have: with the folders of the file, or without."""
    names: list[str | None] = [as_text(image["file_name"]).replace("\\", "/") for image in images]
    return [names, [Path(name).name if name else None for name in names]]


def _side(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None
