"""LabelMe: a JSON file with the outlines beside each picture."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ....core.findings import Finding
from ...media import IMAGE_SUFFIXES
from ...parts import Parts, Piece
from ...splits import KNOWN
from ...tables.encodings import read_text
from ...tables.json_rows import invalid_json
from ...wanted import FILE, Wanted
from ..language.documents import has_tables, is_mapped
from ..masks import cut_split
from ..media_folders import every_file, from_rows
from ..passed_over import passed
from .asked import check_reads, has_mask_folder

_START = 4096  # bytes in which a file names its shapes
_LOOKED_AT = 20  # folders
_CORNERS = 64  # of a circle
_NAMES = {"_background_": "background"}
_IGNORED = "__ignore__"


def labelme(wanted: Wanted, path: Path) -> Parts | None:
    """Reads a row for each JSON file, with the polygons, rectangles, circles and masks in it.

    Raises:
        ValueError: the task reads no segments; or, when it is read, a file holds other shapes.
    """
    if not path.is_dir() or is_mapped(wanted, "image", "segments", "mask") or has_tables(path):
        return None
    reads = "segments" in wanted.columns
    if has_mask_folder(path) or not _is_labelme(path, everywhere=reads):
        return None
    files = every_file(path)
    notes = [file for file in files if file.lower().endswith(".json") and _is_note(path / file)]
    check_reads(wanted, path, "as LabelMe", "segments")
    splits: dict[str, list[str]] = {}
    for name in notes:
        splits.setdefault(cut_split(PurePosixPath(name).parts[:-1])[0], []).append(name)
    stems = {file.rpartition(".")[0] for file in notes}
    pictures = [file for file in files if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES]
    bare = [file for file in pictures if file.rpartition(".")[0] not in stems]
    findings: tuple[Finding, ...] = ()
    if bare:
        findings = (
            Finding(
                passed("picture", path, bare, "no JSON file has such a name"),
                "save a picture without objects in LabelMe, too, or move it elsewhere",
            ),
        )
    root = wanted.root(path)
    return {
        split: [Piece(partial(_rows, path, root, names), root, findings=findings)]
        for split, names in splits.items()
    }


def _is_labelme(path: Path, *, everywhere: bool) -> bool:
    """Returns whether one of the first JSON files of a folder, or of one in it, is LabelMe's.

    Args:
        everywhere: whether folders count that are named as no split. They may be classes.
    """
    inside = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    inside = [place for place in inside if everywhere or place.name.lower() in KNOWN]
    for place in (path, *inside[:_LOOKED_AT]):
        first = next((f for f in sorted(place.glob("*.json")) if f.name[0] != "."), None)
        if first is not None and _is_note(first):
            return True
    return False


def _is_note(file: Path) -> bool:
    with open(file, "rb") as stream:
        start = stream.read(_START)
        if b'"shapes"' not in start:
            return False
        # The picture itself may stand between the shapes and its name.
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - _START, 0))
        return b'"imagePath"' in start + stream.read()


def _rows(folder: Path, root: Path, names: Sequence[str]) -> Any:
    return from_rows([_row(folder, root, name) for name in names])


def _row(folder: Path, root: Path, name: str) -> dict[str, Any]:
    file = folder / name
    try:
        note = json.loads(read_text(file, None))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read: {invalid_json(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(note, dict) or not isinstance(note.get("shapes"), list):
        raise ValueError(f"{file} has no list 'shapes': save it in LabelMe again")
    size = note.get("imageHeight"), note.get("imageWidth")
    segments = [_segment(f"{file}: shape {i}", s, size) for i, s in enumerate(note["shapes"])]
    picture = str(note.get("imagePath", "")).replace("\\", "/")
    place = (root / name).parent
    path = place / picture
    if not path.is_file() and (place / PurePosixPath(picture).name).is_file():
        path = place / PurePosixPath(picture).name
    row = {FILE: str(path.absolute()), "segments": json.dumps(segments)}
    return row | {"height": size[0], "width": size[1]}


def _segment(where: str, shape: Any, size: tuple[Any, Any]) -> dict[str, Any]:
    """Returns a shape as a segment of COCO, its class by name."""
    try:
        label, points = str(shape["label"]), np.asarray(shape["points"], np.float64).reshape(-1, 2)
        kind = shape.get("shape_type") or "polygon"
        if kind == "mask":
            outline: Any = _run_lengths(shape["mask"], points, size)
        else:
            outline = [_polygon(kind, points)]
    except NotImplementedError as error:
        raise ValueError(
            f"{where} is a {error}, which covers no pixels: draw it as a polygon, or remove it"
        ) from None
    except (KeyError, TypeError, ValueError, IndexError, OSError):
        raise ValueError(f"{where} has no label and points that can be read: remove it") from None
    return {
        "category_name": _NAMES.get(label, label),
        "segmentation": outline,
        "iscrowd": int(label == _IGNORED),
    }


def _polygon(kind: str, points: np.ndarray) -> list[float]:
    """Returns the corners `[x0, y0, x1, y1, …]` of a shape."""
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[1]
        return [float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]
    if kind == "circle":
        centre, edge = points[0], points[1]
        radius = math.hypot(*(edge - centre))
        angles = np.arange(_CORNERS) * (2 * math.pi / _CORNERS)
        points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif kind not in ("polygon", "oriented_rectangle"):
        raise NotImplementedError(kind)
    return [float(value) for value in points.ravel()]


def _run_lengths(data: str, points: np.ndarray, size: tuple[Any, Any]) -> Mapping[str, Any]:
    """Returns the run lengths of a mask that covers a rectangle of a picture.

    Args:
        data: a PNG file in base64.
        points: (2, 2), the corners of the rectangle.
        size: (H, W) of the picture.
    """
    from PIL import Image

    height, width = int(size[0]), int(size[1])
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        inside = np.asarray(image) > 0
    x, y = (round(float(value)) for value in points.min(axis=0))
    mask = np.zeros((height, width), bool)
    mask[y : y + inside.shape[0], x : x + inside.shape[1]] = inside[: height - y, : width - x]
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(flat)) + 1
    bounds = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(bounds).tolist()
    return {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}
