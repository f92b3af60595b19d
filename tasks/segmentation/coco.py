"""Draws COCO's polygons and run-length encodings as masks with NumPy, equal to pycocotools' masks.

A mask is (H, W) bool. Run lengths go down the columns and begin with zeros. Coordinates are x, y in
pixels from the upper left corner. The rules are those of cocoapi's `maskApi.c`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.errors import BadRow

SCALE = 5  # outlines are traced on a grid that is finer than the pixels by this factor


def draw_segments(
    segments: Any,
    size: tuple[int, int],
    *,
    unsegmented: int = 0,
    crowd: int = 255,
    named: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Draws the category of each pixel; later segments cover earlier ones.

    Args:
        segments: COCO annotations, `[{"category_id", "segmentation"}, …]`, also as a dict of lists
            or as JSON text. A segmentation is a list of polygons `[x0, y0, x1, y1, …]` or
            an RLE `{"size": [H, W], "counts": list or compressed text}`. A `category_name` that
            `named` has comes before the id.
        size: (H, W) of the image.
        unsegmented: the id of pixels outside all segments.
        crowd: the id of segments with `iscrowd`.
        named: the ids of classes by name.

    Returns:
        (H, W) int64.

    Raises:
        BadRow: a segment is not valid, or belongs to another image size.
    """
    ids = np.full(size, unsegmented, dtype=np.int64)
    for number, segment in enumerate(_listed(segments)):
        try:
            mask = segment_mask(segment["segmentation"], size)
            ids[mask] = crowd if segment.get("iscrowd") else _category(segment, named or {})
        except BadRow as error:
            raise BadRow(f"segment {number}: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise BadRow(f"segment {number} has no category_id and segmentation") from None
    return ids


def _category(segment: Mapping[str, Any], named: Mapping[str, int]) -> int:
    name = segment.get("category_name")
    if isinstance(name, str) and name in named:
        return named[name]
    if name is not None and segment.get("category_id") is None:
        raise BadRow(f"its class {name!r} is none of {', '.join(named)}")
    return int(segment["category_id"])


def segment_mask(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """Draws a list of polygons (their union) or an RLE as (H, W) bool.

    A polygon of one or two corners covers no pixel.

    Raises:
        BadRow: the segmentation is neither, or has another size.
    """
    if isinstance(segmentation, Mapping):
        return _rle_mask(segmentation, size)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise BadRow("a segmentation is a list of polygons or an RLE with size and counts")
    mask = np.zeros(size, dtype=bool)
    for polygon in segmentation:
        if not _is_line(polygon):
            mask |= polygon_mask(polygon, size)
    return mask


def lines_among(segments: Any) -> list[int]:
    """Returns the numbers of the segments that cover nothing, since they have no polygon or consist
    of polygons of one or two corners.

    Raises:
        BadRow: the segments cannot be read.
    """
    numbers = []
    for number, segment in enumerate(_listed(segments)):
        polygons = segment.get("segmentation")
        if isinstance(polygons, list) and all(map(_is_line, polygons)):
            numbers.append(number)
    return numbers


def _is_line(polygon: Any) -> bool:
    return isinstance(polygon, Sequence) and len(polygon) in (2, 4)


def polygon_mask(polygon: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Draws one polygon `[x0, y0, x1, y1, …]` as (H, W) bool (`rleFrPoly`).

    Raises:
        BadRow: the polygon has fewer than three corners, or values that are no numbers.
    """
    try:
        corners = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadRow("a polygon holds values that are no numbers") from None
    if corners.ndim != 1 or corners.size < 6 or corners.size % 2:
        raise BadRow("a polygon needs three corners or more, as [x0, y0, x1, y1, …]")
    if not np.isfinite(corners).all():
        raise BadRow("a polygon has a corner that is not finite")
    height, width = size
    if np.abs(corners).max() > 10 * max(size):
        raise BadRow("a polygon has a corner far outside of the image")
    u, v = _outline(np.trunc(SCALE * corners.reshape(-1, 2) + 0.5).astype(np.int64))
    crossing = u[1:] != u[:-1]
    x = np.minimum(u[1:], u[:-1])[crossing]
    y = np.minimum(v[1:], v[:-1])[crossing]
    columns = (x + 0.5) / SCALE - 0.5
    there = (columns == np.floor(columns)) & (columns >= 0) & (columns <= width - 1)
    rows = np.ceil(np.clip((y[there] + 0.5) / SCALE - 0.5, 0, height)).astype(np.int64)
    toggles = np.bincount(columns[there].astype(np.int64) * height + rows, minlength=height * width)
    # The bottom of a column and the top of the next one are the same index.
    inside = np.cumsum(toggles[: height * width]) % 2 == 1
    return inside.reshape(width, height).T


def _outline(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y, (M,) each, of the fine grid's points along a polygon's edges (K, 2)."""
    start, end = corners, np.roll(corners, -1, axis=0)
    span = np.abs(end - start)
    steps = span.max(axis=1)
    steep = span[:, 0] < span[:, 1]
    along = np.where(steep, 1, 0)  # the axis along which an edge advances by one point
    edges = np.arange(len(corners))
    flip = start[edges, along] > end[edges, along]
    low = np.where(flip[:, None], end, start)
    high = np.where(flip[:, None], start, end)
    slope = (high - low)[edges, 1 - along] / np.maximum(steps, 1)
    edge = np.repeat(edges, steps + 1)
    first = np.cumsum(steps + 1) - (steps + 1)
    step = np.arange(len(edge)) - first[edge]
    step = np.where(flip[edge], steps[edge] - step, step)
    straight = low[edge, along[edge]] + step
    across = np.trunc(low[edge, 1 - along[edge]] + slope[edge] * step + 0.5).astype(np.int64)
    u = np.where(steep[edge], across, straight)
    v = np.where(steep[edge], straight, across)
    return u, v


def _rle_mask(rle: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    try:
        height, width = (int(side) for side in rle["size"])
        counts = rle["counts"]
        if isinstance(counts, str | bytes):
            counts = decode_counts(counts)
        counts = np.asarray(counts, dtype=np.int64)
    except (KeyError, TypeError, ValueError):
        raise BadRow("an RLE needs size [height, width] and counts") from None
    if (height, width) != tuple(size):
        raise BadRow(
            f"its RLE has {height}×{width} pixels, the image has {size[0]}×{size[1]} (height × "
            "width)"
        )
    if counts.ndim != 1 or (counts < 0).any() or counts.sum() != height * width:
        raise BadRow(f"the run lengths of its RLE do not sum to {height}×{width} pixels")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def decode_counts(text: str | bytes) -> np.ndarray:
    """Decodes the run lengths (K,) int64 of a compressed RLE (`rleFrString`).

    A number is a sequence of groups of five bits, the lowest first, written as characters from "0"
    on. A sixth bit marks that more groups follow. From the fourth number on, a number is the
    difference to the second number before it.

    Raises:
        ValueError: the text is cut off, or has characters that are not allowed.
    """
    data = text.encode() if isinstance(text, str) else bytes(text)
    groups = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not len(groups):
        return np.zeros(0, dtype=np.int64)
    if (groups < 0).any() or (groups > 63).any() or groups[-1] & 32:
        raise ValueError("the counts of an RLE are cut off or hold characters that do not belong")
    last = (groups & 32) == 0
    number = np.concatenate([[0], np.cumsum(last)[:-1]])
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(groups)) - starts[number]
    if place.max() > 11:
        raise ValueError("the counts of an RLE hold a number of more than 60 bits")
    values = np.zeros(number[-1] + 1, dtype=np.int64)
    np.add.at(values, number, (groups & 31) << (5 * place))
    negative = (groups[last] & 16) != 0
    values[negative] -= np.int64(1) << (5 * (place[last][negative] + 1))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def category_ids(segments: Any, *, unsegmented: int = 0) -> np.ndarray:
    """Returns the ids (K,) int64 that `draw_segments` may draw, without those of crowds.

    Raises:
        BadRow: a segment has no category.
    """
    try:
        ids = [int(s["category_id"]) for s in _listed(segments) if not s.get("iscrowd")]
    except (KeyError, TypeError, ValueError):
        raise BadRow("a segment has no category_id") from None
    return np.array([unsegmented, *ids], dtype=np.int64)


def category_names(segments: Any) -> list[str | None]:
    """Returns the names of the categories of segments, None where they say none; without crowds.

    Raises:
        BadRow: the segments cannot be read.
    """
    return [s.get("category_name") for s in _listed(segments) if not s.get("iscrowd")]


def _listed(segments: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(segments, str):
        try:
            segments = json.loads(segments)
        except ValueError:
            raise BadRow("the segments are text, but not valid JSON") from None
    if segments is None:
        raise BadRow("there are no segments")
    if isinstance(segments, Mapping):
        columns = {key: value for key, value in segments.items() if isinstance(value, Sequence)}
        lengths = {len(value) for value in columns.values()}
        if len(lengths) != 1:
            raise BadRow("the segments are lists of different lengths")
        rows = zip(*columns.values(), strict=True)
        segments = [dict(zip(columns, row, strict=True)) for row in rows]
    if not isinstance(segments, Sequence) or not all(isinstance(s, Mapping) for s in segments):
        raise BadRow("segments are a list of annotations with category_id and segmentation")
    yield from segments


def segments_extent(segments: Any) -> tuple[tuple[int, int] | None, tuple[float, float]]:
    """Returns the (H, W) that run-length encodings state (None if there are none), and the greatest
    y and x of all corners of polygons.

    Raises:
        BadRow: the segments cannot be read.
    """
    stated: tuple[int, int] | None = None
    low, right = 0.0, 0.0
    for segment in _listed(segments):
        shape = segment.get("segmentation")
        try:
            if isinstance(shape, Mapping):
                height, width = shape["size"]
                stated = int(height), int(width)
                continue
            for polygon in shape or ():
                corners = np.asarray(polygon, dtype=np.float64)
                if corners.ndim == 1 and corners.size >= 2:
                    right = max(right, float(corners[::2].max()))
                    low = max(low, float(corners[1::2].max()))
        except (KeyError, TypeError, ValueError):
            continue  # drawing says what is wrong
    return stated, (low, right)
