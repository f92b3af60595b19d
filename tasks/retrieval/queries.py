"""Queries of the command line (image files, files of texts, texts) and their embeddings.

Shape legend: N items, L text tokens, H and W of a picture, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..core.errors import BadRow
from ..data import media
from .model import RetrievalModel

if TYPE_CHECKING:
    from PIL import Image

AT_A_TIME = 32


@dataclass(frozen=True)
class Item:
    """An image by its path, or a text."""

    kind: Literal["image", "text"]
    value: str


def items(inputs: Sequence[str]) -> list[Item]:
    """Returns the images and texts of the inputs.

    A file is an image, a .txt file gives a text for each of its lines, and anything else is a text.

    Raises:
        ValueError: an input looks like the name of a picture and there is no such file, or a file
            of texts cannot be read or is empty.
    """
    return [item for text in inputs for item in _items(text)]


def _items(text: str) -> Iterator[Item]:
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in _read(path).splitlines()]
        texts = [Item("text", line) for line in lines if line]
        if not texts:
            raise ValueError(f"{text} holds no text")
        yield from texts
    elif _is_file(path):
        yield Item("image", text)
    elif suffix in media.IMAGE_SUFFIXES or suffix == ".txt":
        raise ValueError(f"there is no file {text}")
    elif not text.strip():
        raise ValueError("a query is empty: give a text or the path of a picture")
    else:
        yield Item("text", text.strip())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the text is longer than a file name may be
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


@dataclass(frozen=True)
class Embedder:
    """A retrieval model with all that turns items into its inputs.

    Attributes:
        model: computes the embeddings.
        tokens: n texts -> (n, L) int64, in the sentence that they are put into.
        pixels: a picture -> (3, H, W) as the encoder reads it.
        bits: the bits in use in pictures with 16 bits a channel; None for all 16.
    """

    model: RetrievalModel
    tokens: Callable[[Sequence[str]], Tensor]
    pixels: Callable[[Image.Image], Tensor]
    bits: int | None = None

    @torch.no_grad()
    def embed(self, queries: Sequence[Item]) -> Tensor:
        """Returns (N, E) float32 unit vectors on the CPU.

        Raises:
            ValueError: a picture cannot be read; the message says which one.
        """
        vectors = torch.empty(len(queries), self.model.towers.width)
        for kind, embedded in (("image", self._images), ("text", self._texts)):
            places = [number for number, item in enumerate(queries) if item.kind == kind]
            for start in range(0, len(places), AT_A_TIME):
                part = places[start : start + AT_A_TIME]
                vectors[part] = embedded([queries[number].value for number in part]).cpu()
        return vectors

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.texts(self.tokens(texts).to(self.model.device))

    def _images(self, paths: Sequence[str]) -> Tensor:
        pixels = torch.stack([self.pixels(_picture(path, self.bits)) for path in paths])
        return self.model.images(pixels.to(self.model.device))


def _picture(path: str, bits: int | None) -> Image.Image:
    try:
        return media.read_image(path, bits=bits)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None
