"""Drawn scenes as rows, and an adapted nano/clip that was trained on them for a moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mmadapters
from mmadapters import SeqBnConfig
from mmadapters.tasks.data.synthetic import scenes
from mmadapters.tasks.retrieval.config import RetrievalConfig
from mmadapters.tasks.retrieval.model import RetrievalModel
from mmadapters.tasks.retrieval.task import RetrievalTask


class SceneRows:
    """A row for each of the first scenes of some seeds, with its caption or several of them."""

    def __init__(
        self, seeds: Sequence[int], vocabulary: scenes.Vocabulary, *, captions: int | None = None
    ) -> None:
        drawn = [scenes.make_scene(seed, vocabulary) for seed in seeds]
        images, _ = scenes.render(drawn, vocabulary)
        self.columns: dict[str, list[Any]] = {
            "image": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images],
            "things": [str(len(scene.things)) for scene in drawn],
        }
        if captions is None:
            self.columns["caption"] = [scenes.describe(scene, vocabulary) for scene in drawn]
        else:
            self.columns["captions"] = [
                [scenes.describe(scene, vocabulary, seed=seed) for seed in range(captions)]
                for scene in drawn
            ]

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}


def job(**sections: Any) -> RetrievalConfig:
    given: dict[str, Any] = {
        "name": "scenes",
        "backbone": {"name": "nano/clip"},
        "data": {"source": "builtin/scenes"},
        "trainer": {"batch_size": 16, "device": "cpu", "tensorboard": False},
    }
    return RetrievalConfig.model_validate({**given, **sections})


def task_and_model(
    config: RetrievalConfig, rows: Any, *, adapter: bool = True
) -> tuple[RetrievalTask, RetrievalModel]:
    torch.manual_seed(0)
    backbone = mmadapters.load_backbone(config.backbone.name, **config.backbone.options)
    task = RetrievalTask(config)
    task.fit(rows, backbone)
    encoder = mmadapters.init(backbone)
    if adapter:
        encoder.add_adapter("scenes", SeqBnConfig(size=8, sites=("vision", "text")))
        encoder.train_adapter("scenes")
    return task, task.build(encoder)


@pytest.fixture(scope="session")
def make() -> Callable[..., tuple[RetrievalTask, RetrievalModel]]:
    return task_and_model


@pytest.fixture(scope="session")
def known() -> SceneRows:
    """Scenes of the words that nano/clip knows, three captions each."""
    return SceneRows(scenes.TEST_SEEDS[:40], scenes.PRETRAINING, captions=3)


@pytest.fixture(scope="session")
def unseen() -> SceneRows:
    return SceneRows(scenes.TASK_SEEDS[:32], scenes.UNSEEN)


@pytest.fixture(scope="session")
def zero_shot(known: SceneRows) -> tuple[RetrievalTask, RetrievalModel]:
    """nano/clip as it is."""
    task, model = task_and_model(job(), known, adapter=False)
    return task, model.eval()


@pytest.fixture
def files(tmp_path: Path, known: SceneRows) -> list[Path]:
    """Four pictures in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(4)]
    for path, image in zip(paths, known["image"], strict=False):
        image.save(path)
    return paths
