"""Rows of an image with one caption or several; rows may share an image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.errors import BadRow
from ..core.rows import Column, Rows
from . import media

COLUMNS = {
    "image": Column("image", description="the picture"),
    "caption": Column("text", required=False, description="a text that tells of it"),
    "captions": Column("texts", required=False, description="or several of them"),
    "image_id": Column(
        "text", required=False, description="rows of one image; without it, equal files"
    ),
}


def captions_of(row: Mapping[str, Any]) -> list[str]:
    """All captions of a row, without those that say nothing.

    Raises:
        BadRow: there is none, or one is not text.
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
    """What stands under `caption` and `captions`, whatever it is."""
    texts: list[Any] = []
    for value in (row.get("caption"), row.get("captions")):
        texts += value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return texts


def image_id(row: Mapping[str, Any]) -> int:
    """Equal for rows of one image: of its `image_id`, else of the picture's bytes."""
    name = row.get("image_id")
    if name not in (None, ""):
        return number_of(str(name).encode())
    value = row["image"]
    digest = media.media_digest(value)
    return number_of(np.asarray(value).tobytes() if digest is None else digest.encode())


def number_of(data: bytes) -> int:
    """63 bits of a hash, to compare in tensors."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1


def all_captions(rows: Rows) -> Iterator[list[str]]:
    """The captions of each row, read without its picture; none where they are not text."""
    for row in caption_rows(rows):
        try:
            yield captions_of(row)
        except BadRow:
            yield []


def caption_rows(rows: Rows) -> Iterator[dict[str, Any]]:
    """The rows with their captions alone."""
    columns = {
        name: list(rows[name]) for name in ("caption", "captions") if name in rows.column_names
    }
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def one_of_several(rows: Rows) -> str | None:
    """What is drawn where a row with several captions shows one of them, if such a row is there."""
    several = any(len(texts) > 1 for texts in all_captions(rows))
    return "one of the captions of a row" if several else None
