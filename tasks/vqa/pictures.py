"""Pictures of the report: questions with the answers given and the right ones."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import BadRow
from ..core.plots import figure_png
from ..core.results import Figure, Table
from ..core.rows import Record, Rows
from ..data import media
from .answers import score
from .metrics import KINDS, truth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
RIGHT, WRONG, INK = "#1a7f4b", "#cf222e", "#24292f"
LINE = 30  # letters of a question in a line
LINES = 3


def illustrate(rows: Rows, records: Sequence[Record], *, count: int) -> list[Figure | Table]:
    """Returns figures of the surest wrong answers, and of right ones to all kinds of questions."""
    scored = [(record, score(record["prediction"], record["answers"])) for record in records]
    wrong = sorted(
        (record for record, value in scored if value == 0),
        key=lambda record: -record["probability"],
    )
    right = in_turn(record for record, value in scored if value >= 0.5)
    figures: list[Figure | Table] = []
    for title, chosen, number, caption in (
        ("Surest wrong answers", wrong, count, "The surest first."),
        ("Right answers", right, max(count // 2, 1), "To all kinds of questions in turn."),
    ):
        # One question of an image, so that the pictures differ.
        part = list({record["image"]: record for record in reversed(chosen)}.values())[::-1]
        if part and count:
            image = gallery(rows, part[:number])
            figures.append(
                Figure(title, image, f"{caption} Below, what was answered and the truth.")
            )
    return figures


def in_turn(records: Iterable[Record]) -> list[Record]:
    """Orders records: one of each kind of question and answer, then a second of each, and so on."""
    seen: dict[tuple, int] = {}
    turns, listed = [], list(records)
    for record in listed:
        kind = (*(record["row"].get(column) for column in KINDS), truth(record["answers"]))
        seen[kind] = seen.get(kind, 0) + 1
        turns.append(seen[kind])
    return [listed[place] for place in np.argsort(turns, kind="stable")]


def gallery(rows: Rows, records: Sequence[Record]) -> bytes:
    """Returns PNG data: a grid of pictures, each with its question above and the answers below."""
    from matplotlib.figure import Figure as Canvas

    columns = min(COLUMNS, len(records))
    lines = -(-len(records) // columns)
    canvas = Canvas(figsize=(2.5 * columns, 3.1 * lines), layout="constrained")
    axes = canvas.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, record in zip(axes, records, strict=False):
        _show(axis, rows, record)
    return figure_png(canvas, dpi=130)


def _show(axis: Axes, rows: Rows, record: Record) -> None:
    try:
        picture = np.asarray(media.picture_to_show(rows[record["index"]]["image"]))
    except BadRow:
        picture = np.full((8, 8, 3), 255, np.uint8)  # evaluation could still read it
    axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "parse_math": False}
    axis.set_title("\n".join(_wrapped(record["question"])), **style)
    good = score(record["prediction"], record["answers"]) > 0
    said = f"{_short(record['prediction'])} ({100 * record['probability']:.0f} %)"
    for line, (text, colour) in enumerate(
        ((said, RIGHT if good else WRONG), (f"truth: {_short(truth(record['answers']))}", INK))
    ):
        axis.text(
            *(0.5, -0.04 - 0.11 * line, text),
            transform=axis.transAxes,
            ha="center",
            va="top",
            **{**style, "color": colour},
        )


def _wrapped(question: str) -> Iterator[str]:
    """Yields three lines, so that all pictures of a row have one height."""
    lines = textwrap.wrap(question, LINE, max_lines=LINES, placeholder=" …")
    yield from [""] * (LINES - len(lines)) + lines


def _short(answer: str) -> str:
    return textwrap.shorten(answer, LINE - 8, placeholder="…") or answer[: LINE - 9] + "…"
