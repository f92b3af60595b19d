"""Embeddings of images and texts from the command line, and which belong together."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmadapters.files import write_bytes

from .model import RetrievalModel
from .queries import Item, embed, items

if TYPE_CHECKING:
    from .task import RetrievalTask

EMBEDDINGS, TABLE = "embeddings", "similarities.csv"


def predict(
    task: RetrievalTask, model: RetrievalModel, inputs: Sequence[str], *, out: Path | None
) -> Iterator[dict[str, Any]]:
    """A result for each image and text: its unit vector, and the others' of the other kind, best
    first, with their cosine.

    With `out`, vectors are written to `out/embeddings/NUMBER-NAME.npy` ((E,) float32) and, where
    there are images and texts, their cosines to `out/similarities.csv`.

    Raises:
        ValueError: an input cannot be read; says which.
    """
    found = items(inputs)
    vectors = embed(task, model, found).numpy()
    images = [number for number, item in enumerate(found) if item.kind == "image"]
    texts = [number for number, item in enumerate(found) if item.kind == "text"]
    cosines = vectors @ vectors.T
    if out is not None and images and texts:
        _write(out / TABLE, _table(found, cosines, images, texts).encode())
    for number, item in enumerate(found):
        result: dict[str, Any] = {"input": item.value, "kind": item.kind}
        others = texts if item.kind == "image" else images
        if others:
            order = sorted(others, key=lambda other: -cosines[number, other])
            result["matches"] = [
                {
                    found[other].kind: found[other].value,
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


def _rounded(value: float) -> float:
    return round(float(value), 6)


def _table(
    found: Sequence[Item], cosines: np.ndarray, images: Sequence[int], texts: Sequence[int]
) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(found[number].value for number in texts)])
    for image in images:
        writer.writerow(
            [found[image].value, *(f"{cosines[image, number]:.6f}" for number in texts)]
        )
    return text.getvalue()


def _name(item: Item) -> str:
    """A file name from a picture's, or from the first words of a text."""
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
