"""easy-VQA: questions about pictures of one shape in one colour, from the PyPI package `easy-vqa`
(Victor Zhou, MIT): 4,000 + 1,000 pictures of 64×64, 38,575 + 9,673 questions, 13 answers.

The questions alone, without the pictures, are answered right in 67.0 % of cases.
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
    """The options of `builtin/easy_vqa`."""

    validation: int = Field(default=400, ge=0, lt=TRAIN_IMAGES)
    """Number of training pictures that become the validation split, with all their questions."""
    train: int = Field(default=TRAIN_IMAGES, ge=0, le=TRAIN_IMAGES)
    """Largest number of training pictures, from those that are not in the validation split."""
    test: int = Field(default=TEST_IMAGES, ge=0, le=TEST_IMAGES)
    """Number of test pictures."""
    seed: int = 0
    """Seed of the random choice of pictures."""


def read(options: Options, split: Split) -> Dataset:
    """Reads a split with the columns image (a path), question, answer and question_type (color,
    shape, presence or absence).

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
    """Returns the subject of a question: color, shape, presence or absence of something."""
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
    package = importlib.util.find_spec("easy_vqa")
    if package is None or package.origin is None:
        raise ImportError("builtin/easy_vqa needs its package: pip install mmadapters[demo]")
    return Path(package.origin).parent / "data"
