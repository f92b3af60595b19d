"""Recomputes the figures of `nano/clip`'s card.

Shape legend: N images or texts, S image side in pixels, E width of the shared space, C classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP
from torch import Tensor
from torch.nn import functional as F

from mmadapters.zoo.clip import load, load_tokenizer
from mmadapters.zoo.files import read_config

from ..data.synthetic import scenes
from . import photos
from .figure import CardFigure

TEMPLATES = (
    "a photo of a {}",
    "a small photo of a {}",
    "a blurry photo of the {}",
    "a close-up photo of a {}",
    "a picture of the {}",
    "{}",
)
GALLERY = 1_000  # number of drawn scenes that a text searches, from the first of TEST_SEEDS on


def encode_images(model: CLIP, images: Tensor, *, image: dict[str, Any]) -> Tensor:
    """Returns unit vectors (N, E) of (N, 3, S, S) uint8 images."""
    with torch.inference_mode():
        batches = (photos.normalise(batch, image) for batch in images.split(500))
        return torch.cat([model.encode_image(batch, normalize=True) for batch in batches])


def class_vectors(
    model: CLIP, tokenize: Callable[[list[str]], Tensor], names: Sequence[str]
) -> Tensor:
    """Returns unit vectors (C, E) of the class names, averaged over `TEMPLATES`."""
    with torch.inference_mode():
        vectors = [
            model.encode_text(tokenize([template.format(name) for name in names]), normalize=True)
            for template in TEMPLATES
        ]
    return F.normalize(torch.stack(vectors).mean(dim=0), dim=-1)


def scene_recall(
    model: CLIP,
    tokenize: Callable[[list[str]], Tensor],
    *,
    image: dict[str, Any],
    seeds: range = scenes.TEST_SEEDS,
    vocabulary: scenes.Vocabulary = scenes.PRETRAINING,
) -> dict[str, float]:
    """Measures text→image R@1 and R@5 among the first `GALLERY` drawn scenes of `seeds`.

    Each scene has one caption.
    """
    device = model.logit_scale.device
    drawn = [scenes.make_scene(seed, vocabulary) for seed in seeds[:GALLERY]]
    captions = [scenes.describe(scene, vocabulary) for scene in drawn]
    pictures, _ = scenes.render(drawn, vocabulary, size=image["size"], device=device)
    with torch.inference_mode():
        texts = model.encode_text(tokenize(captions), normalize=True)  # (N, E)
    scores = texts @ encode_images(model, pictures, image=image).T
    rank = (scores > scores.diagonal()[:, None]).sum(dim=1)
    return {f"R@{k}": (rank < k).double().mean().item() for k in (1, 5)}


def zero_shot(
    model: CLIP,
    tokenize: Callable[[list[str]], Tensor],
    *,
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    image: dict[str, Any],
) -> float:
    """Measures zero-shot top-1 accuracy over the class names.

    Args:
        images: (N, 3, S, S) uint8.
        labels: (N,) int64, indices of `names`.
        image: a config's `image`, for `photos.normalise`.
    """
    logits = encode_images(model, images, image=image) @ class_vectors(model, tokenize, names).T
    return (logits.argmax(dim=1) == labels).double().mean().item()


def verify(directory: Path, data: Path | None) -> list[CardFigure]:
    """Measures recall among the drawn test scenes and zero-shot accuracy on the photographs.

    Args:
        data: folder of the photographs; without them, accuracy is not measured.
    """
    config = read_config(directory)
    model = load(directory, "open_clip")
    assert isinstance(model, CLIP)
    tokenize = load_tokenizer(directory, "open_clip")
    figures = config["figures"]
    recall = scene_recall(model, tokenize, image=config["image"])["R@1"]
    folder = photos.find_photos(data)
    top1, note = None, f"no folder {photos.FOLDER} with photographs in the data folder"
    if folder is not None:
        images, labels = photos.read_photos(folder, "validation")
        names = photos.class_names(folder)
        top1 = zero_shot(
            model, tokenize, images=images, labels=labels, names=names, image=config["image"]
        )
        note = f"{len(labels)} photographs"
    return [
        CardFigure.of_card(figures["scene_recall"], recall, f"{GALLERY} drawn scenes"),
        CardFigure.of_card(figures["zero_shot"], top1, note),
    ]
