"""Reads the folder `tiny_imagenet_64`: photographs of 64×64 in parquet files, 200 class names.

Shape legend: N images, S image side in pixels.
"""

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = "tiny_imagenet_64"


def find_photos(data: Path | None) -> Path | None:
    """Returns the folder of the photographs, `data` or a folder in it, or None if there is none."""
    for folder in () if data is None else (data / FOLDER, data):
        if (folder / "classes.txt").is_file():
            return folder
    return None


def class_names(folder: Path) -> list[str]:
    """Reads the class names; a photograph's label is the index of a name, from 0."""
    return (folder / "classes.txt").read_text(encoding="utf-8").splitlines()


def read_photos(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Reads all photographs of a split ("train" or "validation").

    Returns:
        images: (N, 3, 64, 64) uint8.
        labels: (N,) int64.

    Raises:
        FileNotFoundError: the folder has no file of this split.
    """
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"{split}*.parquet"))
    if not files:
        raise FileNotFoundError(f"no {split}*.parquet in {folder}")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    with ThreadPoolExecutor() as pool:  # PIL releases the GIL while it decodes
        images = list(pool.map(_decode, rows))
    labels = torch.tensor([row["label"] for row in rows])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels


def _decode(row: Mapping[str, Any]) -> np.ndarray:
    from PIL import Image

    return np.asarray(
        Image.open(io.BytesIO(row["image"]["bytes"]), formats=("PNG", "JPEG", "WEBP")).convert(
            "RGB"
        )
    )


def normalise(images: Tensor, image: Mapping[str, Sequence[float]]) -> Tensor:
    """Normalises (N, 3, S, S) uint8 to fp32 of the same shape.

    Args:
        image: a config's `image`, with `mean` and `std` of each channel.
    """
    mean, std = (
        torch.tensor(image[key], device=images.device)[:, None, None] for key in ("mean", "std")
    )
    return (images.float() / 255 - mean) / std
