"""What the command line gives as queries: image files, files of texts, or texts themselves.

Shape legend: N items, E width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    from .task import RetrievalTask

AT_A_TIME = 32


@dataclass(frozen=True)
class Item:
    """An image by its path, or a text."""

    kind: Literal["image", "text"]
    value: str


def items(inputs: Sequence[str]) -> list[Item]:
    """What each input stands for: a file is an image, a .txt file a text on each line, else a text.

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
        found = [Item("text", line) for line in lines if line]
        if not found:
            raise ValueError(f"{text} holds no text")
        yield from found
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
    except OSError:  # a text longer than a file name may be
        return False


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


@torch.no_grad()
def embed(task: RetrievalTask, model: RetrievalModel, found: Sequence[Item]) -> Tensor:
    """(N, E) float32 unit vectors on the CPU.

    Raises:
        ValueError: a picture cannot be read; says which.
    """
    vectors = torch.empty(len(found), model.towers.width)
    for kind in ("image", "text"):
        own = [number for number, item in enumerate(found) if item.kind == kind]
        for start in range(0, len(own), AT_A_TIME):
            part = own[start : start + AT_A_TIME]
            values = [found[number].value for number in part]
            vectors[part] = _embedded(task, model, kind, values).cpu()
    return vectors


def _embedded(
    task: RetrievalTask, model: RetrievalModel, kind: str, values: Sequence[str]
) -> Tensor:
    if kind == "text":
        return model.texts(task.tokens(values).to(model.device))
    pixels = torch.stack([task.pixels(_picture(value)) for value in values])
    return model.images(pixels.to(model.device))


def _picture(path: str) -> Image.Image:
    try:
        return media.read_image(path)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from None
