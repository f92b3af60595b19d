"""Rows of an image with one or several captions; several rows may show the same image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..core.errors import BadRow
from ..core.rows import Column, Rows
from . import media
from .cells import listed

COLUMNS = {
    "image": Column("image", description="the picture"),
    "caption": Column("text", required=False, description="a text that describes it"),
    "captions": Column("texts", required=False, description="several such texts"),
    "image_id": Column(
        "text",
        required=False,
        description="equal for all rows of one image; by default equal files",
    ),
}


def captions_of(row: Mapping[str, Any]) -> list[str]:
    """Returns all captions of a row without the empty ones.

    Raises:
        BadRow: there is no caption, or one is not text.
    """
    texts = stated_captions(row)
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise BadRow(f"a caption is {type(text).__name__} {text!r}, not text")
    kept = [text.strip() for text in texts if text and text.strip()]
    if not kept:
        raise BadRow("there is no caption")
    return kept


def stated_captions(row: Mapping[str, Any]) -> list[Any]:
    """Returns the values of `caption` and `captions`, of any type; each may hold a list."""
    texts: list[Any] = []
    for value in (row.get("caption"), row.get("captions")):
        several = listed(value)
        texts += [value] if several is None else several
    return texts


def image_id(row: Mapping[str, Any]) -> int:
    """Returns a number that is equal for rows of one image: a hash of `image_id`, or else of the
    picture's bytes."""
    name = row.get("image_id")
    if name not in (None, ""):
        return number_of(str(name).encode())
    value = row["image"]
    digest = media.media_digest(value)
    return number_of(np.asarray(value).tobytes() if digest is None else digest.encode())


def number_of(data: bytes) -> int:
    """Returns 63 bits of a hash, which fit into an int64 tensor."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def all_captions(rows: Rows) -> Iterator[list[str]]:
    """Yields the captions of each row, read without its picture; an empty list for a bad row."""
    for row in caption_rows(rows):
        try:
            yield captions_of(row)
        except BadRow:
            yield []


def caption_rows(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yields the rows with their captions alone."""
    columns = {
        name: list(rows[name]) for name in ("caption", "captions") if name in rows.column_names
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def one_of_several(rows: Rows) -> str | None:
    """Returns the words for the random choice of a caption, or None if no row has several."""
    several = any(len(texts) > 1 for texts in all_captions(rows))
    return "one of the captions of a row" if several else None
