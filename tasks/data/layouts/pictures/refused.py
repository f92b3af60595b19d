"""Layouts of segmentation that are recognised and not read: each says how to convert it.

| layout                         | why                                                     |
|--------------------------------|---------------------------------------------------------|
| YOLO: images/ and labels/*.txt | its polygons are relative to sizes that are not in them |
| panoptic COCO                  | its masks hold ids of segments in three channels        |
"""

from __future__ import annotations

import re
from pathlib import Path

from ....core.files import is_system_entry
from ...parts import Parts
from ...splits import KNOWN
from ...wanted import Wanted
from ..language.documents import has_tables
from ..masks import folder_words
from .coco_instances import json_files

_YOLO_LINE = re.compile(r"\d+(?:\s+-?[\d.]+(?:e-?\d+)?)+")
_LOOKED_AT = 20  # files of a folder
_SUPERVISION = (
    "supervision's DetectionDataset.from_yolo(…, force_masks=True) reads it and as_coco(…) writes "
    "COCO's JSON, which is read here"
)


def refused_layouts(wanted: Wanted, path: Path) -> Parts | None:
    """Returns None for a path in none of these layouts.

    Raises:
        ValueError: it is in one of them.
    """
    if not path.is_dir() or has_tables(path):
        return None
    if file := _yolo_label(path):
        lines = file.read_text(encoding="utf-8", errors="replace").strip().split("\n")
        boxes = all(len(line.split()) == 5 for line in lines)
        remedy = "of boxes, from which no masks can be made: draw outlines"
        raise ValueError(
            f"data.source: {file} has labels as YOLO writes them, "
            f"{remedy if boxes else f'which are not read: {_SUPERVISION}'}"
        )
    if not {"mask", "segments"} & set(wanted.columns):
        return None
    panoptic = [f for p in (path, path / "annotations") for f in json_files(p)]
    if any(file.name.startswith("panoptic_") for file in panoptic):
        raise ValueError(
            f"data.source: {path} holds COCO's panoptic annotations, which are not read: convert "
            "them by panopticapi's converters/panoptic2semantic_segmentation.py"
        )
    return None


def _yolo_label(path: Path) -> Path | None:
    """Returns a file of labels of YOLO, in a folder of labels beside one of images."""
    splits = [p for p in path.iterdir() if p.name.lower() in KNOWN and p.is_dir()]
    for place in (path, *sorted(splits)):
        labels = place / "labels"
        others = [p for p in place.iterdir() if p.is_dir() and p.name != "labels"]
        roles = {folder_words([other.name]).role for other in others}
        if not labels.is_dir() or "images" not in roles or "masks" in roles:
            continue
        for folder in (labels, *sorted(p for p in labels.iterdir() if p.is_dir())):
            for file in sorted(folder.glob("*.txt"))[:_LOOKED_AT]:
                if is_system_entry(file.name):
                    continue
                lines = file.read_text(encoding="utf-8", errors="replace").strip().split("\n")
                if all(_YOLO_LINE.fullmatch(line.strip()) for line in lines):
                    return file
    return None
