"""Drawn scenes as rows, and jobs on small encoders."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmadapters.tasks.core.rows import Batch
from mmadapters.tasks.data.examples import Collate, Examples
from mmadapters.tasks.jobs.model import make_model
from mmadapters.tasks.segmentation.config import SegmentationConfig
from mmadapters.tasks.segmentation.model import SegmentationModel
from mmadapters.tasks.segmentation.task import SegmentationTask
from mmadapters.tasks.training.evaluate import evaluate

CLASSES = ("background", "square", "disk")
SMALL_VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "options": {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3},
}


class Scenes:
    """Rows of a bright square and a dark disk on noise, each picture of its own size."""

    column_names = ("image", "mask", "kind")

    def __init__(self, count: int, *, seed: int = 0, sizes: Sequence[tuple[int, int]] = ()) -> None:
        rng = np.random.default_rng(seed)
        self.rows = []
        for number in range(count):
            size = sizes[number % len(sizes)] if sizes else (40, 48)
            image, mask = _scene(rng, size)
            self.rows.append(
                {"image": _png(image), "mask": _png(mask), "kind": ("even", "odd")[number % 2]}
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices(size)
    mask = np.zeros(size, dtype=np.uint8)
    top, left = (int(rng.integers(0, side - 16)) for side in size)
    mask[top : top + 16, left : left + 16] = 1
    y, x = (int(rng.integers(9, side - 9)) for side in size)
    mask[np.hypot(rows - y, columns - x) < 8] = 2
    colours = np.array([[120, 120, 120], [230, 210, 60], [20, 40, 90]])
    image = colours[mask] + rng.normal(scale=12, size=(*size, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def _png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def job(**sections: Any) -> SegmentationConfig:
    base: dict[str, Any] = {
        "backbone": SMALL_VIT,
        "data": {"source": "none", "classes": CLASSES},
        "adapter": {"method": "seq_bn", "size": 8},
        "transforms": {"crop": 32, "scale": (1.0, 1.0), "cat_max_ratio": 1.0},
        "trainer": {"device": "cpu"},
    }
    for key, value in sections.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return SegmentationConfig(**base)


def made(config: SegmentationConfig, rows: Any) -> tuple[SegmentationTask, SegmentationModel]:
    task, model = make_model(config, rows)
    assert isinstance(task, SegmentationTask)
    assert isinstance(model, SegmentationModel)
    return task, model


def batch_of(task: SegmentationTask, rows: Any, numbers: Sequence[int], *, train: bool) -> Batch:
    examples = Examples(task, rows, train=train)
    loaded = Collate(task)([examples[(number, number) if train else number] for number in numbers])
    assert loaded.batch is not None
    return loaded.batch


def train(
    task: SegmentationTask, model: SegmentationModel, rows: Any, *, steps: int, rate: float = 3e-3
) -> list[float]:
    """The losses of a plain training loop with batches of 8."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for step in range(steps):
        numbers = [(8 * step + place) % len(rows) for place in range(8)]
        loss = model(**batch_of(task, rows, numbers, train=True))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    model.eval()
    return losses


def miou(task: SegmentationTask, model: SegmentationModel, rows: Any) -> float:
    found = evaluate(task, model, rows, batch_size=len(rows))
    return task.score(found.records, bootstrap=0)["mIoU"].value
