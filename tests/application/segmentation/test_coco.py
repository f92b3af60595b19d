"""COCO segments are decoded as pycocotools does it; `pycocotools.json` is what it gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.segmentation.coco import (
    category_ids,
    decode_counts,
    draw_segments,
    polygon_mask,
    segment_mask,
)

CASES = json.loads(Path(__file__).with_name("pycocotools.json").read_text())["cases"]
SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]


def from_runs(runs: list[int], size: tuple[int, int]) -> np.ndarray:
    """Down the columns, a pixel at a time."""
    flat: list[bool] = []
    for number, run in enumerate(runs):
        flat += [number % 2 == 1] * run
    return np.array(flat).reshape(size[1], size[0]).T


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_polygons_and_both_forms_of_run_lengths_are_those_of_pycocotools(
    case: dict[str, Any],
) -> None:
    size = (case["size"][0], case["size"][1])
    truth = from_runs(case["runs"], size)
    assert np.array_equal(segment_mask(case["polygons"], size), truth)
    for counts in (case["counts"], case["runs"]):
        assert np.array_equal(segment_mask({"size": list(size), "counts": counts}, size), truth)


def encode(runs: list[int]) -> str:
    """The compressed form, a bit at a time, after cocoapi's description."""
    text = ""
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 32 * more + 48)
    return text


def test_compressed_counts_of_any_size_come_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        runs = (2 ** rng.uniform(0, 30, size=rng.integers(1, 40))).astype(int).tolist()
        assert decode_counts(encode(runs)).tolist() == runs
    assert decode_counts("").tolist() == []


def test_a_rectangle_covers_the_pixels_whose_centres_it_holds() -> None:
    mask = polygon_mask(SQUARE, (6, 8))
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 2:6] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    "form",
    [
        lambda rows: rows,
        json.dumps,
        lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    ],
    ids=["list", "JSON text", "dict of lists, as datasets makes of it"],
)
def test_later_segments_lie_on_top_and_crowds_are_ignored(form: Any) -> None:
    rows = [
        {"category_id": 3, "segmentation": [SQUARE], "iscrowd": 0},
        {"category_id": 5, "segmentation": [[4, 0, 8, 0, 8, 6, 4, 6]], "iscrowd": 0},
        {"category_id": 3, "segmentation": [[0, 5, 8, 5, 8, 6, 0, 6]], "iscrowd": 1},
    ]
    ids = draw_segments(form(rows), (6, 8), unsegmented=9, crowd=255)
    expected = np.full((6, 8), 9)
    expected[1:4, 2:6] = 3
    expected[:, 4:] = 5
    expected[5] = 255
    assert np.array_equal(ids, expected)
    assert sorted(set(category_ids(form(rows), unsegmented=9).tolist())) == [3, 5, 9]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "no segments"),
        ("[{", "not valid JSON"),
        ([1, 2], "list of annotations"),
        ({"category_id": [1], "segmentation": []}, "different lengths"),
        ([{"segmentation": [SQUARE]}], "segment 0 has no category_id"),
        ([{"category_id": 1, "segmentation": [[1]]}], "segment 0: a polygon needs three"),
        ([{"category_id": 1, "segmentation": [[1, 2, 3, 4, 5]]}], "three corners"),
        ([{"category_id": 1, "segmentation": [[1, 2, 3, 4, 5, "x"]]}], "no numbers"),
        ([{"category_id": 1, "segmentation": [[1, 2, 3, 4, 5, float("nan")]]}], "not finite"),
        ([{"category_id": 1, "segmentation": [[1, 2, 3, 4, 5, 1e9]]}], "far outside"),
        ([{"category_id": 1, "segmentation": "poly"}], "list of polygons or an RLE"),
        ([{"category_id": 1, "segmentation": {"counts": [48]}}], "needs size"),
        (
            [{"category_id": 1, "segmentation": {"size": [8, 6], "counts": [48]}}],
            "8×6 pixels, the image has 6×8",
        ),
        (
            [{"category_id": 1, "segmentation": {"size": [6, 8], "counts": [40]}}],
            "do not sum to 6×8",
        ),
        ([{"category_id": 1, "segmentation": {"size": [6, 8], "counts": "\x01"}}], "counts"),
        ([{"category_id": 1, "segmentation": {"size": [6, 8], "counts": "o"}}], "counts"),
    ],
)
def test_what_is_wrong_with_a_segment_is_told(segments: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        draw_segments(segments, (6, 8))
