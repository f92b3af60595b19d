"""Questions about coloured squares, and the model of a job on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import blip as blip_family
from families.tokenizers import word_tokenizer
from PIL import Image, ImageDraw

import mmadapters
from mmadapters import MethodConfig, SeqBnConfig
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.vqa.config import VQAConfig
from mmadapters.tasks.vqa.task import VQATask

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220)}
SIDES = ("left", "right")
WORDS = (
    *("what", "colour", "is", "the", "square", "where", "there", "a", "?", "yes", "no"),
    *COLOURS,
    *SIDES,
)


class Squares:
    """Six pictures of a square, each with questions about its colour, its side and both."""

    def __init__(self, folder: Path, *, several: bool = False) -> None:
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("image", "question", "question_type")
        }
        self.columns["answers" if several else "answer"] = []
        for colour in COLOURS:
            for side in SIDES:
                path = folder / f"{colour}_{side}.png"
                square(colour, side).save(path)
                for kind, question, answer in asked(colour, side):
                    self.columns["image"].append(str(path))
                    self.columns["question"].append(question)
                    self.columns["question_type"].append(kind)
                    if several:
                        other = "no" if answer == "yes" else "red"
                        self.columns["answers"].append([answer] * 7 + [other] * 3)
                    else:
                        self.columns["answer"].append(answer)

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def square(colour: str, side: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), (235, 235, 235))
    left = 4 if side == "left" else 34
    ImageDraw.Draw(image).rectangle((left, 18, left + 26, 44), fill=COLOURS[colour])
    return image


def asked(colour: str, side: str) -> list[tuple[str, str, str]]:
    other = "blue" if colour == "red" else "red"
    return [
        ("colour", "what colour is the square?", colour),
        ("place", "where is the square?", side),
        ("presence", f"is there a {colour} square?", "yes"),
        ("presence", f"is there a {other} square?", "no"),
    ]


def job(**sections: Any) -> VQAConfig:
    given: dict[str, Any] = {
        "name": "squares",
        "backbone": {"name": "nano/clip"},
        "data": {"source": "squares"},
        "trainer": {"batch_size": 8, "device": "cpu", "tensorboard": False},
    }
    return VQAConfig.model_validate({**given, **sections})


def blip_job(folder: Path, **sections: Any) -> VQAConfig:
    """On a small BLIP with random weights and a tokenizer of whole words."""
    given = {"backbone": {"name": "hf/blip-vqa", "processor": str(folder)}}
    return job(**{**given, **sections})


def blip_backbone() -> torch.nn.Module:
    return blip_family.hf_blip_vqa()


def made(
    config: VQAConfig,
    rows: Any,
    backbone: torch.nn.Module | None = None,
    *,
    method: MethodConfig | None = None,
) -> tuple[VQATask, TaskModel]:
    """The task fitted to rows, and its model with an adapter that is trained."""
    torch.manual_seed(0)
    if backbone is None:
        backbone = mmadapters.load_backbone(config.backbone.name, **config.backbone.options)
    task = VQATask(config)
    task.fit(rows, backbone)
    encoder = mmadapters.init(backbone)
    encoder.add_adapter(config.name, method or SeqBnConfig(size=8))
    encoder.train_adapter(config.name)
    # As `run.make_model`: a head starts from the same numbers whatever was drawn before.
    torch.manual_seed(0)
    return task, task.build(encoder)


def fake_records(answers: Sequence[tuple[str, Sequence[str]]], **row: Any) -> list[dict[str, Any]]:
    """Records of predictions and true answers, each about an image of its own."""
    return [
        {
            "index": index,
            "image": str(index),
            "question": "what?",
            "prediction": prediction,
            "probability": 0.5,
            "answers": list(truths),
            "row": {name: values[index] for name, values in row.items()},
        }
        for index, (prediction, truths) in enumerate(answers)
    ]


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Squares:
    return Squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def opinions(tmp_path_factory: pytest.TempPathFactory) -> Squares:
    """Ten answers to every question, seven of them right."""
    return Squares(tmp_path_factory.mktemp("opinions"), several=True)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_tokenizer(tmp_path_factory.mktemp("words"), WORDS)
