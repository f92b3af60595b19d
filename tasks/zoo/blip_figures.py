"""Recomputes the figures of `nano/blip`'s card.

Shape legend: N images or texts, S image side in pixels, T image tokens, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmadapters
from mmadapters.zoo import load_tokenizer
from mmadapters.zoo.blip import load
from mmadapters.zoo.files import read_config

from ..captioning.cider import cider
from ..data.synthetic import scenes
from ..encoders.blip import BlipMatcher
from ..encoders.blip_captioner import BlipCaptioner
from ..encoders.blip_text import BlipTokenizer
from ..retrieval.metrics import candidates
from . import photos
from .figure import CardFigure

GALLERY = 1_000  # number of drawn scenes that a text searches and that captions describe
RERANKED = 16  # number of images of each text that the matching head compares with it
WORDINGS = 5  # number of reference captions of each scene


def drawn(
    seeds: range, *, size: int, vocabulary: scenes.Vocabulary = scenes.PRETRAINING
) -> tuple[Tensor, list[list[str]]]:
    """Draws the first `GALLERY` scenes of `seeds`.

    Returns:
        pictures: (N, 3, S, S) uint8.
        captions: `WORDINGS` texts of each.
    """
    made = [scenes.make_scene(seed, vocabulary) for seed in seeds[:GALLERY]]
    captions = [scenes.wordings(scene, vocabulary, range(WORDINGS), of=WORDINGS) for scene in made]
    return scenes.render(made, vocabulary, size=size)[0], captions


def image_tokens(model: Any, pictures: Tensor, *, image: dict[str, Any]) -> Tensor:
    """Returns the image tokens (N, T, D) of (N, 3, S, S) uint8 pictures."""
    with torch.inference_mode():
        return torch.cat(
            [
                model.vision_model(
                    pixel_values=photos.normalise(batch, image), return_dict=True
                ).last_hidden_state
                for batch in pictures.split(250)
            ]
        )


def recall(model: nn.Module, states: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Measures text→image R@1 among N images, by embeddings and after matching.

    Args:
        states: (N, T, D) from `image_tokens`.
        captions: one text of each image.

    Returns:
        "embeddings" and "matching", the latter after the `RERANKED` best images of each text were
        compared with it by the matching head; both in [0, 1].
    """

    matcher = BlipMatcher(mmadapters.init(model))
    tokenizer = BlipTokenizer(load_tokenizer("nano/blip-retrieval"), matcher.tokens)
    with torch.inference_mode():
        images = torch.nn.functional.normalize(matcher.images_of(states), dim=-1)
        texts = torch.nn.functional.normalize(matcher.texts(tokenizer(captions)), dim=-1)
        _, best = candidates(texts, images, RERANKED)
        tokens = tokenizer.with_image(captions)
        matched = torch.cat(
            [
                matcher.match(
                    states[some].flatten(0, 1), part.repeat_interleave(some.shape[1], dim=0)
                )[:, 1].view(some.shape)
                for some, part in zip(best.split(50), tokens.split(50), strict=True)
            ]
        )
    right = torch.arange(len(texts), device=best.device)
    first = best.gather(1, matched.argmax(dim=1, keepdim=True))[:, 0]
    return {
        "embeddings": (best[:, 0] == right).double().mean().item(),
        "matching": (first == right).double().mean().item(),
    }


def describe(model: nn.Module, states: Tensor) -> list[str]:
    """Writes a caption of each image greedily.

    Args:
        states: (N, T, D) from `image_tokens`.
    """

    captioner = BlipCaptioner(mmadapters.init(model))
    tokenizer = BlipTokenizer(load_tokenizer("nano/blip-retrieval"), captioner.tokens)
    start = torch.tensor([captioner.tokens.start])
    with torch.inference_mode():
        written = [
            tokenizer.decode(captioner.generate(part, start, max_tokens=45))
            for part in states.split(250)
        ]
    return [text.strip() for texts in written for text in texts]


def caption_score(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns the mean CIDEr-D of captions, between 0 and 10."""

    scores = cider([text.split() for text in written], [[t.split() for t in r] for r in references])
    return float(scores.mean())


def verify(directory: Path, data: Path | None, *, kind: str) -> list[CardFigure]:
    """Measures recall among the drawn test scenes ("retrieval") or CIDEr of captions ("caption").

    Args:
        data: not needed here; every encoder's `verify` takes it.
    """
    config = read_config(directory)
    model = load(directory, "hf", kind=kind)
    pictures, captions = drawn(scenes.TEST_SEEDS, size=config["image"]["size"])
    states = image_tokens(model, pictures, image=config["image"])
    if kind == "retrieval":
        measured = recall(model, states, [texts[0] for texts in captions])
        values = {"scene_recall": measured["embeddings"], "scene_matching": measured["matching"]}
    else:
        values = {"scene_cider": caption_score(describe(model, states), captions)}
    note = f"{len(pictures)} drawn scenes"
    return [
        CardFigure.of_card(config["figures"][key], value, note) for key, value in values.items()
    ]
