"""A small task for tests of what stands around tasks: which tint a picture has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from families.small import small_vit
from torch import Tensor, nn

import mmadapters
from mmadapters import AdapterModel, SeqBnConfig
from mmadapters.tasks.config.schema import BackboneConfig, DataConfig, JobConfig
from mmadapters.tasks.core.errors import BadRow
from mmadapters.tasks.core.metrics import summed_metric
from mmadapters.tasks.core.model import TaskModel
from mmadapters.tasks.core.results import Scores
from mmadapters.tasks.core.rows import Column, Rows
from mmadapters.tasks.core.task import Task

NAME = "tints"


class Pictures:
    """Rows of 32×32 pictures of noise, reddish, greenish, bluish or dark, by their seed."""

    column_names = ("image", "label", "group")

    def __init__(self, count: int, *, seed: int = 0, broken: Sequence[int] = ()) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(4, size=count)
        self.images = rng.normal(size=(count, 3, 32, 32)).astype(np.float32)
        tints = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], dtype=np.float32)
        self.images += 0.7 * tints[self.labels][:, :, None, None]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Any) -> Any:
        if key == "label":
            return self.labels.tolist()
        if key == "group":
            return ["even" if index % 2 == 0 else "odd" for index in range(len(self))]
        image = None if key in self.broken else self.images[key]
        return {"image": image, "label": int(self.labels[key]), "group": self["group"][key]}


class TintModel(TaskModel):
    def logits(self, image: Tensor) -> Tensor:
        return self.head(self.encoder.forward_features(image).mean(dim=1))

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.logits(image), label)}


class TintTask(Task[JobConfig]):
    name = NAME
    metric = "accuracy"
    columns: ClassVar = {"image": Column("image"), "label": Column("label")}

    def fit(self, rows: Rows | None, backbone: nn.Module) -> None:
        self.state = {"classes": 4}

    def build(self, encoder: AdapterModel) -> TaskModel:
        return TintModel(encoder, nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 4)))

    def example(self, row: Mapping[str, Any], *, train: bool) -> dict[str, Any]:
        if row["image"] is None:
            raise BadRow("there is no picture")
        image = torch.as_tensor(row["image"])
        if train:
            image = image + 0.1 * torch.randn_like(image)
        return {"image": image, "label": row["label"]}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "image": torch.stack([example["image"] for example in examples]),
            "label": torch.tensor([example["label"] for example in examples]),
        }

    def records(self, model: TaskModel, batch: dict[str, Any]) -> list[dict[str, Any]]:
        assert isinstance(model, TintModel)
        guesses = model.logits(batch["image"]).argmax(1)
        return [{"correct": bool(right)} for right in guesses == batch["label"]]

    def score(self, records: Sequence[dict[str, Any]], *, bootstrap: int) -> Scores:
        statistics = np.array([[record["correct"], 1] for record in records])
        accuracy = summed_metric(
            "accuracy", statistics, lambda sums: sums[..., 0] / sums[..., 1], resamples=bootstrap
        )
        return Scores([accuracy])

    def predict(
        self, model: TaskModel, inputs: Sequence[str], *, out: Path | None
    ) -> Iterator[dict[str, Any]]:
        yield from ({"input": name} for name in inputs)


def job(**trainer: Any) -> JobConfig:
    return JobConfig(
        task=NAME,
        name=NAME,
        backbone=BackboneConfig(name="timm/test"),
        data=DataConfig(source="none"),
        trainer={"epochs": 2, "batch_size": 8, "log_every": 1, "device": "cpu", **trainer},
    )


def task_and_model(config: JobConfig) -> tuple[TintTask, TaskModel]:
    """The task, and its model of a small ViT with a bottleneck adapter to be trained."""
    torch.manual_seed(config.seed)
    task = TintTask(config)
    encoder = mmadapters.init(small_vit())
    task.fit(None, encoder)
    encoder.add_adapter(NAME, SeqBnConfig(size=8, dropout=0.1))
    encoder.train_adapter(NAME)
    return task, task.build(encoder)
