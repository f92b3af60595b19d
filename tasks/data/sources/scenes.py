"""Drawn scenes (`synthetic.scenes`): pictures with masks, captions and counts of things."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from ...config.schema import Section, Split
from ..synthetic import scenes

if TYPE_CHECKING:
    from datasets import Dataset

SEEDS = {
    "train": scenes.TASK_SEEDS,
    "validation": scenes.VALIDATION_SEEDS,
    "test": scenes.TEST_SEEDS,
}
VOCABULARIES = {
    "unseen": scenes.UNSEEN,
    "pretraining": scenes.PRETRAINING,
    "retold": scenes.RETOLD,
}
DRAWN_AT_ONCE = 500
MOST_WORDINGS = 100


class Options(Section):
    """The options of `builtin/scenes`."""

    vocabulary: Literal["unseen", "pretraining", "retold"] = "unseen"
    """Shapes, colours and phrasings of the scenes. unseen: new to the nano encoders; pretraining:
    those of their pretraining; retold: those shapes and words in new phrasings."""
    train: int = Field(default=1000, ge=0, le=len(scenes.TASK_SEEDS))
    """Number of training scenes."""
    validation: int = Field(default=200, ge=0, le=len(scenes.VALIDATION_SEEDS))
    """Number of validation scenes."""
    test: int = Field(default=1000, ge=0, le=len(scenes.TEST_SEEDS))
    """Number of test scenes."""
    size: int = Field(default=64, ge=16, le=1024)
    """Height and width of the pictures, in pixels."""
    wordings: int = Field(default=1, ge=1, le=MOST_WORDINGS)
    """Number of differently worded captions of a scene: the first is `caption`, the others are
    `captions`."""


def class_names(options: Options) -> tuple[str, ...]:
    """Returns the class of each id in a mask."""
    return ("background", *VOCABULARIES[options.vocabulary].shapes)


def read(options: Options, split: Split) -> Dataset:
    """Draws a split with the columns image, mask (an indexed PNG), caption and count (number of
    things); with several `options.wordings` also captions."""
    import datasets
    import pyarrow as pa

    vocabulary = VOCABULARIES[options.vocabulary]
    seeds = SEEDS[split][: getattr(options, split)]
    palette = _palette(len(class_names(options)))
    rows: list[dict[str, Any]] = []
    for start in range(0, len(seeds), DRAWN_AT_ONCE):
        drawn = [scenes.make_scene(s, vocabulary) for s in seeds[start : start + DRAWN_AT_ONCE]]
        images, masks = scenes.render(drawn, vocabulary, size=options.size)
        pixels = images.permute(0, 2, 3, 1).numpy()
        rows += [
            {
                "image": {"bytes": _png(image), "path": f"{scene.seed}.png"},
                "mask": {"bytes": _png(mask, palette), "path": f"{scene.seed}-mask.png"},
                "caption": scenes.describe(scene, vocabulary),
                "count": len(scene.things),
            }
            | _captions(scene, options)
            for scene, image, mask in zip(drawn, pixels, masks.numpy(), strict=True)
        ]
    several = {"captions": datasets.List(datasets.Value("string"))}
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "mask": datasets.Image(decode=False),
            "caption": datasets.Value("string"),
            "count": datasets.Value("int64"),
        }
        | (several if options.wordings > 1 else {})
    )
    table = pa.Table.from_pylist(rows, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def _captions(scene: scenes.Scene, options: Options) -> dict[str, list[str]]:
    """Returns the captions after the first."""
    numbers, vocabulary = range(1, options.wordings), VOCABULARIES[options.vocabulary]
    others = scenes.wordings(scene, vocabulary, numbers, of=MOST_WORDINGS)
    return {"captions": others} if others else {}


def _png(pixels: np.ndarray, palette: list[int] | None = None) -> bytes:
    from PIL import Image

    image = Image.fromarray(pixels)
    if palette is not None:
        image.putpalette(palette)  # its grey levels become indices
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _palette(classes: int) -> list[int]:
    """Returns the colours in which a viewer shows a mask: black, and hues at equal distances."""
    import colorsys

    hues = (colorsys.hsv_to_rgb(i / (classes - 1), 0.8, 1) for i in range(classes - 1))
    return [0, 0, 0, *(round(255 * value) for rgb in hues for value in rgb)]
