"""Pictures of the report: images with their captions and with those that people wrote."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import BadRow
from ..core.plots import figure_png
from ..core.results import Figure, Table
from ..core.rows import Rows
from ..data import media
from .metrics import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY = "#24292f", "#656d76"
SIDE = 1.25  # inches of a picture
LETTERS = 92  # of a line next to a picture
REFERENCES = 5  # that are shown, at most


def illustrate(rows: Rows, images: Sequence[Image], *, count: int) -> list[Figure | Table]:
    """Returns figures of the images with the highest CIDEr and of those with the lowest."""
    order = np.argsort([image.cider for image in images], kind="stable")
    number = min(count // 2, len(order) // 2) or min(count, 1)
    figures: list[Figure | Table] = []
    for title, chosen in (("Highest", order[::-1][:number]), ("Lowest", order[:number])):
        if len(chosen):
            picture = gallery(rows, [images[place] for place in chosen])
            caption = (
                "In bold what was written, below it what people wrote, and the image's own CIDEr "
                f"among the {len(images):,} of the split."
            )
            figures.append(Figure(f"{title} CIDEr", picture, caption))
    return figures


def gallery(rows: Rows, images: Sequence[Image]) -> bytes:
    """Returns PNG data: a line for each image, with its captions next to it."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.2 * SIDE, 1.15 * SIDE * len(images)), layout="constrained")
    axes = canvas.subplots(len(images), 2, width_ratios=[1, 5.2], squeeze=False)
    for (left, right), image in zip(axes, images, strict=True):
        _show(left, rows, image)
        _tell(right, image)
    return figure_png(canvas, dpi=150)


def _show(axis: Axes, rows: Rows, image: Image) -> None:
    try:
        picture = np.asarray(media.picture_to_show(rows[image.record["index"]]["image"]))
    except BadRow:
        picture = np.full((8, 8, 3), 255, np.uint8)  # evaluation could still read it
    axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
    axis.set_axis_off()


def _tell(axis: Axes, image: Image) -> None:
    axis.set_axis_off()
    said = textwrap.wrap(image.caption or "(nothing)", LETTERS - 10, max_lines=2, placeholder=" …")
    lines = [(line, INK, "bold") for line in said]
    lines += [
        (textwrap.shorten(text, LETTERS, placeholder=" …"), INK, "normal")
        for text in image.references[:REFERENCES]
    ]
    lines.append((f"CIDEr {image.cider:.1f}", GREY, "normal"))
    for place, (text, colour, weight) in enumerate(lines):
        axis.text(
            *(0, 0.95 - 0.13 * place, text),
            transform=axis.transAxes,
            fontsize=8,
            color=colour,
            fontweight=weight,
            va="center",
            parse_math=False,
        )
