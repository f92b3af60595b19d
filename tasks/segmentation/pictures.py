"""Draws class maps as pictures: palettes, overlays, error maps, indexed PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmadapters.files import replacing_file

from ..core.plots import figure_png

OPACITY = 0.5
RIGHT, WRONG, IGNORED = (46, 125, 80), (214, 39, 40), (128, 128, 128)

Colours = np.ndarray  # (C, 3) uint8


def colours_of(classes: Sequence[str], palette: Mapping[str, Sequence[int]]) -> Colours:
    """Returns (C, 3) uint8: the palette's colours, or those of PASCAL VOC for other classes."""
    colours = voc_colours(len(classes))
    for number, name in enumerate(classes):
        if name in palette:
            colours[number] = palette[name]
    return colours


def voc_colours(count: int) -> Colours:
    """Returns (count, 3) uint8, the colour map of PASCAL VOC's development kit: black, dark red, …

    The bits of a number, three at a time, become the highest bits of red, green and blue.
    """
    numbers = np.arange(count)
    colours = np.zeros((count, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(
                np.uint8
            )
    return colours


def painted(classes: np.ndarray, colours: Colours) -> np.ndarray:
    """Colours class ids (H, W) as (H, W, 3) uint8; ids without a colour (ignored) are grey."""
    table = np.concatenate([colours, np.array([IGNORED], dtype=np.uint8)])
    return table[np.minimum(classes.astype(np.int64), len(colours))]


def overlay(
    image: Image.Image, classes: np.ndarray, colours: Colours, *, clear: int | None = None
) -> np.ndarray:
    """Blends a picture with the colours of its classes, (H, W, 3) uint8.

    Args:
        classes: (H, W) class ids.
        clear: a class whose pixels are not coloured, or None.
    """
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    mixed = (1 - OPACITY) * picture + OPACITY * painted(classes, colours)
    if clear is not None:
        mixed = np.where((classes == clear)[:, :, None], picture, mixed)
    return mixed.round().astype(np.uint8)


def errors(prediction: np.ndarray, truth: np.ndarray, ignore: int) -> np.ndarray:
    """Marks right pixels green, wrong ones red and ignored ones grey, (H, W, 3) uint8."""
    picture = np.where((prediction == truth)[:, :, None], RIGHT, WRONG)
    return np.where((truth == ignore)[:, :, None], IGNORED, picture).astype(np.uint8)


def write_mask(path: Path, classes: np.ndarray, colours: Colours) -> None:
    """Writes an indexed PNG with the colours of the classes, or 16-bit grey above 256 classes."""
    if len(colours) > 256:
        image = Image.fromarray(classes.astype(np.uint16))
    else:
        image = Image.fromarray(classes.astype(np.uint8), mode="P")
        image.putpalette(colours.tobytes())
    write_png(path, image)


def write_png(path: Path, image: Image.Image) -> None:
    """Writes a PNG; the file is complete or absent."""
    with replacing_file(path) as temporary:
        image.save(temporary, format="PNG")


def comparison(panels: Mapping[str, np.ndarray], legend: Mapping[str, Sequence[int]]) -> bytes:
    """Draws pictures of one size side by side with titles and a legend; returns PNG data."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = next(iter(panels.values())).shape[:2]
    side = 2.8
    tall = min(max(side * height / width, 1.0), 6.0)
    figure = Figure(figsize=(side * len(panels), tall + 0.65), layout="constrained")
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, picture) in zip(axes, panels.items(), strict=True):
        axis.imshow(picture, interpolation="nearest" if height < 200 else "antialiased")
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    handles = [
        Patch(
            facecolor=f"#{bytes(map(int, colour)).hex()}",
            edgecolor="0.4",
            linewidth=0.5,
            label=name,
        )
        for name, colour in legend.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 8),
        fontsize=8,
        frameon=False,
    )
    return figure_png(figure, dpi=110)
