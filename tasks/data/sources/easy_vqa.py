"""easy-VQA: questions about pictures of one shape in one colour, from the PyPI package `easy-vqa`
(Victor Zhou, MIT): 4,000 + 1,000 pictures of 64×64, 38,575 + 9,673 questions, 13 answers.

A question alone, without its picture, is answered right in 67.0 % of cases.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from ...config.schema import Section, Split

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN_IMAGES, TEST_IMAGES = 4000, 1000
_NEGATED = re.compile(r"\b(not|no)\b")


class Options(Section):
    validation: int = Field(default=400, ge=0, lt=TRAIN_IMAGES)
    """Pictures of the training set that are kept for choices, with all their questions."""
    train: int = Field(default=TRAIN_IMAGES, ge=0, le=TRAIN_IMAGES)
    """Pictures to train on, at most: the others of the training set."""
    test: int = Field(default=TEST_IMAGES, ge=0, le=TEST_IMAGES)
    """Pictures of the test set."""
    seed: int = 0
    """Draws the pictures."""


def read(options: Options, split: Split) -> Dataset:
    """Columns: image (a path), question, answer, question_type (color, shape, presence, absence).

    Raises:
        ImportError: the package is not installed.
    """
    import datasets
    import pyarrow as pa

    folder = _folder() / ("test" if split == "test" else "train")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    wanted = _images(options, split)
    rows = [
        {
            "image": str(folder / "images" / f"{image}.png"),
            "question": question,
            "answer": answer,
            "question_type": question_type(question),
        }
        for question, answer, image in questions
        if image in wanted
    ]
    return datasets.Dataset(pa.Table.from_pylist(rows))


def question_type(question: str) -> str:
    """What is asked for: a color, a shape, whether something is there or whether it is not."""
    if question.startswith("what"):
        return "color" if "color" in question else "shape"
    return "absence" if _NEGATED.search(question) else "presence"


def _images(options: Options, split: Split) -> frozenset[int]:
    rng = np.random.default_rng(options.seed)
    train, test = rng.permutation(TRAIN_IMAGES), rng.permutation(TEST_IMAGES)
    if split == "test":
        chosen = test[: options.test]
    elif split == "validation":
        chosen = train[: options.validation]
    else:
        chosen = train[options.validation :][: options.train]
    return frozenset(chosen.tolist())


def _folder() -> Path:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or found.origin is None:
        raise ImportError("builtin/easy_vqa needs its package: pip install mmadapters[demo]")
    return Path(found.origin).parent / "data"
