"""Pictures of the report: queries with their first results, the right one framed.

Shape legend: H, W of a picture in pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.plots import figure_png
from ..core.results import Figure
from ..core.rows import Record, Rows
from ..data import media
from .gallery import Direction, Gallery
from .metrics import TO_IMAGE, TO_TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 5
RIGHT, WRONG, INK = "#1a7f4b", "#d0d3d6", "#24292f"
SIDE = 1.15  # inches of a picture


def figures(
    gallery: Gallery, rows: Rows, records: Sequence[Record], *, count: int
) -> Iterator[Figure]:
    """Yields figures of some queries of each kind, drawn with a fixed seed, and of the worst.

    Args:
        gallery: of the records.
        rows: of the split.
        records: of the rows.
        count: about how many queries are shown in all.
    """
    number = max(1, count // 4)
    for name, draw, what in (
        (TO_IMAGE, text_queries, "Texts and the pictures that they find"),
        (TO_TEXT, image_queries, "Pictures and the texts that they find"),
    ):
        direction = gallery.direction(name)
        ranks = direction.ranks()
        some = np.random.default_rng(0).permutation(len(ranks))[:number]
        worst = np.argsort(-ranks, kind="stable")[:number]
        for title, chosen in ((what, some), (f"{what}: the worst", worst)):
            if title is not what and not ranks[worst[0]]:
                continue
            image = draw(gallery, direction, rows, records, chosen.tolist(), ranks)
            frame = "framed" if draw is text_queries else "green"
            caption = (
                f"The first {SHOWN} of {len(direction.everything):,}, best first, with what stands "
                f"below them (similarity). What is right is {frame}, and shown last where it is "
                "not among them; the rank is its own."
            )
            yield Figure(title, image, caption)


def text_queries(
    gallery: Gallery,
    direction: Direction,
    rows: Rows,
    records: Sequence[Record],
    queries: Sequence[int],
    ranks: np.ndarray,
) -> bytes:
    """Returns PNG data: a line for each text, with its rank and the pictures that it finds."""
    figure, axes = _grid(len(queries), SHOWN + 2, [2.4, *[1] * (SHOWN + 1)])
    for line, query in zip(axes, queries, strict=True):
        right = int(direction.of_queries[query])
        _write(line[0], gallery.captions[query], f"rank {ranks[query] + 1:,}")
        images, scores = direction.top(query, SHOWN)
        labels = [f"{score:.2f}" for score in scores]
        if right not in images:
            images, labels = [*images, right], [*labels, "the right one"]
        for axis, image, label in zip(line[1:], images, labels, strict=False):
            _show(axis, _picture(gallery, rows, records, image), framed=image == right)
            axis.set_xlabel(label, fontsize=7, color=INK, labelpad=2)
    return figure_png(figure)


def image_queries(
    gallery: Gallery,
    direction: Direction,
    rows: Rows,
    records: Sequence[Record],
    queries: Sequence[int],
    ranks: np.ndarray,
) -> bytes:
    """Returns PNG data: a line for each picture, with its rank and the texts that it finds."""
    figure, axes = _grid(len(queries), 2, [1, SHOWN + 1.2])
    for line, query in zip(axes, queries, strict=True):
        _show(line[0], _picture(gallery, rows, records, query), framed=False)
        line[0].set_xlabel(f"rank {ranks[query] + 1:,}", fontsize=7, color=INK, labelpad=2)
        line[1].axis("off")
        captions = (direction.of_everything == query).nonzero()[:, 0].tolist()
        texts, scores = direction.top(query, SHOWN)
        lines = [(f"{score:.2f}", text) for score, text in zip(scores, texts, strict=True)]
        if not set(captions) & set(texts):
            lines.append(("right:", captions[0]))
        for place, (label, text) in enumerate(lines):
            right = text in captions
            words = textwrap.shorten(gallery.captions[text], 95, placeholder=" …")
            line[1].text(
                *(0, 0.95 - 0.18 * place),
                f"{label}  {words}",
                transform=line[1].transAxes,
                fontsize=8,
                color=RIGHT if right else INK,
                fontweight="bold" if right else "normal",
                va="center",
                parse_math=False,
            )
    return figure_png(figure)


def _grid(lines: int, columns: int, widths: Sequence[float]) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(SIDE * sum(widths), 1.25 * SIDE * lines), layout="constrained")
    axes = figure.subplots(lines, columns, width_ratios=list(widths), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def _write(axis: Axes, text: str, below: str) -> None:
    axis.axis("off")
    words = textwrap.fill(textwrap.shorten(text, 130, placeholder=" …"), 32)
    box: dict[str, Any] = {"transform": axis.transAxes, "color": INK, "parse_math": False}
    axis.text(0, 0.5, words, fontsize=8, va="center", **box)
    axis.text(0, 0.08, below, fontsize=7, va="center", alpha=0.7, **box)


def _show(axis: Axes, picture: np.ndarray, *, framed: bool) -> None:
    axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color(RIGHT if framed else WRONG)
        spine.set_linewidth(3 if framed else 0.8)


def _picture(gallery: Gallery, rows: Rows, records: Sequence[Record], image: int) -> np.ndarray:
    """Returns the picture of an image's first record, (H, W, 3) uint8."""
    row = rows[records[gallery.first[image]]["index"]]
    return np.asarray(media.picture_to_show(row["image"]))
