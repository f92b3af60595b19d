"""Embeddings of images and texts from the command line, and which of them belong together."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmadapters.files import write_bytes

from ..core.errors import InputErrors
from .queries import Embedder, Item, items

EMBEDDINGS, TABLE = "embeddings", "similarities.csv"


def matches(
    embedder: Embedder, inputs: Sequence[str], *, out: Path | None, bad: InputErrors
) -> Iterator[dict[str, Any]]:
    """Returns a result for each image and text.

    A result has the unit vector of its input, and the inputs of the other kind, those with the
    highest cosine first.

    Args:
        out: the folder for vectors, as `embeddings/NUMBER-NAME.npy` ((E,) float32), and, if there
            are images and texts, for their cosines, as `similarities.csv`. None puts the vectors
            into the results.
        bad: collects the inputs that cannot be used.

    Raises:
        BadInputs: some inputs cannot be used; raised after the results of the others.
    """
    asked: list[Item] = []
    for text in inputs:
        with bad.guarded(text):
            asked += items([text])
    unread: dict[int, str] = {}
    vectors = embedder.embed(asked, unread=unread).numpy()
    for number, reason in unread.items():
        bad.add(asked[number].value, reason, reason)
    read = [number for number in range(len(asked)) if number not in unread]
    asked, vectors = [asked[number] for number in read], vectors[read]
    images = [number for number, item in enumerate(asked) if item.kind == "image"]
    texts = [number for number, item in enumerate(asked) if item.kind == "text"]
    cosines = vectors @ vectors.T
    if out is not None and images and texts:
        _write(out / TABLE, _table(asked, cosines, images, texts).encode())
    for number, item in enumerate(asked):
        result: dict[str, Any] = {"input": item.value, "kind": item.kind}
        others = texts if item.kind == "image" else images
        if others:
            order = sorted(others, key=lambda other: -cosines[number, other])
            result["matches"] = [
                {
                    asked[other].kind: asked[other].value,
                    "similarity": _rounded(cosines[number, other]),
                }
                for other in order
            ]
        if out is None:
            result["embedding"] = [_rounded(value) for value in vectors[number]]
        else:
            path = out / EMBEDDINGS / f"{number:05d}-{_name(item)}.npy"
            _write(path, _npy(vectors[number]))
            result["embedding"] = str(path)
        yield result
    bad.end()


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _table(
    asked: Sequence[Item], cosines: np.ndarray, images: Sequence[int], texts: Sequence[int]
) -> str:
    """Returns a CSV table: a row for each image, a column for each text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(asked[number].value for number in texts)])
    for image in images:
        writer.writerow(
            [asked[image].value, *(f"{cosines[image, number]:.6f}" for number in texts)]
        )
    return text.getvalue()


def _name(item: Item) -> str:
    """Returns a file name made of the picture's name or of the first words of a text."""
    words = Path(item.value).stem if item.kind == "image" else item.value
    safe = "".join(letter if letter.isalnum() else "_" for letter in words)
    return safe.strip("_")[:40] or "text"


def _npy(vector: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, vector, allow_pickle=False)
    return data.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
