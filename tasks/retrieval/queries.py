"""Queries of the command line (image files, files of texts, texts) and their embeddings.

Shape legend: N items, L text tokens, H and W of a picture, E width of the embeddings.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..core.errors import BadRow
from ..core.files import open_file
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
        ValueError: an input has the name of a picture and cannot be opened, or a file of texts
            cannot be read or is empty.
    """
    return [item for text in inputs for item in _items(text)]


def _items(text: str) -> Iterator[Item]:
    path = Path(text)
    suffix = path.suffix.lower()
    if suffix == ".txt" and _is_file(path):
        # `splitlines` would also cut a text at other characters, such as U+2028.
        lines = [line.strip() for line in io.StringIO(_read(path), newline=None)]
        texts = [Item("text", line) for line in lines if line]
        if not texts:
            raise ValueError(f"{text} holds no text")
        yield from texts
    elif _is_file(path):
        yield Item("image", text)
    elif suffix in media.IMAGE_SUFFIXES or suffix == ".txt":
        raise ValueError(_missing(path))
    elif not text.strip():
        raise ValueError("a query is empty: give a text or the path of a picture")
    else:
        yield Item("text", text.strip())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the text is longer than a file name may be
        return False


def _missing(path: Path) -> str:
    try:
        open_file(path).close()
    except BadRow as error:
        return f"there is no file {path}" if str(error) == f"no such file: {path}" else str(error)
    return f"{path} is no picture"


def _read(path: Path) -> str:
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8")
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
    def embed(self, queries: Sequence[Item], *, unread: dict[int, str] | None = None) -> Tensor:
        """Returns (N, E) float32 unit vectors on the CPU.

        Args:
            queries: N items.
            unread: gets a sentence about each picture that cannot be read, by its number; its
                vector is then 0.

        Raises:
            ValueError: a picture cannot be read, and there is no `unread`; names the picture.
        """
        vectors = torch.empty(len(queries), self.model.towers.width)
        texts = [number for number, item in enumerate(queries) if item.kind == "text"]
        for part in _parts(texts):
            vectors[part] = self._texts([queries[number].value for number in part]).cpu()
        images = [number for number, item in enumerate(queries) if item.kind == "image"]
        for part in _parts(images):
            pictures: dict[int, Tensor] = {}
            for number in part:
                try:
                    pictures[number] = self.pixels(_picture(queries[number].value, self.bits))
                except ValueError as error:
                    if unread is None:
                        raise
                    unread[number] = str(error)
                    vectors[number] = 0
            if pictures:
                pixels = torch.stack([*pictures.values()]).to(self.model.device)
                vectors[[*pictures]] = self.model.images(pixels).cpu()
        return vectors

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.texts(self.tokens(texts).to(self.model.device))


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), AT_A_TIME):
        yield numbers[start : start + AT_A_TIME]


def _picture(path: str, bits: int | None) -> Image.Image:
    try:
        return media.read_image(path, bits=bits)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None
