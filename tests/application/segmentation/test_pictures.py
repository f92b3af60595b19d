"""Palettes, overlays, error maps and files of masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmadapters.tasks.data.media import read_mask
from mmadapters.tasks.segmentation import pictures

# The first colours of VOC's development kit: background, aeroplane, bicycle, … and the border.
VOC = {
    0: (0, 0, 0),
    1: (128, 0, 0),
    2: (0, 128, 0),
    3: (128, 128, 0),
    15: (192, 128, 128),
    20: (0, 64, 128),
    255: (224, 224, 192),
}


def test_default_colours_are_vocs() -> None:
    colours = pictures.voc_colours(256)
    assert {number: tuple(colours[number]) for number in VOC} == VOC
    assert len(np.unique(colours, axis=0)) == 256
    own = pictures.colours_of(("a", "b"), {"b": (1, 2, 3)})
    assert own.tolist() == [[0, 0, 0], [1, 2, 3]]


@pytest.mark.parametrize("count", [3, 300])
def test_a_written_mask_holds_the_ids(count: int, tmp_path: Path) -> None:
    classes = np.arange(12).reshape(3, 4) % count
    classes[0, 0] = count - 1
    path = tmp_path / "mask.png"
    colours = pictures.voc_colours(count)
    pictures.write_mask(path, classes, colours)
    assert np.array_equal(read_mask(path), classes)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]
    if count <= 256:
        with Image.open(path) as image:
            assert image.mode == "P"
            assert np.array_equal(np.asarray(image.convert("RGB")), colours[classes])


def test_an_overlay_leaves_the_background_as_it_is() -> None:
    image = Image.fromarray(np.full((2, 2, 3), 100, dtype=np.uint8))
    classes = np.array([[0, 1], [2, 255]])
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 50]], dtype=np.uint8)
    mixed = pictures.overlay(image, classes, colours, clear=0)
    assert mixed[0, 0].tolist() == [100, 100, 100]
    assert mixed[0, 1].tolist() == [150, 50, 50]
    assert mixed[1, 0].tolist() == [50, 50, 75]
    assert mixed[1, 1].tolist() == [114, 114, 114]


def test_an_error_map_has_three_colours() -> None:
    found = pictures.errors(np.array([[0, 1, 1]]), np.array([[0, 0, 255]]), 255)
    expected = [list(pictures.RIGHT), list(pictures.WRONG), list(pictures.IGNORED)]
    assert found[0].tolist() == expected


def test_a_comparison_is_a_png_of_all_panels() -> None:
    panel = np.zeros((40, 60, 3), dtype=np.uint8)
    data = pictures.comparison({"image": panel, "truth": panel}, {"thing": (255, 0, 0)})
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        assert image.width > 1.5 * image.height
        assert (np.asarray(image.convert("RGB")) == (255, 0, 0)).all(axis=2).any()
