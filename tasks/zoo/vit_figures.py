"""Recomputes the figures of `nano/vit`'s card.

Shape legend: N images, S image side in pixels, L = 1 + patches tokens (class token first), D width.
"""

from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mmadapters.zoo.files import read_config, read_weights
from mmadapters.zoo.vit import load_weights

from . import photos
from .figure import CardFigure

PROBE = "probe.safetensors"


def pooled(model: VisionTransformer, images: Tensor, *, image: dict[str, Any]) -> Tensor:
    """Returns frozen features (N, D) of (N, 3, S, S) uint8 images: the mean of the patch tokens."""
    features = []
    with torch.inference_mode():
        for batch in images.split(500):
            tokens = model.forward_features(photos.normalise(batch, image))  # (N, L, D)
            features.append(tokens[:, 1:].mean(dim=1))
    return torch.cat(features)


def verify(directory: Path, data: Path | None) -> list[CardFigure]:
    """Measures the shipped probe on the shipped encoder's features of the validation photographs.

    Args:
        data: folder of the photographs; without them, nothing is measured.
    """
    config = read_config(directory)
    claimed = config["figures"]["linear_probe"]
    folder = photos.find_photos(data)
    measured, note = None, f"no folder {photos.FOLDER} with photographs in the data folder"
    if folder is not None:
        images, labels = photos.read_photos(folder, "validation")
        probe = read_weights(directory, file=PROBE)
        features = pooled(
            load_weights(directory, config["architecture"]), images, image=config["image"]
        )
        predicted = (features @ probe["weight"].T + probe["bias"]).argmax(dim=1)
        measured, note = (predicted == labels).double().mean().item(), f"{len(labels)} photographs"
    return [CardFigure.of_card(claimed, measured, note)]
